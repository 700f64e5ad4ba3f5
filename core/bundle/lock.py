"""One process writes to a model's folder; readers need no lock.

The record of the writer (heartbeat.py) is the lock. Where the kernel can lock files, its lock beside it tells at once
that the writer of this machine lives, or that it is dead. Threads and managers of the process take turns (turn.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..console.words import tell
from ..errors import CheckpointLocked
from . import heartbeat
from .heartbeat import RECORD, Record, Values, beats, is_elsewhere, lives, read, this_process
from .owner import new_stage_name
from .storage import Storage, not_ours

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

KERNEL_LOCKS = fcntl is not None
"""False (Windows, tests): the record alone is the lock, as on file systems without flock."""

LOCK = ".lock"
"""The file in a model's folder that the kernel locks."""

COMPLETED = 1.0
"""Seconds in which a writer completes the record that it has begun."""

Say = Callable[[str], None]

_storage = Storage()
"""Not that of the steps: what makes the lock is no part of a save, which tests stop at each of its calls."""

_held: dict[Path, _Lock] = {}
"""What this process has locked: a save takes the lock that its trainer already has."""

_open: set[int] = set()
"""File descriptors that are kernel locks."""

_holding = threading.RLock()
"""Guards `_held`: a save ends in a thread of its own."""


def say_at_once(line: str) -> None:
    """Print a line on stderr."""
    tell(line)


@contextlib.contextmanager
def hold(folder: Path, say: Say = say_at_once) -> Iterator[None]:
    """Make this process the only one that writes to a model's folder while the block runs; blocks may be nested.

    The lock of a dead process is taken over. Where it cannot be asked, since it ran on another host or in another
    container, that takes `heartbeat.SILENCE` seconds without a sign of life, which is said.

    Raises: CheckpointLocked naming the process and host that write here; or when this process had the lock, and the
        folder was moved or its lock removed.
    """
    key = folder.resolve()
    with _holding:
        lock = _held.get(key)
        is_new = lock is None
        if lock is None:
            lock = _held[key] = _Lock(folder, say)
        else:
            lock.check()
        lock.count += 1
    try:
        if is_new:
            lock.record.start()
        yield
    finally:
        with _holding:
            lock.count -= 1
            if lock.count == 0 and _held.get(key) is lock:  # a process forked meanwhile holds nothing
                del _held[key]
                lock.release.close()


def is_held(folder: Path) -> bool:
    """Whether this process has locked a folder."""
    return folder.resolve() in _held


def is_locked(path: Path) -> bool:
    """Whether a writer has ever locked what lies at a path, and so may be at work there."""
    return any((path / name).exists() for name in (LOCK, RECORD))


