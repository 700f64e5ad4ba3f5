"""The losses of a run as a drawing of plain characters, as wide as the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from .html.curve import Curve, Series

HEIGHT = 16
"""Rows of the drawing."""

_LEAST = 30
"""Columns below which nothing could be recognised."""


def curve_lines(curve: Curve, width: int) -> Iterable[str]:
    """Draw train loss (.) and validation loss (o) over the steps, and say which evaluation was the best.

    Of the train loss each column shows the mean of its steps.
    """
    xs = [*curve.loss.x, *curve.val_loss.x]
    first, last = min(xs), max(xs)
    margin = 9
    columns = max(width, _LEAST) - margin - 1
    points = [(".", x, y) for x, y in _means(curve.loss, first, last, columns)]
    points += [
        ("o", _place(x, first, last, columns), y) for x, y in zip(curve.val_loss.x, curve.val_loss.y, strict=True)
    ]
    low, high = min(y for _, _, y in points), max(y for _, _, y in points)
    rows = [[" "] * columns for _ in range(HEIGHT)]
    for sign, x, y in points:
        rows[HEIGHT - 1 - _place(y, low, high, HEIGHT)][x] = sign
    for i, row in enumerate(rows):
        label = f"{high - (high - low) * i / (HEIGHT - 1):.3f}" if i % 5 == 0 else ""
        yield f"{label:>{margin - 2}} |{''.join(row)}".rstrip()
    yield f"{'':{margin - 1}}+{'-' * columns}"
    left, right = f"{first:,.0f}", f"step {last:,.0f}"
    yield f"{'':{margin}}{left}{right:>{max(columns - len(left), len(right) + 1)}}"
    yield _legend(curve)


def _means(series: Series, first: float, last: float, columns: int) -> Iterable[tuple[int, float]]:
    found: dict[int, list[float]] = {}
    for x, y in zip(series.x, series.y, strict=True):
        found.setdefault(_place(x, first, last, columns), []).append(y)
    return [(column, sum(values) / len(values)) for column, values in found.items()]


def _place(value: float, low: float, high: float, places: int) -> int:
    """Which of so many places from low to high a value has."""
    return round((value - low) / (high - low) * (places - 1)) if high > low else 0


def _legend(curve: Curve) -> str:
    parts = [". train loss"] if curve.loss.x else []
    if curve.best is not None:
        step, loss = curve.best
        parts.append(f"o validation loss, the lowest {loss:.4f} at step {step:,.0f}")
    return "   ".join(parts)
