"""Tensors stored in blocks: check that the blocks cover the tensor exactly once, and make its spec."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, BinaryIO, TypeGuard

from ..errors import CheckpointDamaged
from .spec import ITEM_SIZES, Chunk, TensorSpec, dense_strides

_MOST_CUTS = 5
"""Most dimensions along which a tensor may be cut: meshes have three, and each one doubles the work."""


def naturals(values: Any) -> TypeGuard[tuple[int, ...]]:
    """Whether a value from a file is a tuple of whole numbers of at least 0, as shapes and offsets are."""
    if not isinstance(values, tuple):
        return False
    for value in values:  # noqa: SIM110 (three times as fast as all(), and called for every tensor)
        if type(value) is not int or not 0 <= value < 1 << 63:
            return False
    return True


def blocks_fault(shape: tuple[int, ...], blocks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """Describe what is wrong with the blocks (begin, shape) of a tensor; "" when each element is in exactly one.

    It counts corners, in linear time: each block contributes +1 and -1 at alternate corners. The blocks fill the tensor
    exactly when the sums equal the tensor's own contributions at its corners and are 0 everywhere else.
    """
    if len(blocks) == 1 and blocks[0][1] == shape and not any(blocks[0][0]) and len(blocks[0][0]) == len(shape):
        return ""
    for begin, size in blocks:
        if len(begin) != len(shape) or len(size) != len(shape):
            return f"a block of shape {size} from {begin} does not belong to a tensor of shape {shape}"
        if any(b + s > whole for b, s, whole in zip(begin, size, shape, strict=True)):
            return f"a block of shape {size} from {begin} reaches beyond the shape {shape}"
    blocks = [block for block in blocks if 0 not in block[1]]
    have, need = sum(math.prod(size) for _, size in blocks), math.prod(shape)
    if have != need:
        fault = "some are missing" if have < need else "some occur twice"
        return f"its blocks have {have} elements, its shape {shape} {need}: {fault}"
    cuts = [d for d in range(len(shape)) if any(size[d] != shape[d] for _, size in blocks)]
    if len(cuts) > _MOST_CUTS:
        return f"it is cut along {len(cuts)} dimensions, at most {_MOST_CUTS} are read"
    sums: Counter[tuple[int, ...]] = Counter()
    for begin, size in blocks:
        for ends in itertools.product((0, 1), repeat=len(cuts)):
            sums[tuple(begin[d] + size[d] * end for d, end in zip(cuts, ends, strict=True))] += (-1) ** sum(ends)
    for ends in itertools.product((0, 1), repeat=len(cuts)) if blocks else ():
        sums[tuple(shape[d] * end for d, end in zip(cuts, ends, strict=True))] -= (-1) ** sum(ends)
    return "some of its blocks overlap, and some elements are missing" if any(sums.values()) else ""


def spec_of_blocks(name: str, dtype: str, shape: tuple[int, ...], chunks: Sequence[Chunk], storage: str) -> TensorSpec:
    """Make the spec of a tensor from its chunks; empty chunks are left out, and a single chunk is the whole tensor."""
    chunks = [chunk for chunk in chunks if chunk.nbytes] or list(chunks[:1])
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if len(chunks) == 1 and chunks[0].nbytes == nbytes:
        one = chunks[0]
        strides = one.strides if one.shape == shape else dense_strides(shape)
        return TensorSpec(name, dtype, shape, strides, one.offset, nbytes, storage, one.file)
    return TensorSpec(name, dtype, shape, dense_strides(shape), 0, nbytes, storage, "", tuple(chunks))


def read_whole(file: BinaryIO, most: int, where: str) -> bytes:
    """Read a file of at most `most` bytes.

    Raises: CheckpointDamaged when it is larger, or ends while it is read.
    """
    size = file.seek(0, os.SEEK_END)
    if size > most:
        raise CheckpointDamaged(f"{where}: has {size} bytes, at most {most} are read.")
    return read_at(file, 0, size, where)


def read_at(file: BinaryIO, offset: int, size: int, where: str) -> bytes:
    """Read `size` bytes from `offset`.

    Raises: CheckpointDamaged when the file ends too early.
    """
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise CheckpointDamaged(
            f"{where}: ends at byte {offset + len(data)}, {offset + size} are needed. It was cut off."
        )
    return data