class _Lock:
    """The lock of one folder, held by this process."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.count, self._folder, self._record, self._say = 0, folder, folder / RECORD, say
        with contextlib.ExitStack() as release:
            self._file = self._lock_file(release) if KERNEL_LOCKS else None
            self._mine = this_process(folder, self._file)
            self.record = self._make_record()
            release.callback(self.record.close)
            if self._file is not None:
                os.ftruncate(self._file, 0)
                os.write(self._file, json.dumps(self._mine).encode())  # for who is refused before there is a record
            self.release = release.pop_all()

    def check(self) -> None:
        """Raise CheckpointLocked when the lock is no longer this process's."""
        lost, found = self._folder / LOCK, {}
        if self._file is None or _is_file(self._file, lost):
            lost, mine = self._record, self._mine["id"]
            found = _settled(lost, lambda record: record.get("id") == mine)
            if found.get("id") == mine:
                return
        now = f"is that of {_who(found)} now" if found else "is gone or another file"
        raise CheckpointLocked(
            f"{lost}: {now}, expected the lock that this process took: the folder was moved or its lock removed while "
            "it ran, so that another process may write here. Nothing was written; to go on from the last saved step, "
            "start again where that is."
        )

    def _lock_file(self, release: contextlib.ExitStack) -> int | None:
        """Have the kernel lock a file, and return it open; None where the file system has no such locks."""
        path = self._folder / LOCK
        _storage.refuse_link(path)
        for _ in range(3):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise not_ours(path, "file")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(fd)
                if not self._is_copy():
                    raise self._refused() from error
                self._make_fresh(path)
                continue
            except OSError:
                os.close(fd)
                return None
            if os.fstat(fd).st_nlink > 1:  # what is written to it would go to a file elsewhere as well
                os.close(fd)
                self._make_fresh(path)
                continue
            if _is_file(fd, path):
                _open.add(fd)
                release.callback(_close, fd)
                return fd
            os.close(fd)  # another process has put a fresh file in its place
        return None

    def _make_fresh(self, path: Path) -> None:
        fresh = self._folder / new_stage_name()
        _storage.write(fresh, b"")
        _storage.rename(fresh, path)

    def _is_copy(self) -> bool:
        """Whether this folder was copied by hard links, so that the locked file is also that of the original."""
        if (self._folder / LOCK).stat().st_nlink == 1:
            return False
        here = this_process(self._folder)
        record = _settled(self._record, lambda record: bool(record) and not is_elsewhere(record, here))
        return not record or is_elsewhere(record, here)

    def _make_record(self) -> Record:
        """Make the record of this process; that of a dead one is removed."""
        for _ in range(3):
            try:
                return Record(self._folder, self._mine)
            except FileExistsError:
                if self._record.is_symlink() or (self._record.exists() and not self._record.is_file()):
                    raise not_ours(self._record, "file") from None
                seen = _settled(self._record, lambda record: bool(record) or not self._record.exists())
                if self._is_dead(seen):
                    _bury(self._record, seen)
        raise self._refused()

    def _is_dead(self, seen: Values) -> bool:
        """Whether the writer of a record is dead; False when the record has gone meanwhile.

        Raises: CheckpointLocked when it lives.
        """
        alive = lives(seen, self._mine)
        if alive is None:
            self._say(
                f"{self._folder}: {_who(seen)} was writing here, and cannot be asked from this process. "
                f"Waiting {heartbeat.SILENCE:.0f} s for a sign of life."
            )
            alive = beats(self._record)
            if not alive:
                self._say(f"{self._folder}: {_who(seen)} gave no sign of life; its lock is taken over.")
        if alive and self._record.exists():
            raise self._refused()
        return not alive

    def _refused(self) -> CheckpointLocked:
        """The error that names the writer, which may not have written its record yet."""
        here = this_process(self._folder)
        record = _settled(self._record, lambda record: bool(record) and lives(record, here) is not False)
        with contextlib.suppress(OSError):
            record = record or read(self._folder / LOCK)
        since = f" since {record['since']}" if "since" in record else ""
        is_old = "beat" not in record and self._record.exists()
        stale = f" If that process is gone, delete {self._record}." if is_old else ""
        return CheckpointLocked(
            f"{self._folder}: {_who(record)} has been writing here{since}, and a model has one writer. "
            f"Wait for it, stop it, or use another --model_name.{stale}"
        )


def _is_file(fd: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False


def _who(record: Values) -> str:
    return f"process {record.get('pid', '?')} on {record.get('host', 'an unknown host')}"


def _settled(path: Path, fits: Callable[[Values], bool]) -> Values:
    """Read a record; one that does not fit is read again for a while, in which its writer may complete it."""
    end = time.monotonic() + COMPLETED
    while not fits(record := read(path)) and time.monotonic() < end:
        time.sleep(0.01)
    return record


def _bury(path: Path, seen: Values) -> None:
    """Remove a dead writer's record; one that another process made in the meantime is put back."""
    grave = path.with_name(f"{path.name}-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        _storage.rename(path, grave)
        if {**read(grave), "beat": None} == {**seen, "beat": None}:
            _storage.remove(grave)
        else:
            _storage.rename(grave, path)


def _close(fd: int) -> None:
    _open.discard(fd)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child between its fork and its exec has a copy of this file, and of the lock
    os.close(fd)


def _forget() -> None:
    """In a forked process: hold nothing, and close the copy of a lock that would outlive its owner."""
    global _holding
    _holding = threading.RLock()  # another thread may have held it
    for lock in _held.values():
        lock.release.pop_all()  # the record stays
    _held.clear()
    while _open:
        os.close(_open.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
