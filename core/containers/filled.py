"""A file in memory of the process: read once, on all processors, and summed while each piece is in a core's cache."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .checksum import CHUNK, POSITIONED_READS, combine, crc32, read_into
from .free_memory import free_memory

_SHARE = 64 * CHUNK
"""Bytes that a thread reads at a time, about: few enough that all threads end together."""

_Piece = tuple[int, int, int]
"""The start of a span, and the start and end of a part of it."""


@dataclass(frozen=True)
class Filled:
    """The bytes of a file in private memory, each at its own place, and their checksums."""

    memory: mmap.mmap
    crc32: int  # of the whole file
    sums: dict[tuple[int, int], int]  # CRC32 of spans, by their start and end


def fill(fd: int, size: int, spans: Iterable[tuple[int, int]]) -> Filled | None:
    """Read an open file of `size` bytes into memory, with a CRC32 of each of these `spans`, which do not overlap.

    None where that cannot be: without positioned reads or threads, for a file that is shorter by now, and for one of
    more than half of the memory that is free, as far as that is known. What maps the file instead says why.
    """
    if not POSITIONED_READS or not 0 < size <= free_memory() // 2:
        return None
    edges = sorted({0, size, *itertools.chain.from_iterable(spans)})
    try:
        from concurrent.futures import ThreadPoolExecutor  # takes as long to import as a small file to read

        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        shares = list(_shares(itertools.pairwise(edges)))
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            crcs = list(itertools.chain.from_iterable(pool.map(lambda share: _read(fd, memory, share), shares)))
    except (OSError, RuntimeError, EOFError):
        return None
    joined = dict.fromkeys(edges[:-1], 0)
    for (span, start, end), crc in zip(itertools.chain.from_iterable(shares), crcs, strict=True):
        joined[span] = combine(joined[span], crc, end - start)
    whole = 0
    for start, end in itertools.pairwise(edges):
        whole = combine(whole, joined[start], end - start)
    return Filled(memory, whole, {span: joined[span[0]] for span in itertools.pairwise(edges)})


def _shares(spans: Iterable[tuple[int, int]]) -> Iterator[list[_Piece]]:
    """Divide spans among threads: a long one in several shares, short ones together in one."""
    share: list[_Piece] = []
    room = _SHARE
    for span, end in spans:
        for start in range(span, end, _SHARE):
            share.append((span, start, min(start + _SHARE, end)))
            room -= share[-1][2] - start
            if room <= 0:
                yield share
                share, room = [], _SHARE
    if share:
        yield share


def _read(fd: int, memory: mmap.mmap, share: Iterable[_Piece]) -> list[int]:
    """Read pieces of a file to their places in memory, and return the CRC32 of each.

    Raises: EOFError where the file has ended.
    """
    view, crcs = memoryview(memory), []
    for _, position, end in share:
        crc = 0
        while position < end:
            count = read_into(fd, view[position : min(position + CHUNK, end)], position)
            if not count:
                raise EOFError
            crc = crc32(view[position : position + count], crc)
            position += count
        crcs.append(crc)
    return crcs
