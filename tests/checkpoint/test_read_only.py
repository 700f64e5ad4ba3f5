"""`load` where the folder cannot be changed: a read-only mount, another user's folder."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest
import torch

from core.bundle.commit import ModelFolder
from core.bundle.storage import DISK, Storage
from core.checkpoint import CheckpointManager
from core.errors import NoneIntact
from tests.makers.models import flip


class ReadOnly(Storage):
    """A file system that refuses every change."""

    def change(self, call, *args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    def may_change(self, folder):
        return False


@pytest.fixture
def folder(tmp_path):
    """Steps 1 to 3 of a module whose weights are all its step, without the lock's file."""
    module = torch.nn.Linear(64, 8)
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    with CheckpointManager("dante", tmp_path, say=lambda _: None, keep=2) as made:
        for step in (1, 2, 3):
            for p in module.parameters():
                torch.nn.init.constant_(p, step)
                optimizer.state[p]["momentum_buffer"] = torch.full_like(p, step)
            made.save(module, optimizer, step=step)
            made.wait()
    (tmp_path / "dante/.lock").unlink()
    return tmp_path / "dante"


def listing(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def load(folder, **settings):
    """Load where nothing can be changed; returns the step, which weights and moments agree with, and what was said."""
    said, before = [], listing(folder)
    made = CheckpointManager("dante", folder.parent, say=said.append, **settings)
    if DISK.may_change(folder):
        made._folder = ModelFolder(folder, ReadOnly())
    module = torch.nn.Linear(64, 8)
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    try:
        step = made.load(module, optimizer)
    finally:
        assert listing(folder) == before
    assert all(p.eq(step).all() and optimizer.state[p]["momentum_buffer"].eq(step).all() for p in module.parameters())
    return step, said


def test_the_newest_step_is_loaded_and_nothing_is_changed(folder):
    assert load(folder) == (3, [])


@pytest.mark.parametrize("allow_fresh", [False, True])
def test_from_damage_it_walks_back_by_reading_alone(folder, allow_fresh):
    flip(folder / "model.pt", 1800)
    step, said = load(folder, allow_fresh=allow_fresh)
    assert step == 2 and len(said) == 1
    assert said[0].startswith(f"WARNING: {folder / 'model.pt'}") and said[0].endswith(
        f" Using step 2, the newest intact one. {folder} cannot be changed here, and stays as it is."
    )
    (folder / "training_state.json").unlink()
    flip(folder / "step_00000002/optimizer.pt", 2500)
    step, said = load(folder, allow_fresh=allow_fresh)
    assert step == 1 and "step_00000002/optimizer.pt" in said[0] and "Using step 1, the newest intact one." in said[0]
    flip(folder / "step_00000001/model.pt", 1800)
    with pytest.raises(NoneIntact, match=r"No intact older step is kept in .*, and nothing was changed"):
        load(folder, allow_fresh=allow_fresh)


@pytest.mark.full
def test_a_read_only_mount(folder, tmp_path):
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    for command in (["mount", "--bind", tmp_path, mounted], ["mount", "-o", "remount,ro,bind", mounted]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        there = mounted / "dante"
        assert not DISK.may_change(there) and load(there) == (3, [])
        flip(folder / "model.pt", 1800)
        step, said = load(there)
        assert step == 2 and f"{there} cannot be changed here" in said[0]
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="the rights of a folder do not stop root")
def test_a_folder_without_the_right_to_write(folder):
    flip(folder / "model.pt", 1800)
    folder.chmod(0o555)
    try:
        assert load(folder)[0] == 2
    finally:
        folder.chmod(0o755)
