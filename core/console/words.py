"""Output for people: aligned columns, sizes, and text that cannot change the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import printable as printable


def columns(rows: list[tuple[str, ...]]) -> Iterable[str]:
    """Align the cells of rows, two spaces apart; a cell far wider than the others does not widen its column."""
    widths = [
        max((len(row[i]) for row in rows if len(row) > i), default=0) for i in range(max(map(len, rows), default=0))
    ]
    for row in rows:
        yield "  ".join(cell.ljust(min(width, 80)) for cell, width in zip(row, widths, strict=False)).rstrip()


def size_text(size: int) -> str:
    """A number of bytes in the unit that leaves one to three digits before the point."""
    for unit, length in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size} bytes"


def size_word(size: int) -> str:
    """A number of bytes as the value of a flag: 1GB, or the number."""
    whole = (
        f"{size // length}{unit}" for unit, length in (("GB", 10**9), ("MB", 10**6)) if size and size % length == 0
    )
    return next(whole, str(size))


class Output:
    """What the command line asks for: JSON on stdout, or only results, warnings and errors."""

    as_json = False
    quiet = False


def is_shown(line: str) -> bool:
    """Whether a line goes to stderr: --quiet leaves warnings, errors, and how a run ended."""
    return not Output.quiet or line.startswith(("WARNING", "error", "done:", "stopped by"))


def tell(line: str) -> None:
    """Print one line to stderr, whatever characters its names have, unless --quiet leaves it out."""
    if is_shown(line):
        print(printable(line), file=sys.stderr, flush=True)


def differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """List tensors that are missing, have no place in this model, or have another shape."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {tuple(found[name])}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return on_one_side(missing, surplus, " in this model") + wrong


def on_one_side(missing: Sequence[str], surplus: Sequence[str], place: str = "") -> list[str]:
    """List names that only one of two sides has: "missing: a, b and 4 more", "without a place in this model: c"."""
    said = {"missing": missing, f"without a place{place}": surplus}
    return [f"{what}: {listed_names(names, 10)}" for what, names in said.items() if names]


def counted(what: str, names: list[str]) -> str:
    """Count names and list them, at most ten: "2 new parameters (a, b)"; `what` is in the singular."""
    return f"{len(names)} {what}{'s' * (len(names) != 1)} ({listed(names, separator=', ')})"


def listed(faults: list[str], limit: int = 10, separator: str = "; ") -> str:
    """Join sentences, at most ten of them "and 37 more"."""
    more = f"{separator}and {len(faults) - limit} more" if len(faults) > limit else ""
    return separator.join(faults[:limit]) + more


def listed_names(names: Sequence[Any], limit: int, count: int = 0, show: Callable[[Any], str] = str) -> str:
    """Join names, at most so many: "a, b, c and 4 more"; `count` is how many there are where not all are given."""
    more = max(count, len(names)) - limit
    return ", ".join(map(show, names[:limit])) + (f" and {more} more" if more > 0 else "")
