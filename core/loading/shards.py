"""Read the blocks of tensors out of a folder of shards, or all of it; files are mapped, nothing is executed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bundle.parts import ShardedFile
from ..containers.spec import Chunk, TensorSpec


def chunks_of(spec: TensorSpec) -> tuple[Chunk, ...]:
    """The blocks of a tensor; one for a tensor that lies in one piece."""
    if spec.chunks:
        return spec.chunks
    return (Chunk(spec.file, spec.offset, spec.nbytes, (0,) * len(spec.shape), spec.shape, spec.strides),)


def read_block(source: ShardedFile, chunk: Chunk, dtype: str) -> Tensor:
    """Map a block of a tensor, as it lies in its file."""
    kind = getattr(torch, dtype)
    if not chunk.nbytes:
        return torch.empty(chunk.shape, dtype=kind)
    data = torch.frombuffer(source.mapped(chunk.file), dtype=torch.uint8, count=chunk.nbytes, offset=chunk.offset)
    if chunk.offset % kind.itemsize:
        data = data.clone()
    return data.view(kind).as_strided(chunk.shape, chunk.strides)


def read_shards(source: ShardedFile) -> Any:
    """Read all of a folder: its content, each tensor joined from its blocks in memory of its own."""
    return _joined(source.header.content, source)


def _joined(value: Any, source: ShardedFile) -> Any:
    if isinstance(value, TensorSpec):
        whole = torch.empty(value.shape, dtype=getattr(torch, value.dtype))
        for chunk in chunks_of(value):
            box = tuple(slice(b, b + n) for b, n in zip(chunk.begin, chunk.shape, strict=True))
            whole[box] = read_block(source, chunk, value.dtype)
        return whole
    if isinstance(value, dict):
        return {key: _joined(item, source) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_joined(item, source) for item in value)
    return value
