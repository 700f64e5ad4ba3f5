"""CRC32 of files, and of concatenated pieces without reading them again."""

from __future__ import annotations

import functools
import itertools
import os
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

POLYNOMIAL = 0xEDB88320
"""CRC-32 of zip and gzip, bits reflected: the highest bit stands for x^0."""

THREADS = min(os.cpu_count() or 1, 4)
"""Most threads that read or copy: more would wait for memory and disk, not for a processor."""

CHUNK = 256 * 1024
"""Bytes read at a time: small enough to stay in a core's L2 cache between the read and the checksum."""

POSITIONED_READS = hasattr(os, "preadv")
"""Off (Windows, tests): one thread that seeks and reads."""


LARGE = 64 * 1024
"""Bytes from which a faster library is worth its import."""


@functools.cache
def _fastest() -> Callable[[ReadableBuffer, int], int]:
    """CRC32 of zlib-ng where it is installed (the extra `fast`), which has the same values, or else of zlib."""
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        return zlib.crc32
    return zlib_ng.crc32


def crc32(data: ReadableBuffer, before: int = 0) -> int:
    """CRC32 of `data` after bytes whose CRC32 is `before`; every sum of a tensor or file is made here."""
    return (zlib.crc32 if memoryview(data).nbytes < LARGE else _fastest())(data, before)


def _multiply(a: int, b: int) -> int:
    """Multiply two polynomials over GF(2), modulo the CRC polynomial."""
    product = 0
    for shift in range(31, -1, -1):
        if a >> shift & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


@functools.cache
def _power(exponent: int) -> int:
    """x to the power 2**exponent, modulo the CRC polynomial."""
    return 1 << 30 if exponent == 0 else _multiply(_power(exponent - 1), _power(exponent - 1))


@functools.lru_cache(maxsize=1024)
def _shift(length: int) -> int:
    """The factor that moves a CRC in front of `length` more bytes: x**(8 * length)."""
    factor, bit = 1 << 31, 3
    while length:
        if length & 1:
            factor = _multiply(_power(bit), factor)
        length, bit = length >> 1, bit + 1
    return factor


def combine(first: int, second: int, second_length: int) -> int:
    """CRC32 of two concatenated pieces, from the CRC32 of each and the length of the second in bytes.

    The method is Mark Adler's crc32_combine in zlib's crc32.c.
    """
    return _multiply(_shift(second_length), first) ^ second


def flipped_bit(data: bytes, expected: int) -> tuple[int, int] | None:
    """The byte and the bit that alone make data differ from data of a CRC32; None where more than one bit does."""
    difference, bit = zlib.crc32(data) ^ expected, POLYNOMIAL  # what the highest bit of the last byte changes
    for number in range(8 * len(data)):
        if bit == difference:
            return len(data) - 1 - number // 8, 7 - number % 8
        bit = bit >> 1 ^ (POLYNOMIAL if bit & 1 else 0)
    return None


def read_into(fd: int, buffer: memoryview, position: int) -> int:
    """Read from a position of an open file into a buffer; returns the number of bytes read, 0 at its end."""
    if POSITIONED_READS:
        return os.preadv(fd, [buffer], position)
    os.lseek(fd, position, os.SEEK_SET)
    data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def crc32_range(fd: int, start: int, end: int) -> int:
    """CRC32 of the bytes from `start` up to `end` of an open file, or up to the end of a shorter file."""
    buffer = memoryview(bytearray(min(CHUNK, max(end - start, 1))))
    crc, position = 0, start
    while position < end:
        count = read_into(fd, buffer[: end - position], position)
        if not count:
            break
        crc = crc32(buffer[:count], crc)
        position += count
    return crc


def crc32_file(fd: int, size: int) -> int:
    """CRC32 of an open file of `size` bytes, on all processors."""
    workers = max(1, min(os.cpu_count() or 1, 8, size // (16 * CHUNK))) if POSITIONED_READS else 1
    edges = [size * i // workers for i in range(workers + 1)]
    spans = list(itertools.pairwise(edges))
    if workers == 1:
        return crc32_range(fd, 0, size)
    try:
        from concurrent.futures import ThreadPoolExecutor  # takes as long to import as a small file to read

        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(lambda span: crc32_range(fd, *span), spans))
    except RuntimeError:  # no thread can be started: the interpreter is ending, or the system refuses
        return crc32_range(fd, 0, size)
    whole = 0
    for crc, (start, end) in zip(parts, spans, strict=True):
        whole = combine(whole, crc, end - start)
    return whole
