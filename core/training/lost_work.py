"""How much work a kill may lose: when the next save must begin, from measured times, all in seconds.

A step that is saved may be lost until it is durable. Killed just before that, a run loses everything since the model of
the save before it was captured: the time between two captures, and that of one write. So a save begins at the last edge
of a step from which that sum stays within the limit. Young's and Daly's interval minimizes the expected cost instead,
from a mean time between failures that one run does not know.
"""

from __future__ import annotations

from collections import deque


def must_begin(since: float, ahead: float, writing: float, limit: float) -> bool:
    """Whether a save must begin now: `ahead` later it would be durable too late, `since` after the last capture."""
    return since + ahead + writing > limit


def plan(limit: float, step: float, writing: float) -> str:
    """Report in one line how often a run saves for a limit, or why it cannot be kept.

    One save is written at a time, so that at least two writes lie between a capture and the end of the next save.
    """
    least = 2 * writing + step
    if least > limit:
        return (
            f"lose_at_most {limit:g} s cannot be kept: a save takes {writing:.3g} s until it is durable, so up to "
            f"{least:.3g} s of work may be lost; one save begins when the one before it is durable"
        )
    steps = int((limit - writing) / step) if step else 0
    times = f"a step takes {step:.3g} s, a save {writing:.3g} s"
    return f"lose_at_most {limit:g} s: saves about every {max(1, steps)} steps ({times})"


class LostWork:
    """The measured times of a run, and what follows from them; `now` is any clock that only goes forward.

    A save that is asked for at the edge of a step begins at the `edges`-th, counted from that one.
    """

    def __init__(self, limit: float, now: float, edges: int = 1) -> None:
        self._limit, self._edges = limit, edges
        self._captured = self._mark = now
        self._steps: deque[float] = deque(maxlen=10)
        self._writes: deque[float] = deque(maxlen=3)
        self._evaluation: float | None = None
        self._is_first_step = True
        self._is_writing = False
        self._durable_at: float | None = None
        self._said: set[bool] = set()

    def step_ended(self, now: float) -> None:
        """Measure a step; the first one, which may compile, tells nothing about the others."""
        if not self._is_first_step:
            self._steps.append(now - self._mark)
        self._is_first_step, self._mark = False, now

    def evaluated(self, now: float) -> None:
        """Measure an evaluation, which is no part of a step."""
        self._evaluation = now - self._mark
        self.goes_on(now)

    def goes_on(self, now: float) -> None:
        """Begin to measure the next step."""
        self._mark = now

    def began(self, captured: float) -> None:
        """A save of the model as it was at `captured` is being written."""
        self._captured, self._is_writing = captured, True

    def failed(self, now: float) -> None:
        """The save will not be durable; the next one is due as long after it as after any other."""
        self._captured, self._is_writing = now, False

    def ended(self, durable_at: float | None) -> str | None:
        """Measure the last save, once, from when it became durable; return a line to report when there is a new one."""
        if durable_at == self._durable_at or durable_at is None:
            return None
        self._durable_at = durable_at
        if self._is_writing:
            self._writes.append(durable_at - self._captured)
            self._is_writing = False
        if not self._steps or not self._writes:
            return None
        step = sum(self._steps) / len(self._steps)
        is_kept = 2 * self._writing + step <= self._limit
        if is_kept in self._said:
            return None
        self._said.add(is_kept)
        return plan(self._limit, step, self._writing)

    @property
    def _writing(self) -> float:
        """The longest of the last writes; until one is measured, half of the limit."""
        return max(self._writes, default=self._limit / 2)

    def is_due(self, now: float, evaluates: bool = False) -> bool:
        """Whether a save must begin at this edge of a step, which an evaluation may follow, or the limit is broken.

        One that was never measured may take any time.
        """
        if self._is_writing:
            return False
        ahead = self._edges * max(self._steps, default=0.0)
        if evaluates:
            ahead += float("inf") if self._evaluation is None else self._evaluation
        return must_begin(now - self._captured, ahead, self._writing, self._limit)
