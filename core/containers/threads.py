"""Workers: jobs on threads beside the one that started them; what fails there is raised where they are waited for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from types import TracebackType

Job = Callable[[], None]

MOST = min(os.cpu_count() or 1, 4)
"""Threads at a time: more would wait for memory and disk, not for a processor."""


class Workers:
    """Threads that work off jobs in their order; `concurrent.futures` would take as long to import as a small file."""

    def __init__(self, jobs: Iterable[Job], count: int = MOST) -> None:
        self._jobs = iter(jobs)  # made one at a time, as they are asked for
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._work) for _ in range(count)]

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                job()
        except BaseException as error:
            self._error = error

    def _next(self) -> Job | None:
        with self._lock:
            return next(self._jobs, None) if self._error is None else None

    def wait(self) -> None:
        """Wait for the last job; raises the first error of any."""
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Workers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the jobs that were not begun undone, and wait for the others."""
        with self._lock:
            self._jobs = iter(())
        for thread in self._threads:
            thread.join()
