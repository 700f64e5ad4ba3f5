"""DCP folders for tests: written block by block with torch's own classes, so that they may also be wrong."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.makers.torch_files import saved

Boxes = Iterable[tuple[tuple[int, ...], tuple[int, ...]]]


def cut(tensor: torch.Tensor, begin: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    return tensor[tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))].clone()


class Writer:
    """Writes one folder; what `.metadata` says may be changed before `close`."""

    def __init__(self, folder: Path, files: int = 2) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.data = [bytearray() for _ in range(files)]
        self.metadata = Metadata({}, {}, {})
        self.count = 0

    def item(self, index: MetadataIndex, data: bytes) -> None:
        i = self.count % len(self.data)
        self.count += 1
        self.metadata.storage_data[index] = _StorageInfo(f"__{i}_0.distcp", len(self.data[i]), len(data))
        self.data[i] += data

    def tensor(self, name: str, tensor: torch.Tensor, boxes: Boxes | None = None) -> None:
        """Write a tensor in these blocks, by default in one."""
        boxes = [((0,) * tensor.dim(), tuple(tensor.shape))] if boxes is None else list(boxes)
        chunks = [ChunkStorageMetadata(torch.Size(begin), torch.Size(shape)) for begin, shape in boxes]
        properties = TensorProperties.create_from_tensor(tensor)
        self.metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, tensor.size(), chunks)
        self.metadata.planner_data[name] = (name,)
        for i, (begin, shape) in enumerate(boxes):
            self.item(MetadataIndex(name, begin, i), saved(cut(tensor, begin, shape)))

    def value(self, name: str, value: Any) -> None:
        self.metadata.state_dict_metadata[name] = BytesStorageMetadata()
        self.metadata.planner_data[name] = (name,)
        self.item(MetadataIndex(name), saved(value))

    def info(self, name: str) -> _StorageInfo:
        """Where the first item of this name is."""
        return next(info for index, info in self.metadata.storage_data.items() if index.fqn == name)

    def close(self) -> Path:
        for i, data in enumerate(self.data):
            (self.folder / f"__{i}_0.distcp").write_bytes(data)
        (self.folder / ".metadata").write_bytes(pickle.dumps(self.metadata))
        return self.folder


def load(folder: Path) -> dict[str, Any]:
    """What torch itself reads from a folder, nested, into nothing that was there before."""
    found: dict[str, Any] = {}
    _load_state_dict(found, dcp.FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return found


def save(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it saves in one process
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


ROWS = [((0, 0), (3, 4)), ((3, 0), (3, 4)), ((6, 0), (1, 4)), ((7, 0), (0, 4))]
"""(7, 4) on four ranks: the third has one row, the last none."""


def write_rows(folder: Path) -> Path:
    """Write a tensor in rows, and a value."""
    writer = Writer(folder)
    writer.tensor("w", torch.arange(28.0).reshape(7, 4), ROWS)
    writer.value("lr", 0.5)
    return writer.close()


def write_ranks(folder: Path, tensors: dict[str, torch.Tensor], ranks: int, by_size: bool = False) -> Path:
    """Write what FSDP ranks do: each its rows of all tensors, in their order or by size; no part without rows."""
    writer = Writer(folder, ranks)
    rows = {name: -(-len(tensor) // ranks) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():  # what is said of each; the items follow
        tail = tuple(tensor.shape[1:])
        firsts = range(0, len(tensor), rows[name])
        boxes = [((k, *[0] * len(tail)), (min(rows[name], len(tensor) - k), *tail)) for k in firsts]
        writer.tensor(name, tensor, boxes)
    writer.data = [bytearray() for _ in range(ranks)]
    writer.metadata.storage_data.clear()
    for rank in range(ranks):
        parts = {name: tensor[rank * rows[name] : (rank + 1) * rows[name]] for name, tensor in tensors.items()}
        names = sorted(parts, key=lambda name: parts[name].numel()) if by_size else list(parts)
        for name in names:
            if len(parts[name]):
                writer.count = rank
                begin = (rank * rows[name], *[0] * (tensors[name].dim() - 1))
                writer.item(MetadataIndex(name, begin), saved(parts[name].clone()))
    return writer.close()


def lost(folder: Path) -> Path:
    """The folder without its `.metadata`."""
    (folder / ".metadata").unlink()
    return folder
