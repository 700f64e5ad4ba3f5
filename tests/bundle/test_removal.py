"""Tidying up is not saving: what cannot be removed is said once and tried again, and no save or start fails for it."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from torch import nn

from core.bundle.storage import DISK
from core.checkpoint import CheckpointManager


@pytest.fixture
def refusing(monkeypatch):
    """Let a call fail for paths with some text in them, until told otherwise."""
    refused = []

    def change(call, *args):
        for name, number, text in refused:
            if call is name and text in str(args[0]):
                raise OSError(number, os.strerror(number), str(args[0]))
        return call(*args)

    monkeypatch.setattr(DISK, "change", change)
    return refused


def net(value):
    module = nn.Linear(3, 3)
    nn.init.constant_(module.weight, value)
    return module


def save(made, *steps):
    for step in steps:
        made.save(net(step), step=step)
        made.wait()


def steps(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


def left(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith((".trash", ".stage", ".committed", ".hist"))]


def newest(root):
    module = net(0)
    step = CheckpointManager("m", root, say=print).load(module)
    assert torch.equal(module.weight, torch.full((3, 3), float(step)))
    return step


@pytest.mark.parametrize(
    ("call", "number", "where"),
    [
        (os.replace, errno.EPERM, "step_00000001"),
        (os.replace, errno.EBUSY, "step_00000001"),
        (os.unlink, errno.EPERM, ".trash-step_00000001"),
        (os.rmdir, errno.ENOTEMPTY, ".trash-step_00000001"),
    ],
)
def test_a_kept_step_that_cannot_be_removed_is_said_once_and_goes_later(tmp_path, refusing, call, number, where):
    said = []
    with CheckpointManager("m", tmp_path, say=said.append, keep=1) as made:
        save(made, 1, 2)
        refusing.append((call, number, where))
        save(made, 3, 4, 5)
        warnings = [line for line in said if "WARNING" in line]
        assert len(warnings) == 1 and f"m/{where}" in warnings[0]
        assert (
            f": cannot be removed now ({os.strerror(number)}). Nothing needs it; the next save tries again."
            in warnings[0]
        )
        assert [line.split(" (")[0] for line in said if line.startswith("saved")] == [
            f"saved step {step} to {tmp_path / 'm'}" for step in (1, 2, 3, 4, 5)
        ]
        assert newest(tmp_path) == 5
        refusing.clear()
        save(made, 6)
    assert steps(tmp_path / "m") == [5] and left(tmp_path / "m") == []


def test_a_start_is_not_refused_for_what_a_killed_save_left(tmp_path, refusing, capsys):
    with CheckpointManager("m", tmp_path, say=print) as made:
        save(made, 1)
    (tmp_path / "m/.stage-0123456789abcdef").mkdir()
    (tmp_path / "m/.stage-0123456789abcdef/model.pt").write_bytes(b"half")
    refusing.append((os.unlink, errno.EPERM, ".stage-0123456789abcdef"))
    with CheckpointManager("m", tmp_path, say=print) as made:
        save(made, 2)
        assert capsys.readouterr().out.count("cannot be removed now (Operation not permitted)") == 1
        refusing.clear()
        save(made, 3)
    assert newest(tmp_path) == 3 and left(tmp_path / "m") == []


@pytest.mark.parametrize("name", [".DS_Store", ".nfs000000000012ab", ".fuse_hidden0000001"])
def test_a_file_that_a_system_leaves_in_a_commit_goes_with_it(tmp_path, name):
    with CheckpointManager("m", tmp_path, say=print) as made:
        save(made, 1)
        (tmp_path / "m/.committed").mkdir()
        (tmp_path / "m/.committed" / name).write_bytes(b"x")
        assert newest(tmp_path) == 1
        save(made, 2, 3)
    assert newest(tmp_path) == 3 and steps(tmp_path / "m") == [2] and left(tmp_path / "m") == []


def test_a_file_of_a_person_in_a_commit_is_set_aside_with_it(tmp_path):
    with CheckpointManager("m", tmp_path, say=print) as made:
        save(made, 1)
        (tmp_path / "m/.committed").mkdir()
        (tmp_path / "m/.committed/notes.txt").write_bytes(b"mine")
        save(made, 2)
    (aside,) = (tmp_path / "m").glob("aside_*")
    assert (aside / "notes.txt").read_bytes() == b"mine"
    assert newest(tmp_path) == 2 and left(tmp_path / "m") == []


def test_a_file_in_a_commit_of_a_folder_without_a_step_stops_no_first_save(tmp_path):
    (tmp_path / "m/.committed").mkdir(parents=True)
    (tmp_path / "m/.committed/.DS_Store").write_bytes(b"x")
    with CheckpointManager("m", tmp_path, say=print) as made:
        save(made, 1)
    assert newest(tmp_path) == 1 and left(tmp_path / "m") == []


@pytest.mark.parametrize("keep", [1, 3])
def test_steps_of_one_number_that_were_displaced_are_bounded_and_the_newest_stay(tmp_path, keep):
    said = []
    with CheckpointManager("m", tmp_path, say=said.append, keep=keep) as made:
        for value in range(12):
            made.save(net(value), step=7)
            made.wait()
    asides = sorted((tmp_path / "m").glob("aside_00000007_displaced_*"))
    values = sorted(float(torch.load(path / "model.pt", weights_only=True)["weight"][0, 0]) for path in asides)
    assert values == [float(value) for value in range(10 - keep, 10)]  # the newest two are the top and step 7
    removed = [line for line in said if line.startswith(f"removed {tmp_path / 'm'}/aside_00000007_displaced_")]
    assert removed and all(line.endswith(": a newer step of that number was set aside as well") for line in removed)


def test_what_a_person_put_in_the_way_of_a_step_is_never_removed(tmp_path):
    with CheckpointManager("m", tmp_path, say=print, keep=0) as made:
        save(made, 1)
        for number in range(3):
            (tmp_path / f"m/aside_00000001_displaced_{number}").mkdir()
            (tmp_path / f"m/aside_00000001_displaced_{number}/model.pt").write_bytes(b"mine")
        save(made, 2)
    assert len(list((tmp_path / "m").glob("aside_*/model.pt"))) == 3


def test_prune_counts_only_what_is_gone(tmp_path, refusing):
    said = []
    with CheckpointManager("m", tmp_path, say=said.append, keep=3) as made:
        save(made, 1, 2, 3, 4)
        refusing.append((os.replace, errno.EPERM, "step_00000001"))
        freed = made.prune(keep=1)
    folder = tmp_path / "m"
    assert steps(folder) == [1, 3] and freed > 0
    assert [line.split(" (")[0] for line in said if line.startswith("removed")] == [
        f"removed {folder / 'step_00000002'}"
    ]
    assert said[-1].startswith(f"WARNING: {folder / 'step_00000001'}: cannot be removed now (Operation not permitted).")
