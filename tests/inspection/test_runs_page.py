"""The page of a folder of models: their curves over each other, the settings that differ, their sizes."""

from __future__ import annotations

import json
import re
import shutil
from random import Random

import pytest

import inspect_model
from tests.inspection.test_page import Read
from tests.makers.models import save_durably, started


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    made, model, optimizer = started(root)
    made.record(tokens_seen=64_000, elapsed_seconds=7200.0, training={"learning_rate": 1e-3, "max_iters": 1000})
    save_durably(made, model, optimizer, step=1000)
    made.close()
    return root / "dante"


def log(folder, count, seed=0, every=10):
    random, lines = Random(seed), []
    for step in range(1, count + 1):
        lines.append({"step": step, "loss": 2 + 3 / step**0.5 + random.gauss(0, 0.05), "learning_rate": 1e-3})
        if step % every == 0:
            lines.append({"step": step, "val_loss": 2 + seed + 3 / step**0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def page_of(root, file):
    code = inspect_model.main([str(root), "--html", str(file)])
    return code, file.read_text(encoding="utf-8")


def test_twenty_runs_are_on_one_page_of_at_most_500_kb(one, tmp_path, capsys):
    root = tmp_path / "runs"
    for i in range(20):
        folder = root / f"run_{i}"
        shutil.copytree(one, folder)
        log(folder, 2500, seed=i)
    code, text = page_of(root, tmp_path / "runs.html")
    assert code == 0 and len(text.encode()) < 500_000
    assert f"wrote {tmp_path / 'runs.html'} (" in capsys.readouterr().err
    read = Read(text)
    assert read.faults == [] and read.open == []
    names = [value for key, value in read.attributes if key == "data-name"]
    assert {names.count(f"run_{i}") for i in range(20)} == {6}  # two losses, over three axes
    assert [read.has(f"By {axis}") for axis in ("step", "tokens", "hours")] == [True] * 3
    assert {path.count("l") <= 200 for path in re.findall(r'data-name="[^"]*" d="([^"]+)"', text)} == {True}
    assert read.text.index("run_0") < read.text.index("run_19")  # the best validation loss first
    ends = [float(end.split()[1]) for key, end in read.attributes if key == "data-x"]
    assert ends == pytest.approx([2500, 2500 * 64, 2500 * 0.002])


def test_only_the_settings_that_differ_are_listed(one, tmp_path):
    root = tmp_path / "runs"
    for name, rate in (("a", 1e-3), ("b<i>", 2e-3)):
        shutil.copytree(one, root / name)
        log(root / name, 20)
        path = root / name / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "dropout": rate}))
    _, text = page_of(root, tmp_path / "runs.html")
    section = text[text.index('id="settings"') :]
    assert re.findall("<th scope[^>]*>([^<]*)", section) == ["model", "dropout"]
    assert "<td>0.001</td>" in section and "<td>0.002</td>" in section and "n_embd" not in section
    assert "<i>" not in section.replace("&lt;i&gt;", "")


def test_a_model_that_does_not_open_is_named_and_the_others_are_shown(one, tmp_path):
    root = tmp_path / "runs"
    for name in ("good", "bad"):
        shutil.copytree(one, root / name)
    (root / "bad/training_state.json").write_text("{")
    _, text = page_of(root, tmp_path / "runs.html")
    read = Read(text)
    assert read.has("Cannot be read") and read.has("good") and "bad: " in text
    assert ("id", "curves") not in read.attributes
