"""What a notebook shows of a model, of its checkpoints, and of progress."""

from __future__ import annotations

import re
import sys

import tqdm.auto

from core.console.progress import Lines, byte_bar
from core.model import GPT
from core.training.fit import FitResult
from tests.makers.models import config, manager, save_steps, tokenizer


def cells(html):
    rows = re.findall("<tr>(.*?)</tr>", html)
    return [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_a_manager_shows_its_steps_the_newest_first_with_loss_size_age_and_rules(tmp_path):
    assert manager(tmp_path)._repr_html_() == f"<p>{tmp_path}/dante: no step is saved yet</p>"
    save_steps(tmp_path, 3, keep=2, val_loss=lambda step: abs(step - 2.0))
    made = manager(tmp_path)
    shown = made._repr_html_()
    assert shown.startswith(f"<table><caption>{tmp_path}/dante</caption><tr><th>step</th><th>validation loss</th>")
    heading, *rows = cells(shown)
    assert heading == ["step", "validation loss", "size", "age", "kept by"]
    assert [row[:2] for row in rows] == [["3", "1.0000"], ["2", "0.0000"], ["1", "1.0000"]]
    assert [row[4] for row in rows] == ["newest", "newest 2, best", "newest 2"]
    assert all(re.fullmatch(r"\d+\.\d KB", row[2]) and row[3].endswith("seconds old") for row in rows)


def test_no_name_becomes_markup(tmp_path):
    save_steps(tmp_path, 1, "a<b>&")
    assert "a&lt;b&gt;&amp;</caption>" in manager(tmp_path, "a<b>&")._repr_html_()


def test_a_model_shows_its_sizes(tmp_path):
    model = GPT(config())
    model.tokenizer, model.step = tokenizer(), 1250
    rows = dict(cells(model._repr_html_()))
    assert model._repr_html_().startswith("<table><caption>GPT</caption><tr><th>step</th><td>1,250</td></tr>")
    assert rows["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    made = model.config
    assert rows["layers, heads, width"] == f"{made.n_layer}, {made.n_head}, {made.n_embd}"
    assert rows["weights"] == "float32 on cpu" and rows["tokenizer"].startswith("char, ")
    model.tokenizer = None
    assert dict(cells(model._repr_html_()))["tokenizer"] == "none"


def test_what_fit_returns_shows_how_it_ended():
    assert dict(cells(FitResult(1500, 1.44651, None)._repr_html_())) == {
        "ended": "done",
        "step": "1,500",
        "validation loss": "1.4465",
    }
    rows = dict(cells(FitResult(7, None, "SIGTERM")._repr_html_()))
    assert rows == {"ended": "stopped by SIGTERM", "step": "7", "validation loss": "not measured"}


def test_a_notebook_draws_bars_of_its_own(monkeypatch):
    assert isinstance(byte_bar("reading", 10), Lines)  # stderr is no terminal here
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with byte_bar("reading", 10) as bar:
        assert isinstance(bar, tqdm.auto.tqdm) and not bar.disable
