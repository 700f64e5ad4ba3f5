"""Write a `.pt` file that plain `torch.load(weights_only=True, mmap=True)` reads, to any output, in one pass.

A torch file is a zip whose records are stored uncompressed and 64-byte aligned: `data.pkl` (the object, its storages
replaced by keys), `data/<key>` (the bytes of each storage), `byteorder` and `version`. The CRC32 of a record is known
only when its bytes have passed, so it follows them in a data descriptor (APPNOTE 4.3.9) and stands in the directory.
Equal objects give equal bytes.
"""

from __future__ import annotations

import io
import pickle
import struct
from dataclasses import dataclass
from typing import Any, Protocol

import torch

ALIGNMENT = 64
ZIP64_FROM = 0xFFFFFFFF
"""Sizes and offsets from here on stand in 64-bit fields; tests lower it."""

_DESCRIPTOR_FOLLOWS = 0x0008
_UTF8 = 0x0800
_PADDING_ID = 0xD935
_DOS_DATE = 0x0021  # 1980-01-01: no clock in the bytes


class Sink(Protocol):
    """What the writer needs of an output."""

    size: int

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes and return their CRC32."""


@dataclass
class _Entry:
    name: bytes
    offset: int
    size: int
    crc32: int


def write_torch_zip(sink: Sink, content: Any) -> None:
    """Write an object of tensors and plain values as a torch file; tensors that share a storage stay shared."""
    data_pkl, storages = _pickle(content)
    records: list[tuple[str, bytes | memoryview]] = [("data.pkl", data_pkl), ("byteorder", b"little")]
    records += [(f"data/{key}", _bytes_of(storage)) for key, storage in enumerate(storages)]
    records.append(("version", b"3\n"))
    _write_directory(sink, [_write_record(sink, f"archive/{name}".encode(), data) for name, data in records])


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


def _write_record(sink: Sink, name: bytes, data: bytes | memoryview) -> _Entry:
    offset, size = sink.size, len(data)
    wide = size >= ZIP64_FROM
    extra = struct.pack("<HHQQ", 1, 16, 0, 0) if wide else b""
    start = offset + 30 + len(name) + len(extra) + 4
    padding = -start % ALIGNMENT
    extra += struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    narrow_size = 0xFFFFFFFF if wide else 0
    header = struct.pack(
        "<4s5H3I2H",
        b"PK\3\4",
        45 if wide else 20,
        _DESCRIPTOR_FOLLOWS | _UTF8,
        0,
        0,
        _DOS_DATE,
        0,
        narrow_size,
        narrow_size,
        len(name),
        len(extra),
    )
    sink.write(header + name + extra)
    crc = sink.write(data)
    sink.write(struct.pack("<4sIQQ" if wide else "<4sIII", b"PK\7\10", crc, size, size))
    return _Entry(name, offset, size, crc)


def _write_directory(sink: Sink, entries: list[_Entry]) -> None:
    start = sink.size
    for entry in entries:
        wide = [value for value in (entry.size, entry.size, entry.offset) if value >= ZIP64_FROM]
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size, offset = (min(v, 0xFFFFFFFF) if v < ZIP64_FROM else 0xFFFFFFFF for v in (entry.size, entry.offset))
        header = struct.pack(
            "<4s6H3I5H2I",
            b"PK\1\2",
            45,
            45 if wide else 20,
            _DESCRIPTOR_FOLLOWS | _UTF8,
            0,
            0,
            _DOS_DATE,
            entry.crc32,
            size,
            size,
            len(entry.name),
            len(extra),
            0,
            0,
            0,
            0,
            offset,
        )
        sink.write(header + entry.name + extra)
    length, count = sink.size - start, len(entries)
    if start >= ZIP64_FROM or length >= ZIP64_FROM or count >= 0xFFFF:
        end = sink.size
        sink.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start))
        sink.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        start, length, count = 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFF
    sink.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, length, start, 0))
