"""What scripts print for people: aligned columns, sizes, and text that cannot change the terminal."""

from __future__ import annotations

from collections.abc import Iterable


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


def printable(text: str) -> str:
    """Replace what would move the cursor or change the terminal by its escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
