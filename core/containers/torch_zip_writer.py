"""Write live tensors as a `.pt` file that plain `torch.load(weights_only=True, mmap=True)` reads, in one pass.

Which records there are, and how they lie in the zip, is told in core/containers/torch_zip_layout.py.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from core.containers.torch_zip_layout import Sink, ZipLayout

_MOST_WORKERS = 8


def write_torch_zip(sink: Sink, content: Any) -> str:
    """Write an object of tensors and plain values as a torch file; tensors that share a storage stay shared.

    Returns the digest of its tensors, as `digest_of` computes it.
    """
    data_pkl, storages = _pickle(content)
    layout = ZipLayout(sink)
    layout.record("data.pkl", len(data_pkl), [data_pkl])
    layout.record("byteorder", 6, [b"little"])
    sums = [layout.record(f"data/{key}", s.nbytes(), [_bytes_of(s)]) for key, s in enumerate(storages)]
    layout.record("version", 2, [b"3\n"])
    layout.close()
    return _digest(sums)


def digest_of(content: Any) -> str:
    """Digest of the tensors of an object: CRC32 of the CRC32s (little-endian) of their storages, in the file's order.

    Reads each storage once, on all processors.
    """
    _, storages = _pickle(content)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_WORKERS)) as pool:
        return _digest(pool.map(lambda storage: zlib.crc32(_bytes_of(storage)), storages))


def _digest(sums: Iterable[int]) -> str:
    return f"{zlib.crc32(b''.join(struct.pack('<I', crc) for crc in sums)):08x}"


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
