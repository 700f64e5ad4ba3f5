"""New files while they are written: a stream of pieces, or blocks of a file whose size is known."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..containers.checksum import combine, crc32

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PIECE = 8 * 1024 * 1024
"""Bytes handed to one write call."""

SECTOR = 4096
"""Offsets, lengths and addresses of unbuffered writes are multiples of this many bytes."""

_NO_PREALLOCATION = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENODEV, errno.EBADF}


class Disk(Protocol):
    """What a file that is written needs of the file system: see storage.py."""

    unbuffered: bool
    preallocation: bool

    def change(self, call: Callable[..., Any], *args: Any) -> Any:
        """Make one system call."""

    def descriptor(self, path: Path) -> int:
        """Open a new file for writing, as its descriptor."""

    def sync_content(self, fd: int) -> None:
        """Make the content of an open file durable."""


def reserve(storage: Disk, fd: int, size: int) -> None:
    """Reserve room for the first `size` bytes of a new file, where the file system can.

    Writes change no metadata then, and a full disk shows before the first one.
    """
    if not storage.preallocation:
        return
    try:
        storage.change(os.posix_fallocate, fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_PREALLOCATION:
            raise
        storage.preallocation = False


class Output:
    """A new file that knows its size and CRC32; closing it makes it durable."""

    def __init__(self, storage: Disk, fd: int) -> None:
        self._storage = storage
        self._fd = fd
        self._pending: list[bytes] = []
        self._pending_size = 0
        self.size = 0
        self.crc32 = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes and return their CRC32; small pieces are gathered into large writes."""
        view = memoryview(data).cast("B")
        crc = 0
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            crc = crc32(piece, crc)
            if len(piece) + self._pending_size < PIECE:
                self._pending.append(bytes(piece))
                self._pending_size += len(piece)
            else:
                self._flush()
                self._write_all(piece)
        self.crc32 = combine(self.crc32, crc, len(view))
        self.size += len(view)
        return crc

    def _flush(self) -> None:
        if self._pending:
            data = memoryview(b"".join(self._pending))
            self._pending, self._pending_size = [], 0
            self._write_all(data)

    def _write_all(self, view: memoryview) -> None:
        while len(view):
            view = view[self._storage.change(os.write, self._fd, view) :]

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                self._storage.sync_content(self._fd)
        finally:
            os.close(self._fd)


class BlockFile:
    """A new file of known size that is written in blocks, past the page cache where it can; closing makes it durable.

    The blocks of 1.5 GB through the page cache would be copied by a core that training needs.
    """

    def __init__(self, storage: Disk, path: Path, size: int) -> None:
        self._storage = storage
        self._size = size
        self._fd = storage.descriptor(path)
        self._end = 0
        try:
            # Asked of the open file: an open with O_DIRECT that is refused may leave the file behind.
            self._unbuffered = storage.unbuffered and size > SECTOR and self._set_unbuffered(True)
            if self._unbuffered:
                reserve(storage, self._fd, size)
        except BaseException:
            os.close(self._fd)
            raise

    def _set_unbuffered(self, wanted: bool) -> bool:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return wanted

    def write(self, block: memoryview, start: int, length: int) -> None:
        """Write the first `length` bytes of a block at byte `start`, a multiple of SECTOR.

        A block is as long as a multiple of SECTOR: unbuffered, whole sectors are written, and the file is cut at the
        end. The block's memory begins at a multiple of SECTOR.
        """
        done = 0
        while done < length:
            whole = -(-length // SECTOR) * SECTOR if self._unbuffered else length
            try:
                done += self._storage.change(os.pwrite, self._fd, block[done:whole], start + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._unbuffered:
                    raise
                # This file system wants larger sectors, or was cut short within one.
                self._unbuffered = self._set_unbuffered(False)
        self._end = max(self._end, start + done)

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self._end > self._size:
                    self._storage.change(os.ftruncate, self._fd, self._size)
                self._storage.sync_content(self._fd)
        finally:
            os.close(self._fd)
