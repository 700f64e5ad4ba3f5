"""What was found by reading a checkpoint whole: its checksums, and the values of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..console.words import columns, printable, size_text

if TYPE_CHECKING:
    from .statistics import Stat
    from .verification import Verification

Facts = dict[str, Any]

_NUMBERS = ("min", "max", "mean", "std")


def verification_facts(found: Verification) -> Facts:
    """A verification as values that JSON has."""
    names = ("damaged", "replaced", "unrecorded", "notes", "checked_bytes", "seconds")
    return {name: getattr(found, name) for name in names}


def stat_facts(stat: Stat) -> Facts:
    """The values of one tensor as values that JSON has."""
    names = ("name", "count", "nan", "inf", "zeros", *_NUMBERS, "norm", "note")
    return {name: getattr(stat, name) for name in names}


def not_finite(stats: list[Facts]) -> list[str]:
    """A sentence for each tensor that holds what is no number."""
    return [
        f"{stat['name']}: {stat['nan']:,} NaN and {stat['inf']:,} Inf among {stat['count']:,} numbers"
        for stat in stats
        if stat["nan"] or stat["inf"]
    ]


def views_text(facts: Facts) -> Iterable[str]:
    """Write what was read, for people."""
    if "verification" in facts:
        yield from ("", "=== VERIFICATION ===", *_verification_lines(facts["verification"]))
    if "stats" in facts:
        yield from ("", "=== STATISTICS ===")
        heading = ("tensor", "numbers", *_NUMBERS, "zeros", "NaN", "Inf", "")
        yield from columns([heading, *(_stat_row(stat) for stat in facts["stats"])])


def _verification_lines(found: Facts) -> Iterable[str]:
    speed = f" ({found['checked_bytes'] / found['seconds'] / 1e9:.2f} GB/s)" if found["seconds"] > 0.01 else ""
    faults = len(found["damaged"])
    whole = f"{faults} fault{'s' * (faults != 1)}" if faults else "nothing is damaged"
    size = size_text(found["checked_bytes"])
    if found["checked_bytes"] or faults:
        yield f"{size} compared with recorded checksums in {found['seconds']:.2f} s{speed}: {whole}"
    else:
        yield "no checksum is recorded, so nothing could be compared"
    for kind in ("damaged", "replaced", "unrecorded", "notes"):
        yield from (f"{kind.removesuffix('s')}: {printable(line)}" for line in found[kind])


def _stat_row(stat: Facts) -> tuple[str, ...]:
    numbers = tuple("-" if stat[name] is None else f"{stat[name]:.6g}" for name in _NUMBERS)
    zeros = f"{stat['zeros'] / stat['count']:.1%}" if stat["count"] else "-"
    name = printable(stat["name"])
    return (name, f"{stat['count']:,}", *numbers, zeros, str(stat["nan"]), str(stat["inf"]), printable(stat["note"]))
