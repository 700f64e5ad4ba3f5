"""TensorSpec: a container's description of one tensor, with the location of its bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes of one element, by torch's name of the dtype."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor that is stored separately."""

    file: str  # within the container's folder
    offset: int  # of its first element's first byte, in that file
    nbytes: int
    begin: tuple[int, ...]  # where the block begins in the tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, within the file


@dataclass(slots=True)
class TensorSpec:
    """One tensor as its container describes it; tensors of one `storage` share bytes (tied weights, views).

    In a container of several files, `file` names the one that holds it. For a tensor in several blocks, `chunks`
    replaces `offset` and `strides`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    offset: int  # of the first element's first byte, in the file
    nbytes: int  # of the elements laid out densely, regardless of the strides
    storage: str
    file: str = ""  # within the container's folder; "" when the container is one file
    chunks: tuple[Chunk, ...] = ()

    def __str__(self) -> str:
        return f"tensor {self.dtype} {self.shape}"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> tuple[Chunk, ...]:
        """Its chunks; for a tensor in one piece, a single chunk."""
        whole = Chunk(self.file, self.offset, self.nbytes, (0,) * len(self.shape), self.shape, self.strides)
        return self.chunks or (whole,)

    @property
    def contiguous(self) -> bool:
        """Whether the elements are dense and in row-major order: the `nbytes` bytes at `offset` are the tensor."""
        return self.strides == dense_strides(self.shape) or _same_order(self.shape, self.strides)

    @property
    def extent(self) -> int:
        """Bytes from `offset` to the end of the last element: 0 when empty, below `nbytes` when expanded."""
        return reach(self.shape, self.strides) * ITEM_SIZES[self.dtype]


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a row-major tensor, in elements, as torch counts them (a dimension of size 0 counts as 1)."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Number of storage elements from the first to the last element of a tensor, inclusive."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _same_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides are dense, apart from those of dimensions of size 1, which are never used."""
    return 0 in shape or all(
        size == 1 or stride == dense for size, stride, dense in zip(shape, strides, dense_strides(shape), strict=True)
    )
