"""Hostile bytes put together by hand: pickles opcode by opcode, zips field by field. Nothing here imports torch."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COMMAND = "touch executed"
"""What every payload would run: a marker file in the working folder."""

CALLED = f'posix.system("{COMMAND}")'
"""How the report shows it."""

MAGIC = 0x1950A86A20F9469CFC6C


def text(value: str) -> bytes:
    """A text of a pickle."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """A whole number of a pickle."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    """A class or function of a pickle."""
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *args: bytes) -> bytes:
    """A call of a function, by REDUCE."""
    return name(module, attribute) + b"(" + b"".join(args) + b"tR"


def items(**values: bytes) -> bytes:
    """A dictionary."""
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


SYSTEM = name("posix", "system")
RUN = call("posix", "system", text(COMMAND))


def storage(key: str, numel: int, kind: str = "FloatStorage") -> bytes:
    """A reference to a storage, as zips of torch have it."""
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(numel) + b"tQ"


def numbers(values: Sequence[int]) -> bytes:
    """A tuple of whole numbers."""
    return b"(" + b"".join(number(value) for value in values) + b"t"


def tensor(
    key: str = "0",
    numel: int = 4,
    shape: Sequence[int] = (2, 2),
    strides: Sequence[int] = (2, 1),
    offset: int = 0,
    hooks: bytes = b"ccollections\nOrderedDict\n)R",
) -> bytes:
    """A tensor of float32, as torch writes it."""
    return call(
        *("torch._utils", "_rebuild_tensor_v2"),
        *(storage(key, numel), number(offset), numbers(shape), numbers(strides), b"\x89", hooks),
    )


@dataclass
class Record:
    """One file of a zip, and what its headers are to say of it where that is not the truth."""

    name: str
    data: bytes = b""
    stored: bool = True
    local_name: str | None = None
    crc: int | None = None
    packed: int | None = None
    size: int | None = None
    offset: int | None = None
    flags: int = 0
    attributes: int = 0
    extra: bytes = b""
    gap: bytes = b""  # bytes before it that belong to nothing
    hidden: bool = False  # not in the directory


def zipped(
    records: Sequence[Record],
    prefix: bytes = b"",
    before_directory: bytes = b"",
    suffix: bytes = b"",
    count: int | None = None,
    directory: int | None = None,
    length: int | None = None,
    base: int = 0,
) -> bytes:
    """A zip of these records; offsets count from `base` before its first byte."""
    out, entries = bytearray(prefix), []
    for record in records:
        out += record.gap
        compress = zlib.compressobj(9, zlib.DEFLATED, -15)
        data = record.data if record.stored else compress.compress(record.data) + compress.flush()
        crc = zlib.crc32(record.data) if record.crc is None else record.crc
        packed = len(data) if record.packed is None else record.packed
        size = len(record.data) if record.size is None else record.size
        method, offset = 0 if record.stored else 8, base + len(out) if record.offset is None else record.offset
        raw = record.name.encode("utf-8", "surrogateescape")
        own = raw if record.local_name is None else record.local_name.encode()
        out += struct.pack("<4sHHHIIIIHH", b"PK\3\4", 0, 0, method, 0, crc, packed, size, len(own), 0) + own + data
        if not record.hidden:
            entry = (
                b"PK\1\2",
                0,
                0,
                record.flags,
                method,
                0,
                crc,
                packed,
                size,
                len(raw),
                len(record.extra),
                0,
                0,
                0,
                record.attributes,
                offset,
            )
            entries.append(struct.pack("<4sHHHHIIIIHHHHHII", *entry) + raw + record.extra)
    out += before_directory
    start = base + len(out) if directory is None else directory
    out += b"".join(entries)
    said = sum(map(len, entries)) if length is None else length
    number_of = len(entries) if count is None else count
    return (
        bytes(out) + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, number_of & 0xFFFF, number_of, said, start, 0) + suffix
    )


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def torch_records(pickle: bytes, storages: dict[str, bytes] | None = None, **changes: Any) -> list[Record]:
    """The records of a zip of torch; `changes` are fields of the one of data.pkl."""
    parts = [Record("x/data.pkl", pickle, **changes), Record("x/byteorder", b"little")]
    parts += [Record(f"x/data/{key}", data) for key, data in (storages or {}).items()]
    return [*parts, Record("x/version", b"3\n")]


def torch_zip(pickle: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A whole zip of torch around a pickle."""
    return zipped(torch_records(pickle, storages))


def torch_stream(pickle: bytes, keys: bytes = b"].", tail: bytes = b"") -> bytes:
    """A whole stream of torch around a pickle."""
    system = items(protocol_version=number(1001), little_endian=b"\x88", type_sizes=b"}")
    return (
        b"\x80\x02" + number(MAGIC) + b".\x80\x02" + number(1001) + b".\x80\x02" + system + b"." + pickle + keys + tail
    )


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors file; a header that is not bytes is written as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


METADATA = "torch.distributed.checkpoint.metadata"


def record(module: str, attribute: str, **state: bytes) -> bytes:
    """An object with attributes."""
    return name(module, attribute) + b")\x81" + items(**state) + b"b"


def pairs(*values: tuple[bytes, bytes]) -> bytes:
    """A dictionary whose keys are no texts."""
    return b"}(" + b"".join(key + value for key, value in values) + b"u"


def index(fqn: str, begin: Sequence[int] | None = None) -> bytes:
    """A key of storage_data."""
    return record(
        METADATA, "MetadataIndex", fqn=text(fqn), offset=b"N" if begin is None else numbers(begin), index=b"N"
    )


def place(file: str, offset: int, length: int) -> bytes:
    """A value of storage_data."""
    where = "torch.distributed.checkpoint.filesystem"
    return record(where, "_StorageInfo", relative_path=text(file), offset=number(offset), length=number(length))


def blocks(shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bytes:
    """What .metadata says of a tensor."""
    chunks = (
        b"]("
        + b"".join(
            record(METADATA, "ChunkStorageMetadata", offsets=numbers(begin), sizes=numbers(size))
            for begin, size in boxes
        )
        + b"e"
    )
    layout = call("torch.serialization", "_get_layout", text("torch.strided"))
    state = b"(" + name("torch", "float32") + layout + b"\x89" + number(0) + b"\x89t"
    properties = name(METADATA, "TensorProperties") + b")\x81" + state + b"b"
    return record(METADATA, "TensorStorageMetadata", properties=properties, size=numbers(shape), chunks=chunks)


def metadata(tensors: dict[str, bytes], places: Sequence[tuple[bytes, bytes]], planner: bytes = b"}") -> bytes:
    """A whole .metadata."""
    says = items(**tensors)
    return b"\x80\x02" + record(METADATA, "Metadata", state_dict_metadata=says, planner_data=planner,
                                storage_data=pairs(*places)) + b"."  # fmt: skip
