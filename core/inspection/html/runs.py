"""Runs: the models of a folder on one page, their curves over each other, and in which settings they differ."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...bundle.bundle import open_bundle
from ...console.words import size_text
from ...containers.pickles.inert import as_text
from ...errors import CheckpointError
from ..inspect import Facts
from .chart import Chart, Line
from .curve import Curve, Series, curve_beside
from .document import document, publish
from .markup import box, count_text, duration_text, escaped, finite, fold, moment, table

_RUNS, _BUCKETS, _SETTINGS = 24, 100, 60
"""Runs whose curves are drawn (eight colours, three dashes), buckets of each, and settings that are listed."""


@dataclass
class Run:
    """One model of the folder; `facts` is its line in the list of all."""

    facts: Facts
    state: Facts = field(default_factory=dict)
    settings: Facts = field(default_factory=dict)
    curve: Curve = field(default_factory=Curve)
    bytes: int = 0  # of all its files, kept steps included

    @property
    def name(self) -> str:
        """The folder's name."""
        return str(self.facts["name"])

    def each_step(self, counter: str) -> float:
        """What one step takes of a counter of the training state, as an average; 0 where it is not recorded."""
        value, step = finite(self.state.get(counter)), finite(self.facts.get("step"))
        return value / step if value and step and step > 0 else 0.0


def write_runs(file: Path, root: Path, models: Sequence[Facts], *, overwrite: bool = False) -> None:
    """Write the page of a folder of models, whose list is given.

    Raises: InputError as `publish`.
    """
    publish(file, lambda: runs_page(root, models), overwrite)


def runs_page(root: Path, models: Sequence[Facts], *, live: str = "") -> str:
    """The page of a folder of models as text; `live` as in `document`."""
    runs = [_run(root, facts) for facts in models]
    title = root.absolute().name or str(root)
    opened = [run for run in runs if run.state]
    size = size_text(sum(run.bytes for run in runs))
    body = [
        f"<header><h1>{escaped(title)}</h1><p>{len(runs)} model{'s' * (len(runs) != 1)}, {size}</p>",
        f'<p class="path">{escaped(str(root))}</p></header>',
        box("red", "Cannot be read", [f"{run.name}: {run.facts['error']}" for run in runs if "error" in run.facts]),
        *_curves(opened),
        *_list(runs),
        *_differences(opened),
    ]
    return document(title, body, live=live)


def _run(root: Path, facts: Facts) -> Run:
    """Read what a page shows of one model; one that is not ours, or damaged, keeps its line alone."""
    run, folder = Run(facts), root / facts["name"]
    with contextlib.suppress(OSError):
        run.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if "error" not in facts and "val_loss" in facts:
        with contextlib.suppress(CheckpointError, OSError), open_bundle(folder) as bundle:
            run.state = bundle.state.to_dict()
            run.settings = _settings(bundle.config_values or {}, run.state)
            run.curve = curve_beside(folder) or Curve()
    return run


def _settings(config: Facts, state: Facts) -> Facts:
    """What a run was made with, by name: its config, its settings, its data."""
    found = dict(config)
    for group, prefix in (("training", ""), ("environment", "on "), ("data", "data ")):
        values = state.get(group)
        if isinstance(values, dict):
            found |= {prefix + str(name): value for name, value in values.items()}
    found.pop("data mtime_ns", None)
    return {**found, "optimizer": state.get("optimizer_class"), "seed": state.get("seed")}


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    """The losses of all runs, by step, by tokens and by time."""
    drawn = [run for run in runs if len(run.curve.loss.x) or len(run.curve.val_loss.x)][:_RUNS]
    if not drawn:
        return
    yield '<section id="curves"><h2>Losses</h2>'
    axes = (("step", ""), ("tokens", "tokens_seen"), ("hours", "elapsed_seconds"))
    for x_title, counter in axes:
        lines = [line for i, run in enumerate(drawn) for line in _lines(run, i, x_title, counter)]
        best = "; ".join(f"{run.name} {run.curve.best[1]:.4f}" for run in drawn if run.curve.best)
        chart = Chart(lines, f"Losses by {x_title}. Best validation loss: {best or 'none'}.", x_title, "loss", 400)
        if svg := chart.svg():
            named = [Line(line.name, line.x, line.y, line.style) for line in lines if "thin" not in line.style]
            legend = Chart(named, "", "", "").legend()
            yield fold(f"By {x_title}", legend + svg, opened=not counter)
    yield '<p class="said">Bold: validation loss; thin: train loss, smoothed. Tokens and hours are those of the newest '
    yield "step, spread evenly over its steps."
    yield f" The first {_RUNS} runs are drawn.</p></section>" if len(runs) > _RUNS else "</p></section>"


def _lines(run: Run, number: int, x_title: str, counter: str) -> Iterator[Line]:
    """The lines of one run, on an axis of steps, or of what each step takes of a counter."""
    each = run.each_step(counter) / (3600 if x_title == "hours" else 1) if counter else 1.0
    style = f"c{number % 8 + 1} dash{number // 8}"
    evaluations = run.curve.val_loss
    pairs = [(run.curve.loss.smoothed(), f"{style} thin"), (evaluations, style)]
    if not len(evaluations.x):
        pairs = [(run.curve.loss.smoothed(), style)]
    for series, look in pairs:
        if each and len(series.x):
            yield _line(run.name, series, each, look)


def _line(name: str, series: Series, each: float, style: str) -> Line:
    points = series.points(_BUCKETS)
    return Line(name, [step * each for step in points["x"]], points["y"], style)


def _list(runs: Sequence[Run]) -> Iterator[str]:
    """Every model: its newest step, its losses, what it took, how large it is, the best one first."""
    heading = ("model", "step", "validation loss", "best", "tokens", "time", "newest step", "all files", "saved")
    ranked = sorted(runs, key=lambda run: run.curve.best[1] if run.curve.best else float("inf"))
    rows = table(heading, map(_row, ranked), "models")
    yield f'<section id="models"><h2>Models <small>{len(runs)}</small></h2>{rows}</section>'


def _row(run: Run) -> tuple[str, ...]:
    facts, best = run.facts, run.curve.best
    tokens, seconds = (finite(run.state.get(name)) for name in ("tokens_seen", "elapsed_seconds"))
    loss = finite(facts.get("val_loss"))
    return (
        escaped(run.name),
        escaped(as_text(facts.get("step", "cannot be read"), 40)) if facts.get("step") is not None else "unknown",
        f"{loss:.4f}" if loss is not None else "",
        f"{best[1]:.4f} at step {best[0]:,.0f}" if best else "",
        count_text(tokens) if tokens else "",
        duration_text(seconds) if seconds else "",
        size_text(facts["bytes"]) if "bytes" in facts else "",
        size_text(run.bytes),
        moment(facts.get("saved_at")),
    )


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    """The settings in which the runs differ, a row for each run."""
    if len(runs) < 2:
        return
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    texts = {name: [_text(run.settings, name) for run in runs] for name in names}
    differ = [name for name in names if len(set(texts[name])) > 1]
    yield '<section id="settings"><h2>Settings that differ</h2>'
    if differ:
        shown = differ[:_SETTINGS]
        rows = ((escaped(run.name), *(escaped(texts[name][i]) for name in shown)) for i, run in enumerate(runs))
        yield table(("model", *shown), rows, "settings that differ")
    more = f" {len(differ) - _SETTINGS} more differ." if len(differ) > _SETTINGS else ""
    yield f'<p class="said">{len(names) - len(differ)} settings are the same in all of them.{more}</p></section>'


def _text(settings: Facts, name: str) -> str:
    value: Any = settings.get(name)
    return as_text(value, 60) if name in settings else "-"
