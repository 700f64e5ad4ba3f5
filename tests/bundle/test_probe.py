"""What a file system lacks is found before there is anything to lose: said once, worked around, or refused."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.bundle import probe as probing
from core.bundle.commit import ModelFolder
from core.bundle.probe import probe
from core.bundle.storage import DISK, Storage
from core.checkpoint import CheckpointManager
from core.errors import SaveFailed
from core.inspection.inspect import inspect_path
from tests.makers.models import (
    SMALL,
    equal,
    manager,
    save_durably,
    save_steps,
    started,
    state_of,
    tokenizer,
    train_and_save,
    update,
)

try:
    import fcntl
except ImportError:
    fcntl = None

posix = pytest.mark.skipif(os.name != "posix", reason="file systems of POSIX")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing is probed yet, and the switches of the disk are afterwards what they were."""
    monkeypatch.setattr(probing, "ENABLED", True)
    monkeypatch.setattr(probing, "_probed", set())
    before = dict(vars(DISK))
    yield
    vars(DISK).clear()
    vars(DISK).update(before)


def refusing(monkeypatch, name, number, when=lambda *args: True):
    """Let the system refuse one of its calls, as a mount does."""
    call = getattr(os, name)

    def refuse(*args, **how):
        if when(*args):
            raise OSError(number, os.strerror(number))
        return call(*args, **how)

    refuse.__name__ = name
    monkeypatch.setattr(os, name, refuse)


def is_folder(source, *_):
    return Path(source).is_dir()


def is_open_folder(fd):
    return Path(f"/proc/self/fd/{fd}").is_dir()


def is_open_file(fd):
    return not is_open_folder(fd)


def resumed(root, model):
    lines = []
    with CheckpointManager("dante", root, say=lines.append) as made:
        again, _, step = made.initialize_for_training({}, "char", None, 1e-3)
    assert step == model.step and equal(again.state_dict(), model.state_dict())
    return lines


# A file system that has everything


def test_the_probe_says_nothing_leaves_nothing_and_is_quick(tmp_path):
    seconds = []
    for number in range(9):
        folder = tmp_path / str(number)
        folder.mkdir()
        started_at = time.perf_counter()
        assert probe(ModelFolder(folder)) is None
        seconds.append(time.perf_counter() - started_at)
        assert list(folder.iterdir()) == []
    assert min(seconds) < 0.02, seconds  # a median would measure what else the disk does


def test_it_is_made_once_for_each_folder_and_process(tmp_path):
    calls = []

    class Counting(Storage):
        def change(self, call, *args):
            calls.append(call.__name__)
            return super().change(call, *args)

    place = ModelFolder(tmp_path, Counting())
    probe(place)
    assert {"mkdir", "open", "write", "fsync", "replace", "link", "unlink", "rmdir"} <= set(calls)
    made = len(calls)
    probe(place)
    probe(ModelFolder(tmp_path / ".", Counting()))
    assert len(calls) == made


def test_a_manager_probes_before_it_trains_and_a_saver_before_it_saves(tmp_path):
    with manager(tmp_path, "one"):
        pass
    assert probing._probed == {str((tmp_path / "one").resolve())}
    made, model, optimizer = started(tmp_path, "two")
    made.close()
    probing._probed.clear()
    save_durably(manager(tmp_path, "two"), model, optimizer, step=1)
    assert probing._probed == {str((tmp_path / "two").resolve())}


def test_who_reads_does_not_probe(tmp_path):
    save_steps(tmp_path, 1)
    probing._probed.clear()
    CheckpointManager.load_for_inference("dante", tmp_path)
    with inspect_path(tmp_path / "dante"):
        pass
    assert probing._probed == set()


# What a mount may lack

MOUNTS = {
    "links": ("link", errno.ENOSYS, None, "no hard links (the files of older steps move)", "links"),
    "file fsync EINVAL": ("fsync", errno.EINVAL, is_open_file, "no fsync of files (after a power loss", "file_fsync"),
    "file fsync": ("fsync", errno.EOPNOTSUPP, is_open_file, "no fsync of files (after a power loss", "file_fsync"),
    "folder fsync": ("fsync", errno.EINVAL, is_open_folder, "no fsync of folders (a power loss", "folder_fsync"),
}


@posix
@pytest.mark.parametrize("mount", MOUNTS)
def test_what_a_mount_lacks_is_said_once_and_saves_go_another_way(tmp_path, monkeypatch, mount):
    name, number, when, said, switch = MOUNTS[mount]
    refusing(monkeypatch, name, number, when or (lambda *args: True))
    lines = []
    made = CheckpointManager("dante", tmp_path, say=lines.append, keep=2)
    with made:
        model, optimizer, _ = made.initialize_for_training(dict(SMALL), tokenizer(), None, 1e-3)
        train_and_save(made, model, optimizer, 3)
    assert [line for line in lines if "this file system" in line] == lines[:1]
    assert lines[0].startswith(f"{tmp_path / 'dante'}: this file system has {said}") and not getattr(DISK, switch)
    assert state_of(tmp_path / "dante")["step"] == 3
    assert sorted(p.name for p in (tmp_path / "dante").glob("step_*")) == ["step_00000001", "step_00000002"]
    assert resumed(tmp_path, model) == []


