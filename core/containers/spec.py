"""TensorSpec: a container's description of one tensor, with the location of its bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

DTYPES: dict[str, tuple[int, str, str, str]] = {
    "bool": (1, "u1", "Bool", "BOOL"),
    "uint8": (1, "u1", "Byte", "U8"),
    "int8": (1, "i1", "Char", "I8"),
    "uint16": (2, "<u2", "", "U16"),
    "int16": (2, "<i2", "Short", "I16"),
    "uint32": (4, "<u4", "", "U32"),
    "int32": (4, "<i4", "Int", "I32"),
    "uint64": (8, "<u8", "", "U64"),
    "int64": (8, "<i8", "Long", "I64"),
    "float16": (2, "<f2", "Half", "F16"),
    "bfloat16": (2, "", "BFloat16", "BF16"),
    "float32": (4, "<f4", "Float", "F32"),
    "float64": (8, "<f8", "Double", "F64"),
    "float8_e4m3fn": (1, "", "", "F8_E4M3"),
    "float8_e4m3fnuz": (1, "", "", "F8_E4M3FNUZ"),
    "float8_e5m2": (1, "", "", "F8_E5M2"),
    "float8_e5m2fnuz": (1, "", "", "F8_E5M2FNUZ"),
    "float8_e8m0fnu": (1, "", "", "F8_E8M0"),
    "float4_e2m1fn_x2": (1, "", "", "F4"),
    "complex32": (4, "", "", ""),
    "complex64": (8, "<c8", "ComplexFloat", "C64"),
    "complex128": (16, "<c16", "ComplexDouble", ""),
}
"""By torch's name of a dtype: bytes of an element, NumPy's name, torch's word for its storages, safetensors' code."""

MOST_DIMENSIONS = 64
"""Dimensions that a tensor may have."""

LONGEST_NAME = 1000
"""Characters that the name of a tensor may have."""

ITEM_SIZES = {dtype: size for dtype, (size, *_) in DTYPES.items()}
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
        return is_dense(self.shape, self.strides)

    @property
    def extent(self) -> int:
        """Bytes from `offset` to the end of the last element: 0 when empty, below `nbytes` when expanded."""
        return reach(self.shape, self.strides) * ITEM_SIZES[self.dtype]


@lru_cache(maxsize=1024)
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


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides are those of a row-major tensor, apart from dimensions of size 1, where they are never used."""
    dense = dense_strides(shape)
    return (
        strides == dense
        or 0 in shape
        or all(n == 1 or stride == step for n, stride, step in zip(shape, strides, dense, strict=True))
    )
