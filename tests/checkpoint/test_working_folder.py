"""A run stays where it began when the process changes its working folder, and says its paths as they were written."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from core.bundle.names import model_folder
from core.bundle.storage import DISK
from core.checkpoint import CheckpointManager
from core.console.anchored import anchored
from core.data.source import find_source
from core.logs.metrics import Metrics
from tests.makers.models import SMALL, TEXT, tokenizer, update


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders, `here` is the working one."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_saves_before_and_after_a_change_of_folder_go_to_one_place(folders):
    lines = []
    made = CheckpointManager("dante", say=lines.append)
    with made:
        model, optimizer, _ = made.initialize_for_training(dict(SMALL), tokenizer(), None, 1e-3)
        for step, place in enumerate(("here", "there", "here", "there"), 1):
            os.chdir(folders / place)
            update(model, optimizer)
            made.save(model, optimizer, step=step)
            made.wait()
        os.chdir(folders / "there")
        made.go_back(3)
        assert made.saved_step() == 3
        log = Metrics(made.get_path("metrics.jsonl"))
        log.add(step=3, loss=1.0)
        log.flush()
    assert sorted(p.name for p in folders.iterdir()) == ["here", "there"] and not list((folders / "there").iterdir())
    assert (folders / "here/checkpoints/dante/metrics.jsonl").read_text().startswith('{"step": 3')
    assert CheckpointManager("dante", folders / "here/checkpoints").saved_step() == 3
    assert [line.split(" (")[0] for line in lines[:2]] == [
        "saved step 1 to checkpoints/dante",
        "saved step 2 to checkpoints/dante",
    ]
    assert str(folders) not in "".join(lines), "what is printed stays relative"


def test_a_change_of_folder_while_a_save_is_written_changes_nothing(folders, monkeypatch):
    model = torch.nn.Linear(40, 40)
    optimizer = torch.optim.AdamW(model.parameters())
    made = CheckpointManager("m", say=lambda line: None)
    made.save(model, optimizer, step=1)
    made.wait()
    calls, moved = [], threading.Event()

    def change(call, *args):
        calls.append(call)
        if len(calls) == 5:
            os.chdir(folders / "there")
            moved.set()
        return call(*args)

    monkeypatch.setattr(DISK, "change", change)
    made.save(model, optimizer, step=2)
    made.wait()
    assert moved.is_set() and not list((folders / "there").iterdir())
    assert CheckpointManager("m", folders / "here/checkpoints").saved_step() == 2


def test_an_error_names_the_folder_as_it_was_written(folders):
    made = CheckpointManager("dante", "runs", say=lambda line: None)
    os.chdir(folders / "there")
    with pytest.raises(Exception, match=r"^runs/dante: this step is not kept|^runs/dante: step 7 is not kept"):
        made.go_back(7)
    assert (folders / "here/runs/dante").is_dir()


def test_the_text_of_a_run_is_found_from_anywhere(folders):
    Path("text.txt").write_text(TEXT)
    source = find_source("text.txt", None, None, "dante")
    recorded = source.record()
    os.chdir(folders / "there")
    assert source.files[0].read_text() == TEXT and str(source.path) == "text.txt"
    assert recorded["path"] == "text.txt" and len(source.stamp()) == 1


def test_what_is_made_of_an_anchored_path_is_anchored(folders):
    path = model_folder("runs", "dante")
    os.chdir(folders / "there")
    (path / "step").mkdir(parents=True)
    (path / "step/a.json").write_text("{}")
    expected = folders / "here/runs/dante"
    assert str(path) == "runs/dante" and os.fspath(path) == str(expected) and path.absolute() == expected
    assert [str(p) for p in path.rglob("*.json")] == ["runs/dante/step/a.json"]
    assert [str(p) for p in path.glob("*/a.json")] == ["runs/dante/step/a.json"]
    assert [os.fspath(p) for p in path.iterdir()] == [str(expected / "step")]
    assert path.resolve() == expected.resolve() and path.parent.exists() and path.with_name("dante").samefile(path)
    assert path == Path("runs/dante") and hash(path) == hash(Path("runs/dante"))
    assert pickle.loads(pickle.dumps(path)) == copy.deepcopy(path) == expected
    assert anchored(path) is path and anchored(expected) is expected
