"""The record of a folder's writer: who it is, and that it lives.

The writer rewrites its record every few seconds. Another host, and another container, cannot ask for its process, and
their clocks may differ: they watch whether the record changes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from ..console.files import LARGEST
from . import owner

RECORD = ".lock-owner"
"""The file in a model's folder that is there while somebody writes."""

BEAT = 5.0
"""Seconds after which a writer rewrites its record."""

SILENCE = 45.0
"""Seconds without a change after which a writer is dead; network file systems may show a change 20 s late."""

Values = dict[str, Any]


class Record:
    """This process as the writer of a folder: a file that only one process can make; it beats from `start` to `close`.

    Raises: FileExistsError when there is one, OSError.
    """

    def __init__(self, folder: Path, values: Values) -> None:
        self.path, self.values = folder / RECORD, values
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "r+b", buffering=0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name=f"heartbeat of {folder}", daemon=True)
        try:
            self._beat(0)
        except BaseException:
            self._file.close()
            self.path.unlink(missing_ok=True)
            raise

    def start(self) -> None:
        """Begin to beat; the caller holds no lock that the garbage collector, which the new thread may run, waits for.

        Raises: OSError when no thread can be started.
        """
        if not threading.main_thread().is_alive():  # the program ends, in no time, and may start no thread
            return
        try:
            self._thread.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error), str(self.path)) from error

    def _beat(self, number: int) -> None:
        self._file.seek(0)
        self._file.write(json.dumps({**self.values, "beat": f"{number:010}"}).encode())  # always of one length

    def _live(self) -> None:
        number = 0
        while not self._ended.wait(BEAT):
            number += 1
            with contextlib.suppress(OSError, ValueError):  # a disk that fails for a moment is no end; or closed now
                self._beat(number)

    def close(self) -> None:
        """End the beating, and remove the record, unless the file that has its name now is another writer's."""
        self._ended.set()
        # The garbage collector may run in any thread; one that was not started need not be waited for.
        if self._thread is not threading.current_thread() and self._thread.ident is not None:
            self._thread.join(timeout=2)  # a disk that hangs must not hang this thread too
        self._file.close()
        with contextlib.suppress(OSError):
            if read(self.path).get("id") == self.values["id"]:
                self.path.unlink()


def this_process(folder: Path, lock: int | None = None) -> Values:
    """The record of this process as the writer of a folder; `lock` is the open file that the kernel locks for it."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "boot": owner.boot(),
        "namespace": owner.namespace(),
        "began": owner.began(),
        "folder": _identity(folder.stat()),
        "lock": None if lock is None else _identity(os.fstat(lock)),
        "id": secrets.token_hex(8),
    }


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino]


def read(path: Path) -> Values:
    """Read a record; empty where there is none, or none that can be read.

    Raises: OSError when the disk fails.
    """
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(LARGEST))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def is_elsewhere(record: Values, here: Values) -> bool:
    """Whether a record was copied here with its folder: its writer is at work in another one of this file system."""
    there, ours = record.get("folder"), here["folder"]
    return bool(there and record.get("boot") == here["boot"] and there[0] == ours[0] and there != ours)


def lives(record: Values, here: Values) -> bool | None:
    """Whether the writer of a record lives and writes here; None where only its heart can tell."""
    if record and "beat" not in record:  # of a version of this program that had no heartbeat
        here_too = record.get("host") == here["host"] and isinstance(record.get("pid"), int)
        return not here_too or owner.runs(record["pid"], 0)
    if is_elsewhere(record, here):
        return False
    same_kernel = here["boot"] is not None and record.get("boot") == here["boot"]
    same_folder = record.get("folder") == here["folder"]
    if same_kernel and here["lock"] is not None and record.get("lock") == here["lock"]:
        return False  # the kernel gives away the lock of the dead only, in any container
    asked = same_kernel or (here["boot"] is None and record.get("host") == here["host"])
    if not asked or record.get("namespace") != here["namespace"] or not isinstance(record.get("pid"), int):
        return None
    if not owner.runs(record["pid"], record.get("began", 0)):
        return False
    return True if same_kernel and same_folder else None  # it may write elsewhere: then the record here is a copy


def beats(path: Path) -> bool:
    """Watch a record until it changes or goes; False when it has not for SILENCE seconds."""
    before, end = _look(path), time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(SILENCE / 90)
        if _look(path) != before:
            return True
    return False


def _look(path: Path) -> tuple[bytes, int] | None:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # opened anew: NFS then asks its server
        return file.read(), os.fstat(file.fileno()).st_mtime_ns
    return None
