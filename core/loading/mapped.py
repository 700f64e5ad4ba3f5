"""From bytes in files to tensors in memory: files are mapped where possible, and nothing is executed."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..bundle.parts import ShardedFile, TorchFile
from ..containers.spec import Chunk, TensorSpec
from ..containers.trees import leaves
from ..errors import CheckpointDamaged, CheckpointError
from .values import live


def mapped(file: BinaryIO, path: Path) -> mmap.mmap:
    """Map an open file, privately: writing to it copies the page.

    Raises: CheckpointError when the system refuses the address space.
    """
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        size = os.fstat(file.fileno()).st_size
        raise CheckpointError(
            f"{path}: its {size} bytes cannot be mapped ({error.strerror}). The file is as it was; raise the "
            "limit of the process (ulimit -v), or use a machine with more memory."
        ) from error


_UNFOLDED = 16
"""Bytes that all tensors together may have, each laid out densely, for each byte of their file."""

_UNFOLDED_OF_ANY = 1 << 28
"""Bytes that the tensors of any file may have so: masks and positions are saved expanded."""


def refuse_unfolded(path: Path, count: int, nbytes: int, size: int) -> None:
    """Raise CheckpointDamaged when `count` tensors unfold to far more bytes than their files, of `size` bytes, have."""
    if nbytes > (limit := _UNFOLDED * size + _UNFOLDED_OF_ANY):
        raise CheckpointDamaged(
            f"{path}: its {count} tensors share bytes (strides of 0, views) and unfold to {nbytes} bytes; of a file of "
            f"{size} bytes at most {limit} are loaded. Save the model without its expanded tensors."
        )


def map_tensors(source: TorchFile, content: Any) -> Any:
    """Put mapped tensors in place of the specs in a header's content; tensors that share a storage share memory.

    Of a file that verification has read into memory they lie there.

    Raises: CheckpointDamaged when the tensors unfold to far more than the file: whoever copies them would take that.
    """
    specs = [leaf for leaf in leaves(content) if isinstance(leaf, TensorSpec)]
    size = os.fstat(source.file.fileno()).st_size
    refuse_unfolded(source.path, len(specs), sum(spec.nbytes for spec in specs), size)
    whole = source.filled.memory if source.filled is not None else mapped(source.file, source.path)
    memory = torch.frombuffer(whole, dtype=torch.uint8)
    ends: dict[str, int] = {}
    starts: dict[str, int] = {}
    for spec in specs:
        starts[spec.storage] = min(spec.offset, starts.get(spec.storage, spec.offset))
        ends[spec.storage] = max(spec.offset + spec.extent, ends.get(spec.storage, 0))
    storages = {key: _aligned(memory, starts[key], ends[key]) for key in starts}

    def put(spec: TensorSpec) -> torch.Tensor:
        return _strided(storages[spec.storage], spec, spec.offset - starts[spec.storage])

    return live(content, put, str(source.path))


class Owner:
    """Gives out tensors to write to: those that lie in memory of their own as they are, of all others a copy.

    A storage that has been given out, and one that a tensor fills only in part, is copied: nobody else may change it.
    """

    def __init__(self, filled: bool) -> None:
        self._filled = filled  # whether the tensors lie in memory of the process, not in a mapped file
        self._given: set[int] = set()

    def own(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor in memory that its caller may change, on the processor."""
        storage = tensor.untyped_storage()
        alone = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in self._given
        if self._filled and alone and tensor.nbytes and dtype in (None, tensor.dtype):
            self._given.add(storage.data_ptr())
            return tensor
        return tensor.to(dtype=dtype or tensor.dtype, device="cpu", copy=True)


def read_shards(source: ShardedFile) -> Any:
    """Read a whole folder: its content, each tensor joined from its blocks in memory of its own."""

    def joined(spec: TensorSpec) -> torch.Tensor:
        whole = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        for chunk in spec.blocks:
            box = tuple(slice(b, b + n) for b, n in zip(chunk.begin, chunk.shape, strict=True))
            whole[box] = read_block(source, chunk, spec.dtype)
        return whole

    return live(source.header.content, joined, str(source.path))


def read_block(source: ShardedFile, chunk: Chunk, dtype: str) -> torch.Tensor:
    """Map a block of a tensor, as it lies in its file."""
    kind = getattr(torch, dtype)
    if not chunk.nbytes:
        return torch.empty(chunk.shape, dtype=kind)
    data = torch.frombuffer(source.mapped(chunk.file), dtype=torch.uint8, count=chunk.nbytes, offset=chunk.offset)
    if chunk.offset % kind.itemsize:
        data = data.clone()
    return data.view(kind).as_strided(chunk.shape, chunk.strides)


def read_tensor(source: TorchFile, spec: TensorSpec) -> torch.Tensor:
    """Read one tensor into memory of its own, without a map: its pages are freed with it.

    Raises: CheckpointDamaged when the file ends too early.
    """
    data = torch.empty(spec.extent, dtype=torch.uint8)
    view, done = memoryview(data.numpy().data), 0
    source.file.seek(spec.offset)
    while done < spec.extent:
        count = source.file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointDamaged(f"{source.path}: {spec.name} ends after {done} of {spec.extent} bytes.")
        done += count
    return _strided(data, spec, 0)


def _aligned(memory: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Bytes as a storage of their own: mapped, or copied where the old stream format left them unaligned."""
    if end <= start:
        return torch.empty(0, dtype=torch.uint8)
    piece = memory[start:end]
    if start % 64:
        return piece.clone()
    return torch.frombuffer(piece.numpy(), dtype=torch.uint8)


def _strided(storage: torch.Tensor, spec: TensorSpec, offset: int) -> torch.Tensor:
    dtype = getattr(torch, spec.dtype)
    if not spec.numel:
        return torch.empty(spec.shape, dtype=dtype)
    whole = storage[: len(storage) // dtype.itemsize * dtype.itemsize].view(dtype)
    return whole.as_strided(spec.shape, spec.strides, offset // dtype.itemsize)
