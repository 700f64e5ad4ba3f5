"""A torch file before it is written: where each byte will lie, known from the sizes of its records alone.

The file is made in blocks of any size. The caller copies the content of a record into a block, and sums it; `Seal`
fills in the rest, checksums included, as the pieces pass in order.
"""

from __future__ import annotations

import bisect
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from ..checksum import combine, crc32
from .layout import FOLDER, Entry, descriptor, directory, local_header


class Kind(Enum):
    """The kinds of segments of the file."""

    HEADER = "header"
    PLAIN = "plain"  # a record whose bytes are known now
    STORAGE = "storage"  # a record whose bytes are copied in
    DESCRIPTOR = "descriptor"  # the checksum of the record before it
    DIRECTORY = "directory"


RECORDS = (Kind.PLAIN, Kind.STORAGE)
"""The state before a file is sealed."""


@dataclass(frozen=True)
class Segment:
    """A span of the file."""

    start: int
    size: int
    kind: Kind
    content: Any = None


class Piece(NamedTuple):
    """A part of a segment that lies in a block: bytes `low` to `high` of the segment, from `at` on in the block."""

    segment: Segment
    low: int
    high: int
    at: int


class Image:
    """The layout of a torch file with these records, in order: bytes, or something that is as long as its bytes.

    Several lists of records make torch files end to end, as in a DCP file; `spans` has the span of each.
    """

    def __init__(self, *files: Sequence[tuple[str, Any]]) -> None:
        self.segments: list[Segment] = []
        self.entries: list[Entry] = []
        self.spans: list[tuple[int, int]] = []
        self.size = 0
        for records in files:
            self._add_file(records)
        self._starts = [segment.start for segment in self.segments]

    @property
    def first(self) -> bytes:
        """The first record of the first file, `data.pkl`."""
        return self.segments[1].content

    def _add_file(self, records: Sequence[tuple[str, Any]]) -> None:
        begin, entries = self.size, []
        for name, content in records:
            path = f"{FOLDER}/{name}".encode()
            plain, size = isinstance(content, bytes), len(content)
            entries.append(Entry(path, self.size - begin, size, 0))
            header = local_header(path, size, self.size - begin)
            self._add(len(header), Kind.HEADER, header)
            self._add(size, Kind.PLAIN if plain else Kind.STORAGE, content)
            self._add(len(descriptor(size, 0)), Kind.DESCRIPTOR)
        self._add(len(directory(entries, self.size - begin)), Kind.DIRECTORY, begin)
        self.entries += entries
        self.spans.append((begin, self.size - begin))

    def _add(self, size: int, kind: Kind, content: Any = None) -> None:
        if size:
            self.segments.append(Segment(self.size, size, kind, content))
        self.size += size

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Cut the bytes `start` to `end` of the file into pieces of its segments."""
        for i in range(bisect.bisect_right(self._starts, start) - 1, len(self.segments)):
            segment = self.segments[i]
            if segment.start >= end:
                return
            low = max(start - segment.start, 0)
            yield Piece(segment, low, min(end - segment.start, segment.size), segment.start + low - start)


class Seal:
    """Completes the pieces of an image as they pass in order, and knows the checksums of the whole at the end."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.crc32 = 0
        """CRC32 of the bytes that have passed."""
        self._tensors = 0
        self._record = 0
        self._passed = 0
        self._entries: list[Entry] = []
        """Checksums of the torch file that is passing."""
        self._late = b""

    @property
    def recorded(self) -> dict[str, Any]:
        """The entry of the training state for the file, once all of it has passed."""
        return {"size": self.image.size, "crc32": f"{self.crc32:08x}", "tensors": f"{self._tensors:08x}"}

    def seal(self, piece: Piece, block: memoryview, crc: int) -> None:
        """Complete a piece of a block; the content of a record is already there, and `crc` is its CRC32."""
        segment, low, high, at = piece
        if segment.kind in RECORDS:
            self._record = combine(self._record, crc, high - low)
            return
        if low == 0:
            self._late = self._content_of(segment)
        view = block[at : at + high - low]
        view[:] = self._late[low:high]
        self.crc32 = crc32(view, self.crc32)

    def _content_of(self, segment: Segment) -> bytes:
        if segment.kind is Kind.HEADER:
            return segment.content
        if segment.kind is Kind.DIRECTORY:
            entries, self._entries = self._entries, []
            return directory(entries, segment.start - segment.content)
        entry = self.image.entries[self._passed]
        self._passed += 1
        crc, self._record = self._record, 0
        self.crc32 = combine(self.crc32, crc, entry.size)
        if b"/data/" in entry.name:
            self._tensors = zlib.crc32(struct.pack("<I", crc), self._tensors)
        self._entries.append(Entry(entry.name, entry.offset, entry.size, crc))
        return descriptor(entry.size, crc)
