"""Write live tensors as a `.pt` file that plain `torch.load(weights_only=True, mmap=True)` reads, in one pass.

core/containers/torch_files/layout.py describes the records and their layout in the zip.
"""

from __future__ import annotations

import io
import pickle
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from ..containers.checksum import CHUNK, THREADS, crc32
from ..containers.torch_files.layout import Sink, records, write_torch_file


def write_torch_zip(sink: Sink, content: Any) -> str:
    """Write an object of tensors and plain values as a torch file, and return the digest of its tensors.

    Tensors that share a storage stay shared.
    """
    data_pkl, storages = _pickle(content)
    in_memory = (bytes_of(storage.cpu()).numpy().data for storage in storages)
    return write_torch_file(sink, data_pkl, ((len(data), [data]) for data in in_memory))


def records_of(content: Any) -> list[tuple[str, bytes | torch.UntypedStorage]]:
    """List the records of the torch file that holds an object, in order."""
    return list(records(*_pickle(content)))


def digest_of(content: Any, known: Mapping[tuple[int, int], int] | None = None) -> str:
    """Digest of the tensors of an object as they are now, in the order of its torch file: 8 hex digits.

    It is the CRC32 of the CRC32s of their storages, little-endian; a saved step records it for each file. `known` has
    CRC32s by address and bytes of a storage.
    """
    known = known or {}

    def crc_of(storage: torch.UntypedStorage) -> int:
        crc = known.get((storage.data_ptr(), storage.nbytes())) if storage.device.type == "cpu" else None
        return _crc32(bytes_of(storage.cpu()).numpy()) if crc is None else crc

    # Else each thread would open a context on the first GPU.
    same_gpu = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_initialized() else None
    with ThreadPoolExecutor(THREADS, initializer=same_gpu) as pool:
        sums = pool.map(crc_of, _pickle(content)[1])
        return f"{zlib.crc32(b''.join(crc.to_bytes(4, 'little') for crc in sums)):08x}"


def _crc32(data: np.ndarray) -> int:
    """CRC32 of bytes in memory by way of the core's cache: zlib waits for memory, and a copy does not."""
    cache, crc = np.empty(min(CHUNK, len(data)), np.uint8), 0
    for start in range(0, len(data), CHUNK):
        piece = cache[: len(data) - start]
        np.copyto(piece, data[start : start + CHUNK])
        crc = crc32(piece.data, crc)
    return crc


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


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """View a storage as bytes, in place."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
