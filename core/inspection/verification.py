"""Compare the bytes of a checkpoint with their recorded checksums: no torch, no weights in memory."""

from __future__ import annotations

import bisect
import itertools
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..console.words import listed_names, size_text
from ..containers import checksum
from ..containers.container import Check, Container
from ..containers.pickles.inert import as_text
from ..errors import CheckpointDamaged, CheckpointNotFound

_PIECE = 4 << 20
"""Bytes of which a thread computes the checksum at a time."""

_BATCH = 32
"""Pieces submitted at a time: waiting pieces take memory, and are still read after an interrupt."""

_MOST_NAMED = 3
_MOST_WORKERS = 8

Span = tuple[int, int]
Progress = Callable[[int], object]


@dataclass
class Verification:
    """The findings; the lists have sentences for people, in the order of the files."""

    damaged: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)  # files that are whole, but not those that were saved
    unrecorded: list[str] = field(default_factory=list)  # parts without a recorded checksum
    notes: list[str] = field(default_factory=list)
    checked_bytes: int = 0
    seconds: float = 0.0


def verify_container(
    container: Container, progress: Progress = lambda size: None, used: Collection[str] | None = None
) -> Verification:
    """Read each byte that has a recorded checksum once, and report differences.

    A check of a whole file has only the name of the file. `progress` receives the number of bytes read. With `used`,
    the names of some tensors, bytes that belong to other tensors alone are not read.
    """
    begin = time.monotonic()
    found = Verification()
    found.notes.append(
        f"{container.path}: {container.kind}; the names, types, shapes and places of its {len(container.tensors)} "
        f"tensors fit the lengths of its {len(container.files)} file{'s' * (len(container.files) != 1)}."
    )
    by_file: dict[str, list[Check]] = {name: [] for name in container.files}
    unused = set() if used is None else container.tensors.keys() - set(used)
    for check in container.checks:
        if not unused or not unused.issuperset(check.names):
            by_file.setdefault(check.file, []).append(check)
    workers = min(os.cpu_count() or 1, _MOST_WORKERS) if checksum.POSITIONED_READS else 1
    with ThreadPoolExecutor(workers) as pool:
        for name, checks in by_file.items():
            _File(container, name, checks, found).verify(pool, progress)
    found.seconds = time.monotonic() - begin
    return found


class _File:
    """One file while it is verified."""

    def __init__(self, container: Container, name: str, checks: list[Check], found: Verification) -> None:
        self.container, self.name, self.found = container, name, found
        self.where = container.path if name == container.path.name else container.path / name
        ordered = sorted(checks, key=lambda check: (check.offset, -check.size))  # nested checks come later
        self.recorded = [check for check in ordered if check.crc32 is not None and check.size]
        self.unrecorded = [check for check in ordered if check.crc32 is None and check.size]

    def verify(self, pool: ThreadPoolExecutor, progress: Progress) -> None:
        """Compare all its checks, and report bytes without one."""
        self.list_unrecorded()
        try:
            with self.container.open(self.name) as file:
                before = os.fstat(file.fileno())
                expected = self.container.files.get(self.name, before.st_size)
                if before.st_size != expected:
                    self.found.damaged.append(
                        f"{self.where}: has {before.st_size} bytes, {expected} when it was opened. It was changed "
                        "since; verify it again."
                    )
                    return
                sums = _Sums(file.fileno())
                spans = [(check.offset, check.offset + check.size) for check in self.recorded]
                for size in sums.read([span for span in spans if span[1] <= expected], pool):
                    self.found.checked_bytes += size
                    progress(size)
                after = os.fstat(file.fileno())
        except CheckpointNotFound as error:
            self.found.damaged.append(f"{error} It was there when the checkpoint was opened.")
            return
        except CheckpointDamaged as error:  # of what cannot be unpacked
            self.found.damaged.append(str(error))
            return
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            self.found.damaged.append(f"{self.where}: was changed while it was read; verify it again.")
            return
        self.list_faults(sums, after.st_size)

    def list_faults(self, sums: _Sums, size: int) -> None:
        """Report differences; for a file that differs, also those of its records."""
        faults = [self.fault(check, sums, size) for check in self.recorded]
        offsets = [check.offset for check in self.recorded]
        for i, (check, fault) in enumerate(zip(self.recorded, faults, strict=True)):
            if not fault:
                continue
            end = check.offset + check.size
            within = faults[i + 1 : bisect.bisect_left(offsets, end, i + 1)]
            if any(within):
                continue
            if within and not sums.unread(check.offset, end):
                self.found.replaced.append(
                    f"{self.where}: every record in it is whole, but it is not the file that was saved ({fault}). It "
                    "was replaced, or changed between its records."
                )
            elif not within and self.container.proves_itself(check.file):
                self.found.replaced.append(
                    f"{self.where}: whole, but it is not the file that was saved ({fault}). It was replaced."
                )
            else:
                self.found.damaged.append(f"{self.where}: {_some(check.names)} is damaged ({fault}).")

    def fault(self, check: Check, sums: _Sums, size: int) -> str:
        """What is wrong with the bytes of a check; "" when nothing is."""
        end = check.offset + check.size
        whole = check.offset == 0 and check.names == (check.file,)
        if end > size or (whole and end != size):
            return f"ends at byte {size}, its checksum was recorded for bytes up to {end}"
        if error := sums.unread(check.offset, end):
            return error
        crc = sums.crc32(check.offset, end)
        return "" if crc == check.crc32 else f"CRC32 {crc:08x}, recorded {check.crc32:08x}"

    def list_unrecorded(self) -> None:
        """Say which of its bytes no checksum covers."""
        offsets = [check.offset for check in self.recorded]
        ends = list(itertools.accumulate((check.offset + check.size for check in self.recorded), max))
        left = []
        for check in self.unrecorded:
            before = bisect.bisect_right(offsets, check.offset)
            if not before or ends[before - 1] < check.offset + check.size:
                left.append(check)
        if left:
            names = dict.fromkeys(name for check in left for name in check.names)
            size = size_text(sum(check.size for check in left))
            self.found.unrecorded.append(f"{self.where}: {size} without a checksum: {_some(names)}.")
        elif not self.recorded and not self.unrecorded:
            self.found.unrecorded.append(f"{self.where}: without a checksum.")


