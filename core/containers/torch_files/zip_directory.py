"""The directory of a zip file: what is in it and where, checked against the file's real size.

Only what torch files need of PKWARE's APPNOTE 4.3: one disk, the 64-bit extension, no encryption. Reading it takes the
end of the file, the directory, and the head of each record.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from ...errors import CheckpointDamaged
from ..blocks import read_at
from ..pickles.inert import as_text

_END = struct.Struct("<4sH4xHII2x")  # signature, disk, entries, length and start of the directory
_END64_LOCATOR = struct.Struct("<4s4xQ4x")  # signature, where the 64-bit end record is
_END64 = struct.Struct("<4s12xI12xQQQ")  # as _END
_ENTRY = struct.Struct("<4s4xHH4xIIIHHH4xII")  # signature, flags, method, CRC, 2 sizes, 3 lengths, attributes, head
_FOLDER = 0x10  # among the attributes; torch leaves the memory of what it takes for a folder as it was
_DEFLATED = 8  # a method of compression
_LOCAL = struct.Struct("<4s22xHH")  # signature, two lengths
_STARTS = (b"PK\3\4", b"PK\5\6")  # of a record, and of the end of an empty directory: torch looks at these four bytes
_LONGEST_COMMENT = 0xFFFF
_DESCRIPTOR = 24  # bytes that may follow a record: its checksum and sizes again, in the 64-bit form


@dataclass(slots=True)
class Record:
    """One file in the zip; `offset` is that of its first byte, and a `crc32` of 0 means that none was recorded."""

    name: str
    offset: int
    size: int
    crc32: int
    stored: bool = True  # False: compressed, as torch does with code, and whoever zips an unpacked file again
    inflated: int = -1  # bytes of a deflated one before it was compressed

    @property
    def checksum(self) -> int | None:
        """The CRC32 of its bytes in the file; None where none was recorded: that of nothing is 0."""
        return self.crc32 or (None if self.size else 0) if self.stored else None


def read_head(file: BinaryIO, offset: int, where: str) -> tuple[bytes, int]:
    """Read the head of the record at `offset`: its name, and where its bytes begin.

    Raises: CheckpointDamaged when there is none.
    """
    sig, name_length, extra_length = _LOCAL.unpack(read_at(file, offset, _LOCAL.size, where))
    if sig != b"PK\3\4":
        raise CheckpointDamaged(f"{where}: no record at byte {offset}, where its directory places one.")
    name = read_at(file, offset + _LOCAL.size, name_length, where)
    return name, offset + _LOCAL.size + name_length + extra_length


Explain = Callable[[BinaryIO, int, str], str]
"""Describes what else is known about a file of this many bytes that was cut off."""


def _find_directory(file: BinaryIO, where: str, explain: Explain) -> tuple[int, int, int, int]:
    """Return where the directory starts, its length, its entries, and how many bytes after it belong to nothing."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        raise CheckpointDamaged(f"{where}: empty (0 bytes), a zip has at least {_END.size}.")
    head = read_at(file, 0, min(size, 4), where)
    if not any(start.startswith(head) for start in _STARTS):
        raise CheckpointDamaged(f"{where}: not a torch zip file: it begins with {as_text(head)}, a zip with b'PK'.")
    tail = b""
    at = -1
    for length in (_END.size, _END.size + _LONGEST_COMMENT):  # torch writes no comment: the first look finds it
        tail = read_at(file, max(size - length, 0), min(size, length), where)
        at = tail.rfind(b"PK\5\6", 0, max(len(tail) - _END.size + 4, 0))
        if at >= 0:
            break
    if at < 0:
        raise CheckpointDamaged(
            f"{where}: cut off after {size} bytes: the directory that ends every zip is missing."
            f"{explain(file, size, where)}"
        )
    end = max(size - len(tail), 0) + at
    loose = size - end - _END.size - int.from_bytes(tail[at + _END.size - 2 : at + _END.size], "little")
    _, disk, count, length, start = _END.unpack_from(tail, at)
    if end >= _END64_LOCATOR.size:
        locator = _END64_LOCATOR.unpack(read_at(file, end - _END64_LOCATOR.size, _END64_LOCATOR.size, where))
        if locator[0] == b"PK\6\7":
            end = locator[1]
            if end > size - _END64.size:
                raise CheckpointDamaged(f"{where}: its directory ends at byte {end}, the file at {size}.")
            sig, disk, count, length, start = _END64.unpack(read_at(file, end, _END64.size, where))
            if sig != b"PK\6\6":
                raise CheckpointDamaged(f"{where}: no 64-bit directory record at byte {end}.")
    if disk or start + length > end or count * _ENTRY.size > length:
        raise CheckpointDamaged(
            f"{where}: its directory of {count} records claims bytes {start} to {start + length}; it must end by {end} "
            f"(the file has {size} bytes)."
        )
    return start, length, count, max(loose, 0) + end - start - length


