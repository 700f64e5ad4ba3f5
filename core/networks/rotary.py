"""Rotary positions: pairs of numbers of each query and key, turned by an angle that grows with the position.

Shapes: B batch, H heads, T positions, D head size, R numbers of a head that turn (`rotary_percent` of them).

The angles are computed in fp32 for the positions of one forward pass: a table for a long context would be large, and
buffers of the model would change with its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..config.gpt import GPTConfig

Rotation = tuple[Tensor, Tensor]
"""Cosine, and sine with the sign of its partner, of each number's angle: [T, R], or [B, 1, T, R] by rows."""


class Rotary:
    """The frequencies of a config's rotary positions."""

    def __init__(self, config: GPTConfig) -> None:
        # On the CPU also where the model is built without memory; they follow the first positions.
        exponents = torch.arange(0, config.rotary_width, 2, device="cpu").float() / config.rotary_width
        frequencies, self.factor = 1.0 / config.rope_theta**exponents, 1.0  # the factor is of cosine and sine
        if config.rope_scaling is not None:
            frequencies, self.factor = _scaled(frequencies, config.rope_theta, config.rope_scaling)
        # cos(-a) is cos(a) and sin(-a) is -sin(a): the first of two partners turns by the negative angle.
        self.frequencies = SPREAD[config.rotary_layout](-frequencies, frequencies)

    def rotation(self, positions: Tensor) -> Rotation:
        """Compute the angles of positions [T] or [B, T]."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None].float() * self.frequencies
        if positions.dim() == 2:
            angles = angles[:, None]
        return angles.cos() * self.factor, angles.sin() * self.factor


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn x [B, H, T, D]; number i of its first R is the partner of number i + R / 2."""
    return _rotated(x, rotation, lambda turning: turning.roll(turning.size(-1) // 2, -1))


def rotate_pairs(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn x [B, H, T, D]; number 2 i of its first R is the partner of number 2 i + 1."""
    return _rotated(x, rotation, lambda turning: turning.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def _rotated(x: Tensor, rotation: Rotation, partners: Callable[[Tensor], Tensor]) -> Tensor:
    cos, sin = rotation
    width = cos.size(-1)
    turning = x if width == x.size(-1) else x[..., :width]
    turned = torch.addcmul(turning * cos, partners(turning), sin).to(x.dtype)
    return turned if turning is x else torch.cat((turned, x[..., width:]), dim=-1)


LAYOUTS = {"halves": rotate_halves, "pairs": rotate_pairs}
SPREAD: dict[str, Callable[..., Tensor]] = {
    "halves": lambda first, second: torch.cat((first, second)),
    "pairs": lambda first, second: torch.stack((first, second), dim=-1).flatten(),
}
"""Where the first and second partners of a layout lie."""


def _scaled(frequencies: Tensor, theta: float, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """Change frequencies [R / 2] for a longer context than the model was trained for; also the factor of the tables."""
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor, 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(frequencies, scaling), 1.0
    # YaRN (arXiv 2309.00071): fast frequencies stay, slow ones are divided by the factor, in between a ramp.
    width = 2 * len(frequencies)
    turns = (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
    context = scaling["original_max_position_embeddings"]
    first, last = (width * math.log(context / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (torch.arange(width // 2, device="cpu").float() - first) / (last - first or 0.001)
    slow = ramp.clamp(0, 1)
    return frequencies / factor * slow + frequencies * (1 - slow), _yarn_factor(scaling)


def _yarn_factor(scaling: dict[str, Any]) -> float:
    """The factor of YaRN's cosines and sines: the scores of a longer context are sharper."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0

    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(above) / grown(below) if above and below else grown(1)


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's rule: wavelengths that fit the old context often stay, those that never fit are divided."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the old context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies
