"""Training: the curve of a run with what happened on the way, and a sample of its text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ...bundle.folder import LOG
from ...bundle.training_state import TrainingState
from ...errors import CheckpointError
from ..history import ASIDE, Entry, past_of
from ..inspect import Inspection
from .chart import Chart, Line, Mark
from .curve import Curve, Series, curve_beside, read_curve
from .markup import escaped, fold, number_text, table

_HEADING = '<section id="training"><h2>Training</h2>'

_BRANCHES, _MARKS, _ROWS = 6, 40, 40
"""Abandoned branches that are drawn, vertical lines, and rows of the table of evaluations."""


def curve_of(found: Inspection) -> Curve | None:
    """The log of a checkpoint of ours."""
    return curve_beside(found.path) if found.bundle is not None else None


def curve_section(curve: Curve | None, found: Inspection) -> Iterator[str]:
    """The chart of the losses, that of the learning rate, and the evaluations as a table."""
    if curve is None:
        if found.bundle is not None:
            yield f'{_HEADING}<p class="said">No metrics.jsonl lies beside it.</p></section>'
        return
    yield _HEADING
    entries = _entries(found.path)
    marks, branches = _marks(entries, found.step), list(_branches(entries))
    points = curve.points()
    lines = [
        Line("train loss", points["loss"]["x"], points["loss"]["y"], "thin raw"),
        *branches,
        Line("train loss, smoothed", points["smoothed"]["x"], points["smoothed"]["y"], "c1"),
        Line("validation loss", points["val_loss"]["x"], points["val_loss"]["y"], "c2", len(curve.val_loss.x) < 60),
    ]
    losses = Chart(lines, curve_said(curve), "step", "loss", 360, marks, ident="curve")
    if drawn := losses.svg():
        yield f"{losses.legend()}{drawn}"
        yield '<p class="read" hidden><label>Read the curve at step <input type="range" id="at" min="0" max="1000" '
        yield 'value="1000"></label> <output id="here"></output></p>'
    rate = Line("learning rate", points["learning_rate"]["x"], points["learning_rate"]["y"], "c3")
    if rate.x:
        said = f"The learning rate by step, from {number_text(rate.y[0])} to {number_text(rate.y[-1])}."
        yield Chart([rate], said, "step", "learning rate", 170, from_zero=True).svg()
    if marks:
        yield f'<ul class="marks">{"".join(f"<li>{escaped(mark.text)}</li>" for mark in marks)}</ul>'
    if curve.val_loss.x:
        yield fold("Evaluations", _evaluations(curve), note=str(len(curve.val_loss.x)))
    yield f'<p class="said">{escaped(curve.said)}</p></section>'


def curve_said(curve: Curve) -> str:
    """The curve in words."""
    said = []
    for name, series in (("Train loss", curve.loss), ("validation loss", curve.val_loss)):
        if series.x:
            ends = f"{number_text(series.y[0])} at step {series.x[0]:,.0f} to {number_text(series.y[-1])}"
            said.append(f"{name} from {ends} at step {series.x[-1]:,.0f}")
    if curve.best:
        said.append(f"best validation loss {curve.best[1]:.4f} at step {curve.best[0]:,.0f}")
    return "; ".join(said) + "."


def sample_section(sample: str) -> Iterator[str]:
    """A text that the model wrote."""
    if sample:
        lines = "\n".join(escaped(line) for line in sample[:4000].splitlines())
        yield f'<section id="sample"><h2>A sample of text</h2><blockquote>{lines}</blockquote></section>'


def _evaluations(curve: Curve) -> str:
    count = len(curve.val_loss.x)
    shown = sorted({round(i * (count - 1) / max(1, min(count, _ROWS) - 1)) for i in range(min(count, _ROWS))})
    rows = ((f"{curve.val_loss.x[i]:,.0f}", f"{curve.val_loss.y[i]:.4f}") for i in shown)
    return table(("step", "validation loss"), rows, "evaluations")


def _entries(path: Path) -> list[Entry]:
    """Every step of the model, kept and aside; none where its history cannot be read."""
    folder = path if path.is_dir() else path.parent
    with contextlib.suppress(CheckpointError, OSError):
        return past_of(folder).entries
    return []


def _marks(entries: list[Entry], shown: int | None) -> list[Mark]:
    """Where the run was resumed, where it went back, and the step that the page shows, in the order of the steps."""
    found: dict[tuple[float, str], None] = {}
    branches = [entry.branch["step"] for entry in entries if isinstance(entry.branch.get("step"), int)]
    for step in branches:
        found[step, f"step {step:,}: went back to it, and on from there"] = None
    for entry in entries:
        for step in _resumes(entry.state) - {*branches}:
            found[step, f"step {step:,}: resumed"] = None
        if entry.place == ASIDE and entry.why == "abandoned":
            found[entry.step, f"step {entry.step:,}: end of a branch that was abandoned"] = None
    newest = max((entry.step for entry in entries), default=None)
    if shown is not None and newest is not None and shown < newest:
        found[shown, f"step {shown:,}: this page"] = None
    return [Mark(step, said) for step, said in sorted(found)][:_MARKS]


def _resumes(state: TrainingState) -> set[int]:
    """The steps from which a program went on; a training state of an older version names the last one alone."""
    last = (state.retention or {}).get("resumed_from")
    return {*(state.resumes or []), *([last] if isinstance(last, int) else [])}


def _branches(entries: list[Entry]) -> Iterator[Line]:
    """The smoothed losses of abandoned branches, from where the run left them."""
    left = [entry.branch["step"] for entry in entries if isinstance(entry.branch.get("step"), int)]
    aside = [entry for entry in entries if entry.place == ASIDE and entry.why == "abandoned"]
    for entry in aside[:_BRANCHES]:
        log = entry.path / LOG
        if log.exists():
            begin = max((step for step in left if step <= entry.step), default=0)
            smooth = read_curve(log).loss.smoothed()
            first = next((i for i, step in enumerate(smooth.x) if step >= begin), len(smooth.x))
            points = Series(smooth.x[first:], smooth.y[first:]).points()
            yield Line(f"abandoned, to step {entry.step:,}", points["x"], points["y"], "gone")
