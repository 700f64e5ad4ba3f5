"""Lay out a torch file without torch: the zip around its records, and the pickle of a content by hand.

A torch file is a zip whose records are stored uncompressed and 64-byte aligned: `data.pkl` (the object, its storages
replaced by keys), `data/<key>` (the bytes of each storage), `byteorder` and `version`. The CRC32 of a record is known
only when its bytes have passed, so it follows them in a data descriptor (APPNOTE 4.3.9) and stands in the directory.
Equal objects give equal bytes. The bytes of a record may come in pieces, so that no tensor has to be in memory.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ...errors import CheckpointMismatch
from ..checksum import combine
from ..spec import DTYPES, dense_strides

FOLDER = "archive"
"""The folder in the zip that holds all records."""

ALIGNMENT = 64
ZIP64_FROM = 0xFFFFFFFF
"""Sizes and offsets of at least this need 64-bit fields; tests lower it."""

_DESCRIPTOR_FOLLOWS, _UTF8 = 0x0008, 0x0800
_PADDING_ID = 0xD935
_DOS_DATE = 0x0021  # 1980-01-01: no clock in the bytes

_STORAGES = {dtype: f"{word}Storage" for dtype, (_, _, word, _) in DTYPES.items() if word}
"""Torch's class of a storage; dtypes that have none are rebuilt from bytes (`_rebuild_tensor_v3`)."""


T = TypeVar("T")


@dataclass(frozen=True)
class TensorRecord:
    """Stands in a content where a tensor is: its dtype and shape, and the key of the storage that it fills."""

    key: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, eq=False)
class GlobalRecord:
    """Stands in a content where a class or function of a program is, or one of its constants."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class CallRecord:
    """Stands in a content where a record is: `kind(*args)` or, without args, a new one that gets this state."""

    kind: GlobalRecord
    args: tuple[Any, ...] | None = None
    state: Any = None


class Sink(Protocol):
    """The output interface that the writers need."""

    size: int

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes and return their CRC32."""


def pickled(content: Any) -> bytes:
    """Pickle plain values and `TensorRecord` tensors as torch.save does, by protocol 2.

    Raises: CheckpointMismatch for a value of another type.
    """
    out = [b"\x80\x02"]
    _put(content, out.append)
    out.append(b".")
    return b"".join(out)


def _put(value: Any, emit: Callable[[bytes], None]) -> None:
    if value is None:
        emit(b"N")
    elif isinstance(value, bool):
        emit(b"\x88" if value else b"\x89")
    elif isinstance(value, int):
        _put_int(value, emit)
    elif isinstance(value, float):
        emit(b"G" + struct.pack(">d", value))
    elif isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        emit(b"X" + struct.pack("<I", len(data)) + data)
    elif isinstance(value, TensorRecord):
        _put_tensor(value, emit)
    elif isinstance(value, GlobalRecord):
        emit(f"c{value.module}\n{value.name}\n".encode())
    elif isinstance(value, CallRecord):
        _put_made(value, emit)
    elif isinstance(value, Mapping):
        emit(b"}(")
        for key, item in value.items():
            _put(key, emit)
            _put(item, emit)
        emit(b"u")
    elif isinstance(value, (list, tuple)):
        emit(b"](" if isinstance(value, list) else b"(")
        for item in value:
            _put(item, emit)
        emit(b"e" if isinstance(value, list) else b"t")
    else:
        raise CheckpointMismatch(f"a {type(value).__name__} cannot be written into a torch file")


def _put_made(record: CallRecord, emit: Callable[[bytes], None]) -> None:
    _put(record.kind, emit)
    _put(record.args or (), emit)
    emit(b"\x81" if record.args is None else b"R")  # a new object, or what a call returns
    if record.args is None:
        _put(record.state, emit)
        emit(b"b")


def _put_int(value: int, emit: Callable[[bytes], None]) -> None:
    if 0 <= value < 256:
        emit(b"K" + bytes([value]))
    elif -(1 << 31) <= value < 1 << 31:
        emit(b"J" + struct.pack("<i", value))
    else:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(data) > 255:
            raise CheckpointMismatch(f"a number of {len(data)} bytes cannot be written into a torch file")
        emit(b"\x8a" + bytes([len(data)]) + data)


