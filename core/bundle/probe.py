"""What the file system of a folder can do, tried before there is anything to lose; nothing stays.

Switches of the storage say what it lacks, and its other ways are taken from then on.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import BinaryIO

from ..errors import SaveFailed
from .commit import ModelFolder
from .storage import failed_call

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ENABLED = True
"""Off in suites that count or fail the calls of a save."""

_NEVER = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EINVAL,
    errno.EXDEV,
}
"""Refusals that no waiting ends; a full disk or a broken connection is for the save to report."""

_probed: set[str] = set()
"""The folders that this process has tried."""


def probe(place: ModelFolder) -> str | None:
    """Try what saves ask of a file system, once for each folder and process; return a line when something is lacking.

    The folder is there, and the caller is its only writer.

    Raises: SaveFailed, naming the call, for a file system that cannot hold checkpoints.
    """
    key = os.path.realpath(place.path)
    if not ENABLED or key in _probed:
        return None
    try:
        lacking = _lacking(place)
    except OSError as error:
        if error.errno not in _NEVER:
            return None
        raise SaveFailed(
            f"{place.path}: this file system cannot hold checkpoints: {failed_call(error)}. Use another "
            "--checkpoint_root. Nothing was trained, and nothing that was committed is lost."
        ) from error
    _probed.add(key)
    return f"{place.path}: this file system has no {'; no '.join(lacking)}" if lacking else None


def _lacking(place: ModelFolder) -> list[str]:
    """Make, write, sync, rename, link, lock and remove files in a hidden folder; list what is refused, and its way."""
    storage = place.storage
    stage = place.stage()
    with storage.removed_on_failure(stage):
        file, other, inner = stage / "file", stage / "other", stage / "folder"
        for path in (file, other):
            fd = storage.descriptor(path)
            try:
                storage.change(os.write, fd, b"probe")
            finally:
                os.close(fd)
        storage.rename(file, other)
        storage.link(other, file)
        storage.make_folder(inner)
        storage.renames(inner, stage / "renamed")
        with other.open("r+b") as opened:  # after the names: the folder has nothing left to sync, which takes as long
            storage.sync(opened)
            locks = _has_locks(opened)
        storage.sync_folder(stage)
        storage.remove_tree(stage)
    said = {
        "hard links (the files of older steps move)": storage.links,
        "fsync of files (after a power loss the newest steps may be damaged)": storage.file_fsync,
        "fsync of folders (a power loss may undo the newest saves)": storage.folder_fsync,
        "rename of folders (their files move one by one)": storage.folder_renames,
        "locks (a file that names its owner is the lock)": locks,
        "count of free space (a full disk shows when it is full)": storage.free(place.path) is not None,
    }
    return [lack for lack, there in said.items() if not there]


def _has_locks(file: BinaryIO) -> bool:
    """Whether the kernel locks files here."""
    if fcntl is None:
        return True  # a file that names its owner is the only way there
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
