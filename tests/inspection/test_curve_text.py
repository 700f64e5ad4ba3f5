"""The drawing of a run's losses in the terminal."""

from __future__ import annotations

import json
import re

import pytest

import inspect_model
from core.console.commandline import WRONG_USE
from core.errors import CheckpointNotFound
from core.inspection.curve_text import HEIGHT, curve_lines
from core.inspection.html.curve import read_curve


def log(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def falling(steps):
    """A loss that falls from 4 by 1 in so many steps, and its measure at each quarter."""
    lines = [{"step": step, "loss": 4 - (step - 1) / (steps - 1)} for step in range(1, steps + 1)]
    return [*lines, *({"step": steps * k // 4, "val_loss": 4.0 - k / 4} for k in range(1, 5))]


@pytest.mark.parametrize("width", [10, 40, 80, 200])
@pytest.mark.parametrize("steps", [16, 1000])
def test_a_line_falls_from_one_corner_to_the_other_and_nothing_is_wider_than_the_terminal(tmp_path, width, steps):
    drawn = list(curve_lines(read_curve(log(tmp_path / "metrics.jsonl", *falling(steps))), width))
    assert len(drawn) == HEIGHT + 3 and all(len(line) <= max(width, 30) for line in drawn[:-1])
    rows = [line[9:] for line in drawn[:HEIGHT]]
    labels = [float(line[:7]) for line in drawn[:HEIGHT:5]]
    assert labels == pytest.approx([4, 11 / 3, 10 / 3, 3], abs=0.03)  # of many steps a column shows the mean
    assert rows[0][0] == "." and rows[-1][-1] == "o" and max(map(len, rows)) == max(width, 30) - 10
    columns = [column for row in rows for column, sign in enumerate(row) if sign == "."]
    assert columns == sorted(columns)
    assert drawn[-2].split() == ["1", "step", f"{steps:,}"]
    assert drawn[-1] == f". train loss   o validation loss, the lowest 3.0000 at step {steps:,}"


def test_one_measure_alone_is_drawn(tmp_path):
    drawn = list(curve_lines(read_curve(log(tmp_path / "metrics.jsonl", {"step": 7, "val_loss": 2.5})), 40))
    assert drawn[HEIGHT - 1] == "  2.500 |o" and drawn[-1] == "o validation loss, the lowest 2.5000 at step 7"


def test_the_command_draws_as_wide_as_the_terminal_and_says_where_there_is_no_log(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "dante"
    folder.mkdir()
    with pytest.raises(CheckpointNotFound, match=re.escape(f"{folder}: no metrics.jsonl is here, so there is no loss")):
        inspect_model.main([str(folder), "--curve"])
    log(folder / "metrics.jsonl", {"step": 1})
    with pytest.raises(CheckpointNotFound, match=r"1 lines of metrics\.jsonl.*, so there is no loss to draw\.$"):
        inspect_model.main([str(folder), "--curve"])
    log(folder / "metrics.jsonl", *falling(50))
    monkeypatch.setenv("COLUMNS", "66")
    assert inspect_model.main([str(folder), "--curve"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{folder}: 54 lines of metrics.jsonl." and len(shown[HEIGHT + 1]) == 65
    with pytest.raises(SystemExit, match=str(WRONG_USE)):
        inspect_model.main([str(folder), "--curve", "--json"])
