"""Histogram: the values of one tensor as a small drawing, with a line at zero."""

from __future__ import annotations

import itertools

from ..statistics import Histogram

BINS = 48
"""Bins of a histogram."""

_HEIGHT = 36


def histogram_svg(found: Histogram, low: float, high: float) -> str:
    """Draw a histogram on the axis of its kind, from `low` to `high`, to the height of its own peak."""
    span = high - low or 1.0
    start, end = ((value - low) / span * BINS for value in (found.low, found.high))
    width = max((end - start) / BINS, 0.02)  # one place is still seen
    peak = max(found.counts, default=0) or 1
    heights = [round(_HEIGHT * count / peak) for count in found.counts]
    zero = f'<path class="zero" d="M{-low / span * BINS:.3g} 0v{_HEIGHT}"/>' if low <= 0 <= high else ""
    return (
        f'<svg viewBox="0 0 {BINS} {_HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path transform="matrix({width:.3g} 0 0 1 {start:.3g} 0)" d="M0 {_HEIGHT}{_steps(heights)}V{_HEIGHT}z"/>'
        f"{zero}</svg>"
    )


def _steps(heights: list[int]) -> str:
    """The outline of bars of width 1; equal neighbours are one piece."""
    return "".join(f"V{_HEIGHT - height}h{len(list(bins))}" for height, bins in itertools.groupby(heights))
