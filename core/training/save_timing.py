"""The saves of a training run: when the next is due by the clock, and how many have failed in a row."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from ..bundle.intact import say_on_stderr
from ..checkpoint import CheckpointManager
from ..errors import SaveFailed
from .lost_work import LostWork
from .settings import Settings


class RunSaves:
    """One save after another; a failed save is reported, and `max_failed_saves` in a row raise an error.

    What is asked for at the edge of a step is done there, or `edges` - 1 steps later.
    """

    def __init__(self, manager: CheckpointManager, settings: Settings, edges: int = 1) -> None:
        self.step: int | None = None
        """The last saved step, as far as is known; None after a failed save."""
        self._manager = manager
        self._minutes, self._max_failed = settings.save_every_minutes, settings.max_failed_saves
        self._failed = 0
        self._last = time.monotonic()
        self._asked = False
        limit = settings.lose_at_most
        self._lost = None if limit is None else LostWork(limit, self._last, edges)

    def is_due(self) -> bool:
        """Whether a save is due by the clock, at the edge of a step; it asks once for each save."""
        now = time.monotonic()
        if self._lost:
            self._lost.step_ended(now)
        if self._asked:
            return False
        by_minutes = self._minutes is not None and now - self._last >= 60 * self._minutes
        self._asked = by_minutes or (self._lost is not None and self._lost.is_due(now))
        return self._asked

    def is_due_before_evaluation(self) -> bool:
        """Whether an evaluation would leave too little time for a save after it."""
        return self._lost is not None and self._lost.is_due(time.monotonic(), evaluates=True)

    def evaluated(self) -> None:
        """Leave the time since the edge of the step out of that of the next one."""
        if self._lost:
            self._lost.evaluated(time.monotonic())

    def begin(self, step: int, save: Callable[[], bool], *, now: bool = False, last: bool = False) -> None:
        """Begin to save a step; wait for a save in flight if that is the policy, or if this one must be `now`.

        Raises: SaveFailed when it cannot begin and is the `last`, or too many have failed in a row.
        """
        self._asked, self._last = False, time.monotonic()
        self.check(wait=now or last or self._manager.save_policy == "wait")
        is_new = self.step != step  # or there are only metrics to add
        with self._counted(last):
            if save():
                if self.step is not None:  # the previous save has ended without an error
                    self._failed = 0
                self.step = step
                if self._lost and is_new:
                    self._lost.began(self._last)
        if self._lost:
            self._lost.goes_on(time.monotonic())

    def check(self, wait: bool = False) -> None:
        """Report a save that failed since the last call.

        Raises: SaveFailed when too many have failed in a row.
        """
        with self._counted():
            if wait:
                self._manager.wait_written()
            else:
                self._manager.raise_failed()
        if self._lost and (line := self._lost.ended(self._manager.durable_at)):
            say_on_stderr(line)

    @contextlib.contextmanager
    def _counted(self, last: bool = False) -> Iterator[None]:
        try:
            yield
        except SaveFailed as error:
            self.step = None
            self._failed += 1
            if self._lost:
                self._lost.failed(time.monotonic())
            if last:
                raise
            if self._failed >= self._max_failed:
                raise SaveFailed(f"{error} That makes {self._failed} failed saves in a row; the run ends.") from error
            row = f"failed saves in a row: {self._failed} of {self._max_failed}"
            say_on_stderr(f"WARNING: {error} Training continues ({row}).")
