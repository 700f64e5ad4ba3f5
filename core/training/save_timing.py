"""The saves of a training run: when the next is due by the clock, and how many have failed in a row."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from ..bundle.intact import say_on_stderr
from ..checkpoint import CheckpointManager
from ..errors import SaveFailed


class RunSaves:
    """One save after another; a failed save is reported, and `max_failed` in a row raise an error."""

    def __init__(self, manager: CheckpointManager, every_minutes: float | None, max_failed: int) -> None:
        self.step: int | None = None
        """The last saved step, as far as is known; None after a failed save."""
        self._manager = manager
        self._seconds = None if every_minutes is None else 60 * every_minutes
        self._max_failed = max_failed
        self._failed = 0
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether a save is due by the clock."""
        return self._seconds is not None and time.monotonic() - self._last >= self._seconds

    def begin(self, step: int, save: Callable[[], bool], *, now: bool = False, last: bool = False) -> None:
        """Begin to save a step; wait for a save in flight if that is the policy, or if this one must be `now`.

        Raises: SaveFailed when it cannot begin and is the `last`, or too many have failed in a row.
        """
        self._last = time.monotonic()
        self.check(wait=now or last or self._manager.save_policy == "wait")
        with self._counted(last):
            if save():
                if self.step is not None:  # the previous save has ended without an error
                    self._failed = 0
                self.step = step

    def check(self, wait: bool = False) -> None:
        """Report a save that failed since the last call.

        Raises: SaveFailed when too many have failed in a row.
        """
        with self._counted():
            if wait:
                self._manager.wait()
            else:
                self._manager.raise_failed()

    @contextlib.contextmanager
    def _counted(self, last: bool = False) -> Iterator[None]:
        try:
            yield
        except SaveFailed as error:
            self.step = None
            self._failed += 1
            if last:
                raise
            if self._failed >= self._max_failed:
                raise SaveFailed(f"{error} That makes {self._failed} failed saves in a row; the run ends.") from error
            row = f"failed saves in a row: {self._failed} of {self._max_failed}"
            say_on_stderr(f"WARNING: {error} Training continues ({row}).")
