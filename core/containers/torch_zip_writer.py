"""Write live tensors as a `.pt` file that plain `torch.load(weights_only=True, mmap=True)` reads, in one pass.

Which records there are, and how they lie in the zip, is told in core/containers/torch_zip_layout.py.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from core.containers.torch_zip_layout import Sink, ZipLayout


def write_torch_zip(sink: Sink, content: Any) -> None:
    """Write an object of tensors and plain values as a torch file; tensors that share a storage stay shared."""
    data_pkl, storages = _pickle(content)
    records: list[tuple[str, bytes | memoryview]] = [("data.pkl", data_pkl), ("byteorder", b"little")]
    records += [(f"data/{key}", _bytes_of(storage)) for key, storage in enumerate(storages)]
    records.append(("version", b"3\n"))
    layout = ZipLayout(sink)
    for name, data in records:
        layout.record(name, len(data), [data])
    layout.close()


def file_size(content: Any) -> int:
    """Estimate from above the bytes that a file of this object takes."""
    data_pkl, storages = _pickle(content)
    return len(data_pkl) + sum(s.nbytes() + 512 for s in storages) + 4096


def _pickle(content: Any) -> tuple[bytes, list[torch.UntypedStorage]]:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    return buffer.getvalue(), pickler.storages


class _Pickler(pickle.Pickler):
    """Pickles tensors as torch.save does (torch/serialization.py, _save): a storage becomes a key and a type."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=2)
        self.storages: list[torch.UntypedStorage] = []
        self._keys: dict[int, int] = {}

    def persistent_id(self, value: Any) -> tuple[str, type, str, str, int] | None:
        if isinstance(value, torch.storage.TypedStorage):
            storage, kind, numel = value._untyped_storage, getattr(torch, value._pickle_storage_type()), value._size()
        elif isinstance(value, torch.UntypedStorage):
            storage, kind, numel = value, torch.UntypedStorage, value.nbytes()
        else:
            return None
        identity = storage._cdata
        if identity not in self._keys:
            self._keys[identity] = len(self.storages)
            self.storages.append(storage)
        return ("storage", kind, str(self._keys[identity]), "cpu", numel)


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    flat = torch.empty(0, dtype=torch.uint8).set_(storage.cpu())
    return flat.numpy().data
