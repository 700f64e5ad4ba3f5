"""One writer per model folder; readers need no lock."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointLocked
from .storage import DISK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

KERNEL_LOCKS = fcntl is not None
"""False (Windows, file systems without flock, tests): a file with the owner's process number is the lock."""

LOCK, OWNER = ".lock", ".lock-owner"
"""Files in a model's folder: the one that the kernel locks; where it cannot, the one that is itself the lock."""

_held: dict[Path, tuple[int, contextlib.ExitStack]] = {}
"""How often this process holds each folder: a trainer's own saves take the lock that it already has."""

_open: set[int] = set()
"""File descriptors that are kernel locks."""

_holding = threading.RLock()
"""Guards `_held`: a save ends in a thread of its own."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make this process the only writer of a model folder while the block runs; blocks may be nested.

    A dead owner's lock is taken over: the kernel drops a flock with its process, and an owner file is checked.

    Raises: CheckpointLocked naming the process and host that write here.
    """
    key = folder.resolve()
    with _holding:
        count, release = _held.get(key) or (0, _acquire(folder))
        _held[key] = (count + 1, release)
    try:
        yield
    finally:
        with _holding:
            count, release = _held.pop(key, (0, contextlib.ExitStack()))  # a process forked meanwhile holds nothing
            if count > 1:
                _held[key] = (count - 1, release)
            else:
                release.close()


def is_locked(path: Path) -> bool:
    """Whether a writer has ever locked what lies at a path, and so may be at work there."""
    return any((path / name).exists() for name in (LOCK, OWNER))


def _forget() -> None:
    """In a forked process: hold nothing, and close the copy of a lock that would outlive its owner."""
    global _holding
    _holding = threading.RLock()  # another thread may have held it
    for _, release in _held.values():
        release.pop_all()  # an owner's file stays
    _held.clear()
    while _open:
        os.close(_open.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _acquire(folder: Path) -> contextlib.ExitStack:
    path = folder / LOCK
    release = contextlib.ExitStack()
    if KERNEL_LOCKS:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise _locked(folder, path) from error
        except OSError:  # this file system has no flock
            os.close(fd)
        else:
            os.ftruncate(fd, 0)
            os.write(fd, _owner())
            release.callback(_close, fd)
            _open.add(fd)
            return release
    owner = folder / OWNER
    for _ in range(3):
        try:
            fd = os.open(owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError as error:
            seen = _read_owner(owner)
            if not _is_dead(seen):
                raise _locked(folder, owner) from error
            _bury(owner, seen)
            continue
        os.write(fd, _owner())
        os.close(fd)
        release.callback(owner.unlink, missing_ok=True)
        return release
    raise _locked(folder, owner)


def _close(fd: int) -> None:
    _open.discard(fd)
    os.close(fd)


def _owner() -> bytes:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": started}).encode()


def _read_owner(path: Path) -> dict[str, object]:
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _bury(path: Path, seen: dict[str, object]) -> None:
    """Remove a dead owner's file; one that another process made in the meantime is put back."""
    grave = path.with_name(f"{path.name}-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        DISK.rename(path, grave)
        if _read_owner(grave) == seen:
            DISK.remove(grave)
        else:
            DISK.rename(grave, path)


def _is_dead(owner: dict[str, object]) -> bool:
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _locked(folder: Path, path: Path) -> CheckpointLocked:
    owner = _read_owner(path)
    for _ in range(100):  # a process that has just taken the lock may not have written its name yet
        if owner and not _is_dead(owner):
            break
        time.sleep(0.01)
        owner = _read_owner(path)
    who = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}"
    since = f" since {owner['since']}" if "since" in owner else ""
    stale = "" if path.name == LOCK else f" If that process is gone, delete {path}."
    return CheckpointLocked(
        f"{folder}: {who} has been writing here{since}, and a model has one writer. "
        f"Wait for it, stop it, or use another --model_name.{stale}"
    )
