"""Progress: a bar in a terminal, a line every ten seconds in a file, nothing under --quiet."""

from __future__ import annotations

import io
import sys
import types

import pytest
from tqdm import tqdm

from core.console import progress
from core.console.words import Output


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_into_a_file_a_run_is_a_line_every_ten_seconds(clock, capsys):
    with progress.step_bar(100, 400, show=True) as bar:
        for _ in range(200):
            clock[0] += 0.125  # exact in binary
            bar.update()
            bar.set_postfix_str("loss 2.3, 12,345 tokens/s")
    assert capsys.readouterr().err == (
        "45% | 180/400 [00:10<00:27,  8.00step/s, loss 2.3, 12,345 tokens/s]\n"
        "65% | 260/400 [00:20<00:17,  8.00step/s, loss 2.3, 12,345 tokens/s]\n"
    )


@pytest.mark.parametrize(
    ("bar", "line"),
    [
        (progress.byte_bar, "converting: 50% | 1.00G/2.00G [00:20<00:20, 50.0MB/s]\n"),
        (progress.token_bar, "converting: 50% | 1.00G/2.00G [00:20<00:20, 50.0M tokens/s]\n"),
    ],
)
def test_work_in_bytes_or_tokens_says_what_it_is_and_short_work_nothing(clock, capsys, bar, line):
    with bar("converting", 2 * 10**9) as shown:
        clock[0] += 9.9
        shown.update(1)
        assert capsys.readouterr().err == ""
        clock[0] += 10.1
        shown.update(10**9 - 1)
    assert capsys.readouterr().err == line


def test_quiet_shows_none(clock, capsys, monkeypatch):
    monkeypatch.setattr(Output, "quiet", True)
    with progress.byte_bar("converting", 10) as bar, progress.step_bar(0, 10, show=True) as steps:
        clock[0] += 100
        bar.update(10)
        steps.update(10)
        steps.set_postfix_str("loss 1")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.step_bar(0, 4, show=True) as bar:
        bar.update(4)
    assert isinstance(bar, tqdm) and "100%|" in terminal.getvalue() and "4/4" in terminal.getvalue()
