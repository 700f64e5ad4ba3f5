"""The curve of a training run, from its log metrics.jsonl."""

from __future__ import annotations

import bisect
import io
import itertools
import json
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ...containers.container import open_file
from ...errors import CheckpointError

Points = dict[str, list[float]]

BUCKETS = 500
"""Buckets to which a long curve is thinned; each keeps its lowest and its highest point."""

_LONGEST_LINE = 1 << 16


@dataclass
class Series:
    """Points in the order of their steps; all of them are finite."""

    x: array[float] = field(default_factory=lambda: array("d"))
    y: array[float] = field(default_factory=lambda: array("d"))

    def smoothed(self) -> Series:
        """The exponential moving average over a fiftieth of the points, near the start over a third of those so far."""
        lowest = min(1.0, 2 / (len(self.y) / 50 + 1))
        mean, means = 0.0, array("d")
        for i, value in enumerate(self.y):
            share = max(lowest, 3 / (i + 3))
            mean = (1 - share) * mean + share * value
            means.append(mean)
        return Series(self.x, means)

    def points(self, buckets: int = BUCKETS) -> Points:
        """As many points as a screen can show, the extremes and both ends among them."""
        chosen: Iterable[int] = range(len(self.x))
        if len(self.x) > 2 * buckets:
            buckets -= 1  # for the two ends
            edges = [len(self.x) * i // buckets for i in range(buckets + 1)]
            spans = [range(first, end) for first, end in itertools.pairwise(edges)]
            ends = ({min(span, key=self.y.__getitem__), max(span, key=self.y.__getitem__)} for span in spans)
            chosen = sorted({0, len(self.x) - 1}.union(*ends))
        return {"x": [self.x[i] for i in chosen], "y": [float(f"{self.y[i]:.6g}") for i in chosen]}


@dataclass
class Curve:
    """The series of a log, and in `said` a summary of what was read and left out."""

    loss: Series = field(default_factory=Series)
    val_loss: Series = field(default_factory=Series)
    learning_rate: Series = field(default_factory=Series)
    grad_norm: Series = field(default_factory=Series)
    said: str = ""

    def points(self) -> dict[str, Points]:
        """All series thinned, and the smoothed loss."""
        return {
            "loss": self.loss.points(),
            "val_loss": self.val_loss.points(),
            "smoothed": self.loss.smoothed().points(BUCKETS // 2),  # smooth lines need fewer
            "learning_rate": self.learning_rate.points(BUCKETS // 4),
        }

    @property
    def best(self) -> tuple[float, float] | None:
        """Step and validation loss of the best evaluation."""
        if not self.val_loss.y:
            return None
        i = min(range(len(self.val_loss.y)), key=self.val_loss.y.__getitem__)
        return self.val_loss.x[i], self.val_loss.y[i]


def measured_at(path: Path, step: int | None) -> dict[str, float]:
    """What the log beside a checkpoint of ours holds of one step: validation loss, learning rate, gradient norm."""
    curve = curve_beside(path)
    series = {name: getattr(curve, name) for name in ("val_loss", "learning_rate", "grad_norm")} if curve else {}
    at = {name: bisect.bisect_left(one.x, step) for name, one in series.items()} if step is not None else {}
    return {name: series[name].y[i] for name, i in at.items() if i < len(series[name].x) and series[name].x[i] == step}


def curve_beside(path: Path) -> Curve | None:
    """Read the log beside a checkpoint of ours: in its folder, or for a kept step in the folder above."""
    folder = path if path.is_dir() else path.parent
    places = [folder, folder.parent] if folder.name.startswith("step_") else [folder]
    file = next((place / "metrics.jsonl" for place in places if (place / "metrics.jsonl").exists()), None)
    return read_curve(file) if file is not None else None


def read_curve(path: Path) -> Curve:
    """Read a log line by line; values that are damaged, out of order or not finite are left out and counted."""
    curve = Curve()
    lines = left_out = 0
    not_finite: list[int] = []
    try:
        with io.BufferedReader(open_file(path)) as file:  # type: ignore[type-var]  # it is a FileIO
            while line := file.readline(_LONGEST_LINE):
                lines += 1
                step, values = _numbers(line)
                series: dict[str, Series] = {name: getattr(curve, name) for name in values}
                if not series or any(len(s.x) and s.x[-1] >= step for s in series.values()):
                    left_out += 1
                    continue
                for name, value in values.items():
                    if math.isfinite(value):
                        series[name].x.append(step)
                        series[name].y.append(value)
                    else:
                        not_finite.append(step)
    except (CheckpointError, OSError) as error:
        return Curve(said=f"{path.name} cannot be read: {error}")
    said = [f"{lines:,} lines of {path.name}"]
    if left_out:
        said.append(f"{left_out:,} damaged or out of order and left out")
    steps = curve.loss.x
    missing = int(steps[-1] - steps[0]) + 1 - len(steps) if steps else 0
    if missing:
        said.append(f"no train loss for {missing:,} of the steps {steps[0]:.0f} to {steps[-1]:.0f}")
    if not_finite:
        said.append(f"NaN or Inf in {len(not_finite):,} places, the first at step {not_finite[0]:,}")
    curve.said = "; ".join(said) + "."
    return curve


def _numbers(line: bytes) -> tuple[int, dict[str, float]]:
    """Step and numbers of a line; no numbers when it is damaged."""
    try:
        values = json.loads(line)
        step = values["step"]
        if type(step) is int and 0 <= step < 1 << 53:
            names = ("loss", "val_loss", "learning_rate", "grad_norm")
            return step, {name: float(values[name]) for name in names if type(values.get(name)) in (int, float)}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OverflowError):
        return 0, {}
    return 0, {}
