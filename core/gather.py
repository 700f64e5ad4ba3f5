"""Gather: the elements of a view as bytes, in pieces, in memory of at most one tensor; and casts of such pieces.

Bytes that lie in order already are read and handed on, without numpy; others are put in place, tensor by tensor.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from core.containers.container import Container
from core.containers.spec import ITEM_SIZES
from core.decode import decode
from core.errors import CheckpointDamaged, CheckpointError
from core.view import Block, View, is_in_order

if TYPE_CHECKING:
    import numpy as np

PIECE = 256 * 1024
"""Bytes at a time: what stays in a core's cache between being read, summed and written."""

SLAB = 8 << 20
"""Bytes read at a time of a tensor whose elements have to be put in place."""

SMALL, _MOST_SPARSE = 16384, 4
"""Elements that are read for nothing rather than skipped, and how many there may be for each that is wanted."""

_TILE = 128  # elements

FLOATS = ("float64", "float32", "float16", "bfloat16")
"""Dtypes that a cast makes one another of."""


class Gatherer:
    """Reads views of any containers, holding their files open."""

    def __init__(self) -> None:
        self._held = ExitStack()
        self._files: dict[tuple[int, str], BinaryIO] = {}
        self._buffer = memoryview(bytearray(PIECE))

    def __enter__(self) -> Gatherer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def pieces(self, view: View) -> Iterator[memoryview]:
        """Give the elements in row-major order; a piece is overwritten when the next one is asked for.

        Raises: CheckpointDamaged when a file cannot be read or ends too early.
        """
        if not is_in_order(view):
            whole = memoryview(self._placed(view)).cast("B")
            for start in range(0, len(whole), PIECE):
                yield whole[start : start + PIECE]
            return
        item = ITEM_SIZES[view.dtype]
        for block in sorted(view.blocks, key=lambda b: b.begin):
            size = item
            for side in block.shape:
                size *= side
            if block.source is None:
                yield from _repeated(_constant(view.dtype, block.value), size)
            else:
                yield from self._read_through(block, size)

    def _read_through(self, block: Block, size: int) -> Iterator[memoryview]:
        done = 0
        while done < size:
            piece = self._buffer[: min(PIECE, size - done)]
            self._read(block, block.offset + done, piece)
            yield piece
            done += len(piece)

    def _read(self, block: Block, offset: int, into: memoryview) -> None:
        assert block.source is not None
        file = self._file(block.source, block.file)
        where, done = _where(block), 0
        try:
            while done < len(into):
                count = os.preadv(file.fileno(), [into[done:]], offset + done)
                if not count:
                    raise CheckpointDamaged(
                        f"{where}: {block.name} ends after {offset + done} of {offset + len(into)} bytes of the file. "
                        "It was cut off while it was read."
                    )
                done += count
        except OSError as error:
            raise CheckpointDamaged(f"{where}: cannot be read ({error.strerror}). The disk may be failing.") from error

    def _file(self, source: Container, name: str) -> BinaryIO:
        name = name or source.path.name
        key = (id(source), name)
        if key not in self._files:
            if len(self._files) >= 64:  # a folder may have thousands
                self._held.close()
                self._files.clear()
            self._files[key] = self._held.enter_context(source.open(name))
        return self._files[key]

    def _placed(self, view: View) -> bytearray:
        """All elements of a tensor, put where they belong."""
        import numpy as np

        item = ITEM_SIZES[view.dtype]
        kind: np.dtype = np.dtype(f"u{item}" if item <= 8 else "V16")
        dense = bytearray(view.nbytes)
        out = np.frombuffer(dense, kind).reshape(view.shape)
        for block in view.blocks:
            box = out[tuple(slice(b, b + n) for b, n in zip(block.begin, block.shape, strict=True))]
            if block.source is None:
                box[...] = np.frombuffer(_constant(view.dtype, block.value), kind)[0]
            else:
                order = sorted(range(box.ndim), key=lambda d: -block.strides[d])
                strides = tuple(block.strides[d] for d in order)
                self._fill(block, box.transpose(order), strides, block.offset)
        return dense

    def _fill(self, block: Block, box: np.ndarray, strides: tuple[int, ...], offset: int) -> None:
        """Fill a box whose axes are sorted by their strides in the file, a slab of these at a time."""
        import numpy as np

        item, extent = box.itemsize, _extent(box.shape, strides)
        if box.ndim == 0 or (extent * item <= SLAB and extent <= _MOST_SPARSE * box.size + SMALL):
            data = memoryview(bytearray(extent * item))
            self._read(block, offset, data)
            flat = np.frombuffer(data, box.dtype)
            steps = tuple(stride * item for stride in strides)
            _put(box, np.lib.stride_tricks.as_strided(flat, box.shape, steps, writeable=False))
            return
        inner = _extent(box.shape[1:], strides[1:])
        rows = (SLAB // item - inner) // max(strides[0], 1) + 1
        if rows >= box.shape[0] or rows < 2 or strides[0] > _MOST_SPARSE * inner + SMALL:
            for k in range(box.shape[0]):  # what lies between would be read for nothing
                self._fill(block, box[k], strides[1:], offset + k * strides[0] * item)
            return
        for k in range(0, box.shape[0], rows):
            self._fill(block, box[k : k + rows], strides, offset + k * strides[0] * item)


def _put(box: np.ndarray, values: np.ndarray) -> None:
    """Copy, by tiles that fit a core's cache where the two have another axis as their innermost: 8 times as fast."""
    inner = min(range(box.ndim), key=lambda d: (box.strides[d] if box.shape[d] > 1 else 1 << 62, -d), default=0)
    if box.ndim < 2 or inner == box.ndim - 1 or box.size <= _TILE * _TILE:
        box[...] = values
        return
    out, given = box.swapaxes(inner, -2), values.swapaxes(inner, -2)
    for k in range(0, out.shape[-2], _TILE):
        for j in range(0, out.shape[-1], _TILE):
            out[..., k : k + _TILE, j : j + _TILE] = given[..., k : k + _TILE, j : j + _TILE]


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _where(block: Block) -> str:
    assert block.source is not None
    path = block.source.path
    return str(path if not block.file or block.file == path.name else path / block.file)


def _repeated(element: bytes, size: int) -> Iterator[memoryview]:
    many = memoryview(element * (min(size, PIECE) // len(element)))
    for start in range(0, size, len(many)):
        yield many[: size - start]


def _constant(dtype: str, value: float) -> bytes:
    """One element of a value."""
    if not value:
        return bytes(ITEM_SIZES[dtype])
    if dtype in FLOATS:
        codes = {"float64": "<d", "float32": "<f", "float16": "<e", "bfloat16": "<f"}
        data = struct.pack(codes[dtype], value)
        return data[2:] if dtype == "bfloat16" else data  # short binary fractions, which rounding does not change
    return int(value).to_bytes(ITEM_SIZES[dtype], "little", signed=value < 0)


def cast(piece: memoryview, dtype: str, target: str) -> memoryview:
    """Make elements of one dtype those of another, rounding to the nearest, ties to even.

    Raises: CheckpointError when a finite number becomes infinite.
    """
    import numpy as np

    numbers = decode(piece, dtype)
    if target == "bfloat16":
        with np.errstate(over="ignore"):
            bits = numbers.astype(np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        made = np.where(is_nan, ((bits >> 16) | 0x40).astype(np.uint16), rounded)  # a NaN stays one
        infinite = (made & 0x7FFF) == 0x7F80
    else:
        with np.errstate(over="ignore"):
            made = numbers.astype({"float64": "<f8", "float32": "<f4", "float16": "<f2"}[target])
        infinite = np.isinf(made)
    if infinite.any() and not np.isinf(numbers[infinite]).all():
        largest = float(np.abs(numbers[np.isfinite(numbers)]).max())
        raise CheckpointError(f"holds {largest:.6g}, which is beyond {target}. Keep the dtype, or use bf16.")
    return np.ascontiguousarray(made).data.cast("B")
