"""Weights: statistics and histograms of a model's tensors, those of all layers of a kind together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ...console.words import printable
from ...errors import CheckpointError
from ..inspect import Facts, Inspection
from ..statistics import Histogram, Stat, histogram, statistics
from .chart import Chart, Line
from .histogram import BINS, histogram_svg
from .markup import escaped, fold, number_text, rounded

Progress = Callable[[int], object]

_KINDS, _HISTOGRAMS = 300, 1_500
"""Limits of a page: kinds of tensors that are drawn, and histograms of all of them."""

_LINES = 24
"""Kinds in the chart of norms: eight colours, each in three dashes."""


@dataclass
class Layer:
    """One tensor of a kind; `number` is None for what no layer has."""

    number: int | None
    rms: float | None
    shape: Histogram | None


@dataclass
class Weights:
    """What was read of a model's tensors."""

    stats: dict[str, Stat] = field(default_factory=dict)
    kinds: dict[str, list[Layer]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    drawn: int = 0  # histograms

    @classmethod
    def of(cls, found: Inspection, progress: Progress) -> Weights:
        """Read a model's tensors, each twice; one that cannot be read becomes a note."""
        made = cls()
        for name in found.weights:
            try:
                made._add(found, name, progress)
            except CheckpointError as error:
                made.notes.append(str(error))
        for layers in made.kinds.values():
            layers.sort(key=lambda layer: (layer.number is not None, layer.number or 0))
        return made

    def _add(self, found: Inspection, name: str, progress: Progress) -> None:
        stat = next(statistics(found.container, [found.key + name], progress))
        self.stats[name] = stat
        if stat.nan or stat.inf:
            self.not_finite.append(f"{name}: {stat.nan:,} NaN, {stat.inf:,} Inf of {stat.count:,}")
        kind, number = kind_and_layer(name)
        if stat.note or self.drawn >= _HISTOGRAMS or (kind not in self.kinds and len(self.kinds) >= _KINDS):
            return
        spec = found.container.tensors[found.key + name]
        shape = histogram(found.container, spec, BINS, stat)
        progress(spec.nbytes)
        self.drawn += 1
        self.kinds.setdefault(kind, []).append(Layer(number, _rms(stat), shape))

    def norms(self) -> str:
        """The chart of norms by layer; empty for a model without layers."""
        lines: list[Line] = []
        for name, layers in self.kinds.items():
            points = [(float(one.number), one.rms) for one in layers if one.number is not None and one.rms]
            if len(points) > 1 and len(lines) < _LINES:
                style = f"c{len(lines) % 8 + 1} dash{len(lines) // 8}"
                lines.append(Line(_short(name), [p[0] for p in points], [p[1] for p in points], style))
        chart = Chart(lines, _norms_said(lines), "layer", "RMS of the weights", 340, log=True)
        return chart.svg() + chart.legend() if lines else ""

    def histograms(self) -> Iterator[str]:
        """The histograms, one fold for each kind, the largest kind open."""
        largest = max(self.kinds, key=lambda name: (len(self.kinds[name]) > 1, self._numbers(name)), default=None)
        for name, layers in self.kinds.items():
            shapes = [layer.shape for layer in layers if layer.shape is not None]
            if shapes:
                low, high = min(shape.low for shape in shapes), max(shape.high for shape in shapes)
                said = f"{number_text(low)} to {number_text(high)}"
                rows = "".join(_row(layer, low, high) for layer in layers if layer.shape is not None)
                note = f"{len(layers)} layers, {said}" if layers[0].number is not None else said
                yield fold(name, f'<ul class="hist">{rows}</ul>', note=note, opened=name == largest)

    def _numbers(self, name: str) -> int:
        return sum(sum(layer.shape.counts) for layer in self.kinds[name] if layer.shape is not None)

    def rows(self, tensors: list[Facts], key: str) -> list[list[Any]]:
        """The rows of the table of tensors; `key` precedes the names of the weights there."""
        rows = []
        for t in tensors:
            shape = " x ".join(str(n) for n in t["shape"])
            row = [printable(t["name"]), shape, math.prod(t["shape"]), t["dtype"], t["bytes"]]
            stat = self.stats.get(t["name"].removeprefix(key)) if t["name"].startswith(key) else None
            if stat is not None:
                numbers = [rounded(v) for v in (stat.mean, stat.std, stat.min, stat.max)]
                row += [*numbers, _rms(stat), rounded(stat.zero_fraction), stat.nan + stat.inf]
            rows.append(row)
        return rows


def kind_and_layer(name: str) -> tuple[str, int | None]:
    """A name with {i} in place of its first number, and that number."""
    match = re.search(r"(?<![^.])\d{1,9}(?![^.])", name)
    if match is None:
        return name, None
    return f"{name[: match.start()]}{{i}}{name[match.end() :]}", int(match[0])


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:30]}…{name[-29:]}"


def _rms(stat: Stat) -> float | None:
    """The root mean square: a norm that is comparable between tensors of different sizes."""
    finite = stat.count - stat.nan - stat.inf
    return rounded(stat.norm / math.sqrt(finite)) if finite else None


def _norms_said(lines: list[Line]) -> str:
    """The chart of norms in words: how each kind changes from the first layer to the last."""
    changes = (f"{line.name} {number_text(line.y[0])} to {number_text(line.y[-1])}" for line in lines)
    return "RMS of the weights by layer, from the first to the last: " + "; ".join(changes)


def _row(layer: Layer, low: float, high: float) -> str:
    assert layer.shape is not None
    said = f"{number_text(layer.shape.low)} to {number_text(layer.shape.high)}"
    label = "" if layer.number is None else str(layer.number)
    return f"<li><span>{escaped(label)}</span>{histogram_svg(layer.shape, low, high)}<small>{said}</small></li>"
