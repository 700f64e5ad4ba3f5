"""The rows of the table in docs/benchmarks.md: what was claimed, what was measured, and whether the bar is met."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "BENCHMARK_ROWS"
"""The environment variable that names the file into which a script hands over its rows to `python -m benchmarks`."""


try:
    import zlib_ng  # noqa: F401
except ImportError:
    FAST = False
else:
    FAST = True
"""Whether the extra `fast` is there, which has bars of its own."""


@dataclass(frozen=True)
class Row:
    """A figure and its bar: at most so much or, with `at_least`, at least; `ours` and `peer` are what it is made of."""

    claim: str
    value: float
    bar: float
    unit: str = "x"
    at_least: bool = False
    ours: str = ""
    peer: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the figure keeps the bar."""
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def figure(self) -> str:
        """The figure with its unit."""
        return f"{self.value:.3g}{self.unit}"

    @property
    def bound(self) -> str:
        """The bar in words."""
        return f"at {'least' if self.at_least else 'most'} {self.bar:g}{self.unit}"

    @property
    def line(self) -> str:
        """All of it in a line."""
        made_of = " against ".join(filter(None, (self.ours, self.peer)))
        said = f" ({made_of})" if made_of else ""
        return f"{'met   ' if self.is_met else 'MISSED'}  {self.claim}: {self.figure}{said}, bar {self.bound}"


def against(claim: str, ours: float, peer: float, bar: float) -> Row:
    """That our seconds are at most so many times a peer's."""
    return Row(claim, ours / peer, bar, ours=f"{ours:.3g} s", peer=f"{peer:.3g} s")


def hand_over(rows: Sequence[Row]) -> None:
    """Print the rows of a script, and hand them over where it runs for the table."""
    print("", *(row.line for row in rows), sep="\n", flush=True)
    if FILE in os.environ:
        Path(os.environ[FILE]).write_text(json.dumps([asdict(row) for row in rows]))
