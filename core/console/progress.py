"""Progress in bytes, tokens or steps, on stderr: a bar in a terminal, now and then a line in a file."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from .streams import unguarded
from .words import Output

if TYPE_CHECKING:
    from tqdm import tqdm

LINES_EVERY = 10.0
"""Seconds between two lines of progress in a file."""

_LINE = "{desc}{percentage:.0f}% | {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Lines:
    """Progress where no bar can be drawn: a line every ten seconds, the first after as many."""

    def __init__(self, what: str, total: int, unit: str, scale: bool, initial: int = 0) -> None:
        self._what, self._total, self._unit, self._scale = f"{what}: " if what else "", total, unit, scale
        self._n = self._initial = initial
        self._started = self._said = time.monotonic()
        self._postfix = ""

    def update(self, count: int = 1) -> None:
        """Count what was done."""
        self._n += count
        self._say()

    def set_postfix_str(self, text: str) -> None:
        """Show a text at the end of the lines from now on."""
        self._postfix = text
        self._say()

    def _say(self) -> None:
        now = time.monotonic()
        if now - self._said < LINES_EVERY:
            return
        self._said = now
        from tqdm import tqdm

        line = tqdm.format_meter(
            self._n,
            self._total,
            now - self._started,
            prefix=self._what,
            unit=self._unit,
            unit_scale=self._scale,
            postfix=self._postfix,
            bar_format=_LINE,
            initial=self._initial,
        )
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the lines as they are."""


def step_bar(initial: int, total: int, show: bool) -> tqdm | Lines:
    """Begin the bar of a training run, which stays when the run ends."""
    return _bar("", total, show, unit="step", initial=initial, dynamic_ncols=True)


def token_bar(what: str, total: int) -> tqdm | Lines:
    """Begin a bar like `byte_bar` that counts tokens."""
    return byte_bar(what, total, unit=" tokens")


def byte_bar(what: str, total: int, show: bool = True, unit: str = "B") -> tqdm | Lines:
    """Begin a progress bar in bytes, which appears when the work takes longer than two seconds, and leaves no trace."""
    return _bar(what, total, show, unit=unit, unit_scale=True, delay=2.0, leave=False)


def _bar(what: str, total: int, show: bool, unit: str, **more: Any) -> tqdm | Lines:
    show = show and not Output.quiet
    if "ipykernel" in sys.modules:  # a notebook, whose stderr is no terminal, and which draws bars of its own
        from tqdm.auto import tqdm as notebook_bar

        return notebook_bar(total=total, desc=what or None, unit=unit, disable=not show, **more)
    file = unguarded(sys.stderr)
    if show and not file.isatty():
        return Lines(what, total, unit, "unit_scale" in more, more.get("initial", 0))
    from tqdm import tqdm  # not needed by work that ends at once

    return tqdm(total=total, desc=what or None, unit=unit, disable=not show, file=file, **more)