@posix
def test_several_lacks_are_one_line(tmp_path, monkeypatch):
    refusing(monkeypatch, "link", errno.EPERM)
    refusing(monkeypatch, "fsync", errno.ENOSYS)
    refusing(monkeypatch, "replace", errno.ENOSYS, is_folder)
    monkeypatch.setattr(fcntl, "flock", raising(errno.ENOLCK))
    monkeypatch.setattr(os, "statvfs", zeros)
    assert probe(ModelFolder(tmp_path)) == (
        f"{tmp_path}: this file system has no hard links (the files of older steps move); no fsync of files (after a "
        "power loss the newest steps may be damaged); no fsync of folders (a power loss may undo the newest saves); no "
        "rename of folders (their files move one by one); no locks (a file that names its owner is the lock); no count "
        "of free space (a full disk shows when it is full)"
    )
    assert list(tmp_path.iterdir()) == [] and not DISK.folder_renames


def raising(number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    return refuse


def zeros(path):
    """What some network mounts say of their room."""
    fields = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_frsize")
    return SimpleNamespace(**dict.fromkeys(fields, 0))


@posix
def test_a_free_space_of_all_zeros_is_unknown_not_full(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", zeros)
    model, _ = save_steps(tmp_path, 2)
    assert DISK.free(tmp_path) is None and DISK.room(tmp_path) == ""
    assert resumed(tmp_path, model) == []


@posix
def test_without_locks_an_owners_file_is_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raising(errno.ENOLCK))
    lines = []
    with CheckpointManager("dante", tmp_path, say=lines.append):
        pass
    assert lines == [f"{tmp_path / 'dante'}: this file system has no locks (a file that names its owner is the lock)"]


# What cannot hold checkpoints

USELESS = {
    "no rename of files": ("replace", errno.ENOSYS, lambda source, *_: not Path(source).is_dir(), "replace: Function"),
    "read-only": ("mkdir", errno.EROFS, lambda path, *_: ".stage-" in str(path), "mkdir: Read-only file system"),
    "no write": ("write", errno.EINVAL, lambda fd, data: bytes(data) == b"probe", "write: Invalid argument"),
    "nothing made": ("open", errno.EACCES, lambda path, *_: str(path).endswith("/file"), "open: Permission denied"),
}


@posix
@pytest.mark.parametrize("mount", USELESS)
def test_a_mount_that_cannot_hold_checkpoints_is_refused_before_training(tmp_path, monkeypatch, mount):
    name, number, when, said = USELESS[mount]
    refusing(monkeypatch, name, number, when)
    made = manager(tmp_path)
    with pytest.raises(SaveFailed) as caught:
        made.initialize_for_training({}, "char", "some text", 1e-3)
    assert str(caught.value).startswith(f"{tmp_path / 'dante'}: this file system cannot hold checkpoints: {said}")
    assert "Use another --checkpoint_root. Nothing was trained" in str(caught.value)
    assert not list((tmp_path / "dante").glob(".stage-*"))


@posix
def test_a_saver_without_a_manager_block_is_refused_and_can_try_again(tmp_path, monkeypatch):
    made, model, optimizer = started(tmp_path)
    made.close()
    probing._probed.clear()
    update(model, optimizer)
    with monkeypatch.context() as patch:
        refusing(patch, "replace", errno.ENOSYS)
        with pytest.raises(SaveFailed, match="cannot hold checkpoints: replace: Function not implemented"):
            made.save(model, optimizer, step=1)
    save_durably(made, model, optimizer, step=1)
    assert made.saved_step() == 1


@posix
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_may_pass_is_left_to_the_save_and_probed_again(tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        refusing(patch, "write", number)
        assert probe(ModelFolder(tmp_path)) is None
        refusing(patch, "replace", number, is_folder)
        assert probe(ModelFolder(tmp_path)) is None
    assert list(tmp_path.iterdir()) == [] and DISK.folder_renames
    assert probing._probed == set()
    assert probe(ModelFolder(tmp_path)) is None and probing._probed


# Errors of a save name the call


@posix
@pytest.mark.parametrize("name", ["fsync", "replace", "mkdir"])
def test_the_error_of_a_save_names_the_call_that_failed(tmp_path, monkeypatch, name):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 1)
    update(model, optimizer)
    with monkeypatch.context() as patch:
        refusing(patch, name, errno.EIO)
        with pytest.raises(SaveFailed, match=rf"dante: (save of step 2 failed: )?{name}: Input/output error"):
            save_durably(made, model, optimizer, step=2)
    save_durably(made, model, optimizer, step=2)


@posix
def test_a_disk_without_inodes_says_so_and_not_how_many_bytes_are_free(tmp_path, monkeypatch):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 1)
    update(model, optimizer)
    found = os.statvfs(tmp_path)
    values = {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}
    with monkeypatch.context() as patch:
        refusing(patch, "mkdir", errno.ENOSPC)
        patch.setattr(os, "statvfs", lambda path: SimpleNamespace(**values | {"f_files": 65536, "f_favail": 0}))
        said = (
            r"failed: mkdir: No space left on device \(\d.* needed, 0 of 65536 inodes free: it has too many files\)\."
        )
        with pytest.raises(SaveFailed, match=said):
            save_durably(made, model, optimizer, step=2)
        patch.setattr(os, "statvfs", lambda path: SimpleNamespace(**values | {"f_files": 0, "f_favail": 0}))
        with pytest.raises(SaveFailed, match=r"mkdir: No space left on device \(\d.* needed, [\d.]+ .B free\)\."):
            save_durably(made, model, optimizer, step=2)
