"""One piece of work at a time, beside the caller; what becomes of it is kept until it is asked for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


class Background:
    """Runs work in a thread of its own. The program does not end before the work has."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether the work that was started last goes on."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Start work; what was started before has ended."""
        go = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work, go), name=name)
        self._thread.start()
        go.set()

    def _run(self, work: Callable[[], None], go: threading.Event) -> None:
        go.wait()  # else the interpreter would stay with this thread, and `start` return milliseconds later
        try:
            work()
        except BaseException as error:
            self._failure = error

    def join(self) -> None:
        """Wait until the work has ended, however it did."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def raise_failure(self) -> None:
        """Raise what ended the work, once."""
        if (failure := self._failure) is not None:
            self._failure = None
            raise failure

    def last_words(self) -> None:
        """Print a failure that nobody asked for."""
        if self._failure is not None:
            print(f"WARNING: {self._failure}", file=sys.stderr)