def read_directory(file: BinaryIO, where: str, explain: Explain) -> tuple[dict[str, Record], int]:
    """List the records of a zip by name, without the common folder, and count the bytes that belong to no record.

    Raises: CheckpointDamaged when it is cut off, contradicts itself, or is another kind of file.
    """
    start, length, count, loose = _find_directory(file, where, explain)
    data = read_at(file, start, length, where)
    entries: list[tuple[int, str, int, int, bool, int]] = []
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > length:
            raise CheckpointDamaged(f"{where}: its directory ends after {len(entries)} of {count} records.")
        fields = _ENTRY.unpack_from(data, position)
        sig, flags, method, crc, packed, size, name_length, extra_length, comment_length, attributes, offset = fields
        name_end = position + _ENTRY.size + name_length
        extra = data[name_end : name_end + extra_length]
        raw_name = data[position + _ENTRY.size : name_end]
        position = name_end + extra_length + comment_length
        if sig != b"PK\1\2" or position > length:
            raise CheckpointDamaged(f"{where}: entry {len(entries)} of {count} in its directory is damaged.")
        size, packed, offset = _wide(extra, (size, packed, offset))
        name = _decode(raw_name, where)
        if flags & 1:
            raise CheckpointDamaged(f"{where}: {as_text(name)} is encrypted; torch cannot have written it.")
        if packed and (attributes & _FOLDER or name.endswith("/")):
            raise CheckpointDamaged(f"{where}: {as_text(name)} is a folder with {packed} bytes.")
        if method == 0 and packed != size:
            raise CheckpointDamaged(f"{where}: {as_text(name)} has {packed} bytes and claims {size}.")
        entries.append((offset, name, packed, crc, method == 0, size if method == _DEFLATED else -1))
    records, between = _locate(file, entries, start, where)
    return records, loose + between + length - position


def _wide(extra: bytes, narrow: tuple[int, int, int]) -> list[int]:
    """Replace the 32-bit fields that say "see the 64-bit ones" by these (APPNOTE 4.5.3)."""
    values = list(narrow)
    if 0xFFFFFFFF not in values:
        return values
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if kind == 1:
            count = min(length, len(extra) - position) // 8
            wide = iter(struct.unpack_from(f"<{count}Q", extra, position))
            return [next(wide, value) if value == 0xFFFFFFFF else value for value in values]
        position += length
    return values


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointDamaged(f"{where}: a record is called {as_text(raw)}, which is not UTF-8.") from error


def _locate(
    file: BinaryIO, entries: list[tuple[int, str, int, int, bool, int]], directory: int, where: str
) -> tuple[dict[str, Record], int]:
    """Find where the bytes of each record begin, refuse overlaps and unclear names, and count what lies between."""
    records: dict[str, Record] = {}
    named: dict[str, str] = {}  # as torch compares names
    loose = 0
    folder = entries[0][1].partition("/")[0] + "/" if entries else ""
    following = directory
    for offset, name, size, crc, stored, inflated in sorted(entries, reverse=True):
        shown = as_text(name)
        if not name.startswith(folder):
            raise CheckpointDamaged(f"{where}: holds {as_text(folder)} and {shown}; a torch file is one folder.")
        short = name[len(folder) :]
        if fault := _unclear(name, named.setdefault(short.lower(), name) if short not in records else ""):
            raise CheckpointDamaged(f"{where}: {fault}")
        if offset >= following:
            raise CheckpointDamaged(f"{where}: {shown} begins at byte {offset}, and the next part at {following}.")
        own_name, begin = read_head(file, offset, where)
        if own_name != name.encode():
            raise CheckpointDamaged(f"{where}: {shown} calls itself {as_text(own_name)} at byte {offset}.")
        if begin + size > following:
            raise CheckpointDamaged(
                f"{where}: {shown} claims {size} bytes from byte {begin}, and the next part begins at {following}."
            )
        gap = following - begin - size
        loose += gap if gap > _DESCRIPTOR else 0
        following = offset
        records[short] = Record(name, begin, size, crc, stored, inflated)
    return dict(reversed(records.items())), loose + following


def _unclear(name: str, first: str) -> str:
    """Say why readers could take a record for another one; `first` has the name that torch gives it, or is "".

    Torch ignores the case of names and ends them at a NUL; other programs unpack records into folders.
    """
    shown = as_text(name)
    if not first:
        return f"two records are called {shown}."
    read, nul, _ = name.partition("\0")
    if nul:
        return f"a record is called {shown}, which torch reads as {as_text(read)}."
    if first != name:
        return f"its records {as_text(first)} and {shown} have one name for torch, which ignores case."
    if ".." in name.replace("\\", "/").split("/"):
        return f"a record is called {shown}, which leads out of the archive's folder {as_text(name.partition('/')[0])}."
    return ""
