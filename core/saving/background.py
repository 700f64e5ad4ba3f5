"""Saves during training: one at a time, each in a thread of its own."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable

import torch

from ..console.words import tell
from .block_memory import Memory
from .snapshot import Snapshot


class BackgroundSaver:
    """Writes the saves of a manager. The program does not end before the last save has ended.

    The error of a failed save is kept until it is asked for.
    """

    def __init__(self, stage_memory: int | None) -> None:
        self.memory = Memory(stage_memory)
        self.durable_at: float | None = None
        """When the last save that succeeded was durable, by time.monotonic; None before."""
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()  # a signal may come in between
        self._failure: BaseException | None = None
        self._snapshot: Snapshot | None = None
        self._watched: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    @property
    def failed(self) -> bool:
        """Whether a save has failed and its error has not been asked for."""
        return self._failure is not None

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self,
        name: str,
        write: Callable[[Memory], None],
        snapshot: Snapshot,
        optimizers: Iterable[torch.optim.Optimizer],
    ) -> None:
        """Start to write, when the previous save has ended.

        The next step of each of the optimizers waits until the snapshot is copied. When anything else
        changes is unknown: then the caller has to wait.

        Where no thread can be started (the interpreter is ending, or the system refuses), this thread writes, and
        raises the error of the save.
        """
        for optimizer in optimizers:
            if optimizer not in self._watched:
                copied = weakref.WeakMethod(self.wait_copied)  # an optimizer may outlive the manager and its memory
                optimizer.register_step_pre_hook(lambda *_, copied=copied: (wait := copied()) and wait())
                self._watched.add(optimizer)
        self.join()  # another thread of the program may have begun one
        go = threading.Event()
        thread = threading.Thread(target=self._run, args=(write, go), name=name)
        try:
            with self._starting:
                self._thread, self._snapshot = thread, snapshot
                if not (started := _start(thread)):
                    self._thread = None
        finally:
            go.set()
        if not started:
            self._run(write, go)
            self.raise_failure()

    def wait_copied(self) -> None:
        """Wait until the tensors that are being saved may change."""
        if self._snapshot is not None:
            self._snapshot.wait_copied()

    def _run(self, write: Callable[[Memory], None], go: threading.Event) -> None:
        go.wait()  # else the interpreter would stay in this thread, and `begin` would return milliseconds later
        try:
            write(self.memory)
            self.durable_at = time.monotonic()
        except BaseException as error:
            self._failure = error

    def join(self) -> None:
        """Wait until the save that is being written has ended, successfully or not."""
        with self._starting:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def raise_failure(self) -> None:
        """Raise the error of a failed save, once."""
        if (failure := self._failure) is not None:
            self._failure = None
            raise failure

    def last_words(self) -> None:
        """Print an error that was never asked for."""
        if self._failure is not None:
            tell(f"WARNING: {self._failure}")


def _start(thread: threading.Thread) -> bool:
    """Start a thread that the end of the program will wait for; False where there can be none."""
    if not threading.main_thread().is_alive():  # in atexit: threads have been joined, and this one would be killed
        return False
    try:
        thread.start()
    except RuntimeError:  # too many; or, from Python 3.12 on, the interpreter is ending
        return False
    return True