class _Sums:
    """CRC32 of any of the spans of a file that were read, each byte once: from the sums up to each of their edges."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.before: dict[int, int] = {}  # CRC32 of all that was read without a gap before an edge
        self.errors: list[tuple[int, int, str]] = []  # from where to where, and why, in their order

    def read(self, spans: list[Span], pool: ThreadPoolExecutor) -> Iterator[int]:
        """Read these spans, and give the size of each piece that was read."""
        tasks = _tasks(_pieces(spans))
        crc = position = 0
        while batch := list(itertools.islice(tasks, _BATCH)):
            for task, sums in zip(batch, pool.map(self.sum, batch), strict=True):
                for (start, end), found in zip(task, sums, strict=True):
                    crc = 0 if start != position else crc
                    self.before[start] = crc
                    if isinstance(found, str):
                        self.errors.append((start, end, found))
                    else:
                        crc = checksum.combine(crc, found, end - start) if crc else found
                    self.before[end], position = crc, end
                yield sum(end - start for start, end in task)

    def sum(self, task: list[Span]) -> list[int | str]:
        """CRC32 of each piece, or why it cannot be read."""
        found: list[int | str] = []
        for start, end in task:
            try:
                found.append(checksum.crc32_range(self.descriptor, start, end))
            except OSError as error:
                found.append(f"bytes {start} to {end} cannot be read: {error.strerror}")
        return found

    def crc32(self, start: int, end: int) -> int:
        """CRC32 of a span that was read."""
        if start == end:
            return 0
        first, last = self.before[start], self.before[end]
        # joining A and B is linear, f(A) ^ B, so that it gives B for A and the two joined
        return checksum.combine(first, last, end - start) if first else last

    def unread(self, start: int, end: int) -> str:
        """Why a span could not be read; "" when it was."""
        i = bisect.bisect_right(self.errors, start, key=lambda error: error[1])
        return self.errors[i][2] if i < len(self.errors) and self.errors[i][0] < end else ""


def _pieces(spans: Iterable[Span]) -> Iterator[Span]:
    """Cut what is in any of the spans into pieces that end where a span begins or ends."""
    edges: dict[int, int] = {}  # how many more spans there are from here on
    for start, end in spans:
        edges[start] = edges.get(start, 0) + 1
        edges[end] = edges.get(end, 0) - 1
    depth = 0
    for (start, change), (end, _) in itertools.pairwise(sorted(edges.items())):
        depth += change
        if depth:
            for first in range(start, end, _PIECE):
                yield first, min(first + _PIECE, end)


def _tasks(pieces: Iterable[Span]) -> Iterator[list[Span]]:
    """Gather pieces until they are worth a thread's while."""
    task: list[Span] = []
    size = 0
    for start, end in pieces:
        task.append((start, end))
        size += end - start
        if size >= _PIECE:
            yield task
            task, size = [], 0
    if task:
        yield task


def _some(names: Iterable[str]) -> str:
    return listed_names(list(names), _MOST_NAMED, show=lambda name: as_text(name, 120)[1:-1])