def _put_tensor(tensor: TensorRecord, emit: Callable[[bytes], None]) -> None:
    """A call of the function that rebuilds a tensor from (storage, offset, shape, strides, requires_grad, hooks)."""
    kind = _STORAGES.get(tensor.dtype)
    _put(GlobalRecord("torch._utils", "_rebuild_tensor_v2" if kind else "_rebuild_tensor_v3"), emit)
    emit(b"((")
    _put("storage", emit)
    _put(GlobalRecord("torch", kind) if kind else GlobalRecord("torch.storage", "UntypedStorage"), emit)
    _put(str(tensor.key), emit)
    _put("cpu", emit)
    _put_int(math.prod(tensor.shape) if kind else tensor.nbytes, emit)
    emit(b"tQ")  # the storage, as a persistent id
    _put_int(0, emit)
    _put(tensor.shape, emit)
    _put(dense_strides(tensor.shape), emit)
    _put(False, emit)
    _put(GlobalRecord("collections", "OrderedDict"), emit)
    emit(b")R")
    if not kind:
        _put(GlobalRecord("torch", tensor.dtype), emit)
    emit(b"tR")


@dataclass(frozen=True)
class Entry:
    """A record as the directory lists it; `offset` is where its local header begins."""

    name: bytes
    offset: int
    size: int
    crc32: int


def local_header(name: bytes, size: int, offset: int) -> bytes:
    """The header of a record that begins at `offset`, padded so that the record's bytes are aligned."""
    wide = size >= ZIP64_FROM
    extra = struct.pack("<HHQQ", 1, 16, 0, 0) if wide else b""
    padding = -(offset + 30 + len(name) + len(extra) + 4) % ALIGNMENT
    extra += struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    narrow = 0xFFFFFFFF if wide else 0
    flags = _DESCRIPTOR_FOLLOWS | _UTF8
    head = (b"PK\3\4", 45 if wide else 20, flags, 0, 0, _DOS_DATE, 0, narrow, narrow, len(name), len(extra))
    return struct.pack("<4s5H3I2H", *head) + name + extra


def descriptor(size: int, crc32: int) -> bytes:
    """The data descriptor after the bytes of a record; its length depends on the size alone."""
    return struct.pack("<4sIQQ" if size >= ZIP64_FROM else "<4sIII", b"PK\7\10", crc32, size, size)


def directory(entries: Sequence[Entry], start: int) -> bytes:
    """The directory of a zip whose records end at `start`; its length does not depend on the checksums."""
    data = b"".join(map(_directory_entry, entries))
    length, count, end, tail = len(data), len(entries), start + len(data), b""
    if start >= ZIP64_FROM or length >= ZIP64_FROM or count >= 0xFFFF:
        tail = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
        tail += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
        start, length, count = 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFF
    return data + tail + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, length, start, 0)


Pieces = tuple[int, Iterable[bytes | memoryview]]
"""The number of bytes of a storage, and the bytes in pieces."""


def write_torch_file(sink: Sink, data_pkl: bytes, storages: Iterable[Pieces]) -> str:
    """Write a torch file from the pickle of its content and the bytes of its storages, by their keys.

    Storages are taken one at a time, when the one before is written. Returns the digest of the tensors, which
    `tensors_digest()` finds in the file.

    Raises: CheckpointMismatch when a storage has more or fewer bytes than stated.
    """
    digest, entries = 0, list[Entry]()
    for name, record in records(data_pkl, storages):
        size, pieces = (len(record), [record]) if isinstance(record, bytes) else record
        path, offset = f"{FOLDER}/{name}".encode(), sink.size
        sink.write(local_header(path, size, offset))
        crc = done = 0
        for piece in pieces:
            crc = combine(crc, sink.write(piece), len(piece))
            done += len(piece)
        if done != size:
            raise CheckpointMismatch(f"{name} has {done} bytes, expected {size}")
        sink.write(descriptor(size, crc))
        entries.append(Entry(path, offset, size, crc))
        if not isinstance(record, bytes):
            digest = zlib.crc32(crc.to_bytes(4, "little"), digest)
    sink.write(directory(entries, sink.size))
    return f"{digest:08x}"


def records(data_pkl: bytes, storages: Iterable[T]) -> Iterator[tuple[str, bytes | T]]:
    """Name the records of a torch file, in their order."""
    yield "data.pkl", data_pkl
    yield "byteorder", b"little"
    for key, storage in enumerate(storages):
        yield f"data/{key}", storage
    yield "version", b"3\n"


def _directory_entry(entry: Entry) -> bytes:
    wide = [value for value in (entry.size, entry.size, entry.offset) if value >= ZIP64_FROM]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, offset = (min(v, 0xFFFFFFFF) if v < ZIP64_FROM else 0xFFFFFFFF for v in (entry.size, entry.offset))
    version = 45 if entry.size >= ZIP64_FROM else 20
    flags = _DESCRIPTOR_FOLLOWS | _UTF8
    head = (b"PK\1\2", 45, version, flags, 0, 0, _DOS_DATE, entry.crc32, size, size, len(entry.name), len(extra))
    return struct.pack("<4s6H3I5H2I", *head, 0, 0, 0, 0, offset) + entry.name + extra
