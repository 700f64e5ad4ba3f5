"""Open the files that people and checkpoints name: regular ones only, so that nothing waits, and no device is read."""

from __future__ import annotations

import errno
import functools
import os
import stat
from io import FileIO
from pathlib import Path

LARGEST = 64 * 2**20
"""Bytes of the largest file that is read whole: settings, vocabularies and manifests."""

_MADE_UP = ("/proc", "/sys")
"""Where the system makes up the content of files while they are read; they count as regular."""


class Irregular(OSError):
    """A name that leads to something else than a file on a disk; `strerror` says to what."""


def open_regular(path: Path) -> FileIO:
    """Open a file for reading, unbuffered; a link is followed.

    Raises: Irregular for a pipe, whose writer would be waited for, a device, and a file of /proc or /sys; OSError for
        what cannot be opened, a folder and a name that no file can have among it.
    """
    try:
        return open(path, "rb", buffering=0, opener=_open)
    except ValueError as error:
        raise OSError(errno.EINVAL, "a name that no file can have", str(path)) from error


def read_regular(path: Path, most: int = LARGEST) -> bytes:
    """Read a whole file of at most `most` bytes.

    Raises: as `open_regular`; Irregular for a larger file.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise Irregular(errno.EFBIG, f"a file of {size:,} bytes, of which at most {most:,} are read", str(path))
        return file.read(size)


def _open(path: str, flags: int) -> int:
    """Open as `open` does, and look at what was opened: the name may lead elsewhere a moment later."""
    _refuse(Path(path).stat(), path)  # to open a device can be an action of its own
    fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    try:
        _refuse(os.fstat(fd), path)
    except OSError:
        os.close(fd)
        raise
    return fd


def _refuse(found: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(found.st_mode):
        return  # which `open` refuses in its own words
    if not stat.S_ISREG(found.st_mode):
        raise Irregular(errno.EINVAL, "a device or a pipe", path)
    if found.st_dev in _made_up():
        raise Irregular(errno.EINVAL, "a file that the system makes up", path)


@functools.cache
def _made_up() -> frozenset[int]:
    """The devices of the file systems whose files are made up; none on other systems than Linux."""
    return frozenset(Path(place).stat().st_dev for place in _MADE_UP if os.path.ismount(place))
