"""Links that somebody planted in a model's folder: nothing outside it is changed, and the reason is one sentence."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from torch import nn

from core.bundle.storage import DISK, Storage
from core.checkpoint import CheckpointManager
from core.errors import CheckpointError, SaveFailed
from core.logs.metrics import UNREADABLE, Metrics

FOLDERS = [".hist", ".committed", ".stage-0123456789abcdef", ".trash-1", "step_00000001", "step_00000009"]
FOLDERS += ["aside_00000001_displaced_0123456789abcdef", "model_sharded"]
FILES = [".lock", ".lock-owner", "metrics.jsonl", UNREADABLE, "model.pt", "config.json", "training_state.json"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Wait a moment for a sign of life of the writer that a planted record names."""
    monkeypatch.setattr("core.bundle.heartbeat.SILENCE", 0.2)


@pytest.fixture
def victim(tmp_path) -> Path:
    """A folder of somebody else, with what would be of use to a writer that is led there."""
    folder = tmp_path / "victim"
    folder.mkdir()
    for name in ("model.pt", "config.json", "training_state.json", "optimizer.pt", "notes.txt"):
        (folder / name).write_text(f"{name} of somebody else")
    (folder / ".moving").write_text("to step_00000007\n")
    return folder


def seen(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.iterdir())}


def net(value: float) -> nn.Module:
    module = nn.Linear(3, 3)
    nn.init.constant_(module.weight, value)
    return module


def save(made: CheckpointManager, step: int) -> None:
    made.save(net(step), step=step)
    made.wait()


@pytest.fixture
def model(tmp_path) -> Path:
    with CheckpointManager("m", tmp_path / "root", say=print, keep=2) as made:
        for step in (1, 2, 3):
            save(made, step)
    return tmp_path / "root" / "m"


def everything(model: Path) -> list[str]:
    """All that changes a model's folder; returns what was refused."""
    said: list[str] = []

    def attempt(act) -> None:
        try:
            with CheckpointManager(model.name, model.parent, say=said.append, keep=1) as made:
                act(made)
        except CheckpointError as error:
            said.append(f"refused: {error}")

    attempt(lambda made: save(made, 4))
    attempt(lambda made: save(made, 5))
    attempt(lambda made: made.go_back(4))
    attempt(lambda made: save(made, 6))
    attempt(lambda made: made.prune(keep=0))
    attempt(lambda made: made.load(net(0)))
    log = Metrics(model / "metrics.jsonl")
    for act in (lambda: log.cut(3), lambda: log.add(step=4, loss=1.0) or log.flush()):
        try:
            act()
        except CheckpointError as error:
            said.append(f"refused: {error}")
    return said


def plant(path: Path, make) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"was_{path.name}"))
    else:
        path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize("folder_renames", [True, False], ids=["renames", "moves"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_in_the_place_of_a_folder_leads_no_change_outside(model, victim, name, folder_renames, monkeypatch):
    monkeypatch.setattr(DISK, "folder_renames", folder_renames)
    before = seen(victim)
    plant(model / name, lambda path: path.symlink_to(victim))
    said = everything(model)
    assert seen(victim) == before
    if name in (".hist", ".committed"):
        refusal = f"refused: {model / name}: a link to {victim}, expected a file or folder of this program."
        assert any(line.startswith(refusal) for line in said)


def test_a_commit_that_leads_to_a_link_is_refused(model, victim):
    before = seen(victim)
    (model / ".stage-0").symlink_to(victim)
    (model / ".committed").write_text(".stage-0")
    said = everything(model)
    assert seen(victim) == before
    assert any(line.startswith(f"refused: {model / '.stage-0'}: a link to {victim}, expected a file") for line in said)


def test_a_folder_that_moves_file_by_file_enters_no_link(tmp_path, victim):
    storage = Storage()
    storage.folder_renames = False
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "notes.txt").write_text("ours")
    (tmp_path / "target").symlink_to(victim)
    before = seen(victim)
    with pytest.raises(SaveFailed, match=r"target: a link to .*victim, expected a file or folder of this program\."):
        storage.rename(tmp_path / "shards", tmp_path / "target")
    assert seen(victim) == before and (tmp_path / "shards" / "notes.txt").read_text() == "ours"


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_link_in_the_place_of_a_file_leads_no_change_outside(model, victim, tmp_path, name, kind):
    aims = {"link": victim / "notes.txt", "hard link": victim / "notes.txt", "folder": victim}
    target = aims.get(kind, tmp_path / "not_there")
    before = seen(victim)
    plant(model / name, lambda path: os.link(target, path) if kind == "hard link" else path.symlink_to(target))
    said = everything(model)
    assert seen(victim) == before and not (tmp_path / "not_there").exists()
    if name.startswith(".lock") and kind != "hard link":
        assert any(f"{model / name}: a link to {target}, expected a file" in line for line in said)


@pytest.mark.parametrize("name", [".lock", ".lock-owner", "metrics.jsonl", UNREADABLE])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_nobody_waits(model, name):
    (model / "metrics.jsonl").write_text('{"step": 1}\nnot JSON\n')
    plant(model / name, os.mkfifo)
    said = everything(model)
    assert any(f"{model / name}: a pipe or a device, expected a file of this program." in line for line in said)


def test_a_log_that_shares_its_bytes_with_another_folder_is_copied_before_it_grows(tmp_path):
    original, copy = tmp_path / "original.jsonl", tmp_path / "metrics.jsonl"
    original.write_text('{"step": 1}\n')
    os.link(original, copy)
    log = Metrics(copy)
    log.add(step=2)
    log.flush()
    assert original.read_text() == '{"step": 1}\n' and copy.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_place_where_a_dataset_is_prepared_is_no_link(tmp_path, victim):
    before = seen(victim)
    (tmp_path / "data.partial").symlink_to(victim)
    with (
        pytest.raises(
            SaveFailed, match=r"data\.partial: a link to .*victim, expected a file or folder of this program\."
        ),
        Storage().workplace(tmp_path / "data.partial", print),
    ):
        pass
    assert seen(victim) == before


def test_the_folder_of_a_model_and_its_root_may_be_links(tmp_path, model):
    (tmp_path / "elsewhere").symlink_to(model.parent)
    (model.parent / "alias").symlink_to(model)
    for root, name in ((tmp_path / "elsewhere", "m"), (model.parent, "alias")):
        with CheckpointManager(name, root, say=print) as made:
            step = (made.saved_step() or 0) + 1
            save(made, step)
        assert CheckpointManager("m", model.parent, say=print).load(net(0)) == step


def test_a_log_that_becomes_a_link_while_it_is_opened_leads_no_line_outside(tmp_path, victim):
    path, before, done = tmp_path / "metrics.jsonl", seen(victim), threading.Event()
    path.write_text("")

    def swap() -> None:
        for number in itertools.count():
            if done.is_set():
                return
            other = tmp_path / f"other{number % 2}"
            if number % 2:
                other.symlink_to(victim / "notes.txt")
            else:
                other.write_text("")
            other.replace(path)

    thread = threading.Thread(target=swap)
    thread.start()
    found: Counter[str] = Counter()
    end = time.monotonic() + 30
    try:
        while min(found["written"], found["refused"]) < 200 and time.monotonic() < end:
            try:
                with DISK.append(path) as log:
                    log.write(b"a line\n")
                found["written"] += 1
            except SaveFailed:
                found["refused"] += 1
    finally:
        done.set()
        thread.join()
    assert min(found["written"], found["refused"]) >= 200
    assert seen(victim) == before
