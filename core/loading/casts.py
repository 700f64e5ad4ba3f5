"""What is lost when saved values are copied into tensors of another dtype."""

from __future__ import annotations

from typing import Any

import torch

_PIECE = 1 << 20
"""Elements compared at once, in float64."""


def cast_loss(saved: torch.Tensor, dtype: torch.dtype) -> tuple[str | None, bool]:
    """Say which value a dtype cannot hold at all, such as "300.5 does not fit uint8", and whether others are rounded.

    Rounding is what fewer digits do to a finite number. A fraction in a whole number, infinity in place of a number and
    a lost imaginary part are no rounding.
    """
    rounded = False
    name = str(dtype).removeprefix("torch.")
    for piece in saved.detach().reshape(-1).split(_PIECE) if saved.dtype != dtype else ():
        try:
            lost, less = _losses(piece.cpu(), dtype)
        except (RuntimeError, TypeError) as error:  # float4 converts into nothing
            return f"{str(saved.dtype).removeprefix('torch.')} cannot be converted to {name} ({error})", False
        if lost.any():
            return f"{piece[int(lost.nonzero()[0])].item()} does not fit {name}", rounded
        rounded = rounded or bool(less.any())
    return None, rounded


def _losses(piece: torch.Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
    """Which values do not fit a dtype, and which are rounded."""
    if piece.is_complex() and not dtype.is_complex:
        real, imaginary = torch.view_as_real(piece.to(torch.complex128)).unbind(-1)
        lost, less = _losses(real, dtype)
        return lost | (imaginary != 0), less
    if piece.is_complex() or dtype.is_complex:
        before, after = (torch.view_as_real(values.to(torch.complex128)) for values in (piece, piece.to(dtype)))
        lost, less = _compared(before, after, torch.finfo(dtype))
        return lost.any(-1), less.any(-1)
    if dtype.is_floating_point:
        lost, less = _compared(piece.double(), piece.to(dtype).double(), torch.finfo(dtype))
        long = not piece.is_floating_point()  # whole numbers that float64 itself may round
        return lost, less | (piece.double().abs() > 1 << 53) if long else less
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if piece.is_floating_point():
        numbers = piece.double()
        outside = (numbers != numbers.round()) | (numbers < float(low)) | (numbers >= float(high) + 1)
    else:  # NumPy compares whole numbers of any size and sign; torch lacks unsigned ones
        values = piece.numpy().astype("u1") if piece.dtype == torch.bool else piece.numpy()
        outside = torch.from_numpy((values < low) | (values > high))
    return outside, torch.zeros_like(outside)


def _compared(before: torch.Tensor, after: torch.Tensor, info: torch.finfo) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare finite numbers; a dtype without infinity has its largest number in place of all that are larger."""
    capped = (before.abs() > info.max) & ((before - after).abs() > info.eps * before.abs())
    lost = before.isfinite() & (~after.isfinite() | capped)
    return lost, (before != after) & ~before.isnan() & ~lost
