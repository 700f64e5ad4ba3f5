"""Torch zips that lie end to end in one file, as in `.distcp`: open each of them, or find where each begins."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, replace
from typing import BinaryIO, cast

from ...errors import CheckpointDamaged
from ..blocks import read_at
from ..spec import TensorSpec
from .storages import TorchArchive
from .zip import open_torch_zip
from .zip_directory import Record

_EDGE = 1024
"""Bytes at either end of the zip of one tensor that hold all but the tensor: two reads instead of twenty."""

_MOST_LAYOUTS = 8
"""Layouts remembered per length."""

_END = struct.Struct("<4s8xII2x")  # signature, length and start of the directory
_END64 = struct.Struct("<4s36xQQ")  # as _END
_CRC_BEFORE_NAME = 46 - 16  # in an entry of the directory, whose fixed part has 46 bytes


class Items:
    """Opens such zips. Most repeat the layout of an earlier one: then comparing bytes replaces parsing."""

    def __init__(self) -> None:
        self.layouts: dict[int, list[_Layout]] = {}  # by length

    def open(self, file: BinaryIO, offset: int, length: int, where: str) -> TorchArchive:
        """Open the torch zip in these bytes of a file; `where` names file and item, for messages.

        Offsets in its specs and records count from the start of the file.

        For a zip with the layout of an earlier one, only the records that hold tensors are listed.

        Raises: CheckpointDamaged, CheckpointError as `open_torch_zip`.
        """
        window = _Window(file, offset, length, where)
        known = self.layouts.setdefault(length, [])
        for layout in known:
            if (crc := layout.crc_of(window)) is not None:
                like, at = layout.spec, layout.record  # written out: replace() takes three times as long
                spec = TensorSpec(
                    "", like.dtype, like.shape, like.strides, like.offset + offset, like.nbytes, like.storage
                )
                record = Record(at.name, at.offset + offset, at.size, crc)
                return TorchArchive("zip", where, spec, {"": spec}, [], {f"data/{spec.storage}": record})
        found = open_torch_zip(cast(BinaryIO, window), where)
        if len(known) < _MOST_LAYOUTS and (made := _layout(found, window)):
            known.append(made)
        for spec in found.tensors.values():
            spec.offset += offset
        for record in found.records.values():
            record.offset += offset
        return found


class _Window:
    """A part of a file presented as a file of its own, with its two ends read in advance."""

    def __init__(self, file: BinaryIO, start: int, length: int, where: str) -> None:
        self.file, self.start, self.length, self.where = file, start, length, where
        self.position = 0
        self.head = self.tail = read_at(file, start, min(length, 2 * _EDGE), where)
        if length > 2 * _EDGE:
            self.tail = read_at(file, start + length - _EDGE, _EDGE, where)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (self.length if whence == os.SEEK_END else 0)
        return self.position

    def read(self, size: int) -> bytes:
        begin, edge = self.position, self.length - len(self.tail)
        end = self.position = max(min(begin + size, self.length), begin)
        if end <= len(self.head):
            return self.head[begin:end]
        if begin >= edge:
            return self.tail[begin - edge : end - edge]
        return read_at(self.file, self.start + begin, end - begin, self.where)


@dataclass(slots=True, eq=False, repr=False)
class _Layout:
    """The zip of one plain tensor, but for the bytes of the tensor; offsets count from its beginning."""

    head: bytes  # all before the tensor
    directory: bytes  # all bytes after it
    holes: list[int]  # where in `directory` a CRC differs from zip to zip: the tensor's, and that of a random id
    spec: TensorSpec
    record: Record

    def crc_of(self, window: _Window) -> int | None:
        """The CRC of the tensor in a zip of the same length, or None when the zip differs in more."""
        if not window.head.startswith(self.head):
            return None
        found, begin = window.tail[-len(self.directory) :], 0
        for hole in self.holes:
            if found[begin:hole] != self.directory[begin:hole]:
                return None
            begin = hole + 4
        alike = found[begin:] == self.directory[begin:]
        return int.from_bytes(found[self.holes[0] : self.holes[0] + 4], "little") if alike else None


def _layout(archive: TorchArchive, window: _Window) -> _Layout | None:
    """The layout to compare other zips with, if this one holds a plain tensor and its edges cover everything else."""
    spec, records = archive.content, archive.records
    if not isinstance(spec, TensorSpec) or archive.unused:
        return None
    record = records[f"data/{spec.storage}"]
    _, length = _directory(window.tail[-98:])
    directory = window.tail[-length:] if length else b""
    varying = [record, *(records[name] for name in (".data/serialization_id",) if name in records)]
    holes = [directory.find(r.name.encode()) - _CRC_BEFORE_NAME for r in varying]
    told = [int.from_bytes(directory[hole : hole + 4], "little") for hole in holes if hole >= 0]
    whole = len(directory) == length and record.offset <= len(window.head)
    if not whole or holes != sorted(holes) or told != [r.crc32 for r in varying]:
        return None
    return _Layout(window.head[: record.offset], directory, holes, replace(spec), replace(record))


def find_items(file: BinaryIO, where: str) -> list[tuple[int, int]]:
    """Find the offset and length of each zip in a file of zips end to end, from the directory that ends each.

    Raises: CheckpointDamaged when some of its bytes belong to no zip.
    """
    items: list[tuple[int, int]] = []
    end = file.seek(0, os.SEEK_END)
    while end:
        tail = read_at(file, max(end - 98, 0), min(end, 98), where)
        start = end - sum(_directory(tail))
        if start < 0 or start == end or read_at(file, start, 4, where) != b"PK\3\4":
            raise CheckpointDamaged(
                f"{where}: no zip ends at byte {end}; {len(items)} items follow it. It was cut off or overwritten."
            )
        items.append((start, end - start))
        end = start
    return items[::-1]


def _directory(tail: bytes) -> tuple[int, int]:
    """Where the directory of the zip with this end starts, and its length with all that follows; 0 without a zip."""
    if tail[-42:-38] == b"PK\6\7" and tail[-98:-94] == b"PK\6\6":
        _, length, start = _END64.unpack(tail[-98:-42])
        return start, length + 98
    if tail[-22:-18] == b"PK\5\6":
        _, length, start = _END.unpack(tail[-22:])
        return start, length + _END.size
    return 0, 0
