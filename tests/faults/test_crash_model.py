"""The commit protocol holds wherever it is cut, and the checker that says so finds each mistake it was made for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.bundle.commit import ModelFolder
from core.bundle.folder import COMMITTED
from core.bundle.storage import MOVING
from core.bundle.training_state import STATE
from tests.faults.crash_model import EXHAUSTIVE, MODES, QUICK, SCENARIOS
from tests.faults.explorer import Explorer, Fault
from tests.faults.memory_disk import ROOT, Disk, MemoryStorage, RenamesNoFolder

LIMITS = EXHAUSTIVE if os.environ.get("CRASH_MODEL") == "exhaustive" else QUICK


RUNS = [(name, mode) for name in SCENARIOS for mode in MODES]
SLOW = [run for run in RUNS if run[1] in ("overlay", "bucket")] + [("rewind", "moves")]
SAMPLE = [("edited config", "bucket"), ("same step", "overlay")]


@pytest.mark.parametrize(
    ("name", "mode"),
    [pytest.param(*run, marks=pytest.mark.full) if run in SLOW and run not in SAMPLE else run for run in RUNS],
)
def test_every_crash_leaves_the_old_or_the_new_step_whole(name, mode):
    links, storage_type = MODES[mode]
    explorer = Explorer(links, *LIMITS, storage_type=storage_type)
    SCENARIOS[name](explorer)
    counts = explorer.counts
    print(f"{counts['crash points']} crash points, {counts['disk states']} disk states, {counts['outcomes']} outcomes")
    assert counts["crash points"] > 50
    assert counts["disk states"] > 100
    assert counts["readers"] > 20


class ShortWrites(MemoryStorage):
    def __init__(self, *args):
        super().__init__(*args)
        self.longest_write = 100


def test_short_writes_change_nothing():
    explorer = Explorer(True, *QUICK, storage_type=ShortWrites)
    SCENARIOS["three saves"](explorer)
    assert explorer.counts["crash points"] > 300


class FolderFsyncDoesNothing(MemoryStorage):
    def sync_folder(self, path):
        self.watch()


class FileFsyncDoesNothing(MemoryStorage):
    def _fsync(self, target):
        if isinstance(target, Path):
            super()._fsync(target)


class HistoryNotFsynced(MemoryStorage):
    def sync_folder(self, path):
        if path.name != ".hist":
            super().sync_folder(path)


class MovesIntoFolderNotFsynced(ModelFolder):
    def _build_history(self, names):
        real, self.storage.sync_folder = self.storage.sync_folder, lambda path: None
        make = self.storage.make_folder

        def made(path):
            make(path)
            if path.name == ".hist":
                self.storage.sync_folder = lambda p: real(p) if p.name == ".hist" else None

        self.storage.make_folder = made
        super()._build_history(names)
        self.storage.sync_folder, self.storage.make_folder = real, make


class PruneInPlace(ModelFolder):
    def prune(self, steps):
        for step in steps:
            self.storage.remove_tree(self.kept_steps()[step])


class UnlinkBeforeTrashIsDurable(ModelFolder):
    def prune(self, steps):
        real, self.storage.sync_folder = self.storage.sync_folder, lambda path: None
        super().prune(steps)
        self.storage.sync_folder = real


class StageNotFsynced(ModelFolder):
    def commit(self, stage):
        self.storage.rename(stage, self.committed)
        self.storage.sync_folder(self.path)


class ShardsNotFsynced(MemoryStorage):
    def sync_tree(self, path):
        self.sync_folder(path)


class CommitNotFsynced(ModelFolder):
    def commit(self, stage):
        self.storage.sync_folder(stage)
        self.storage.rename(stage, self.committed)


class StepExistsByNumberAlone(ModelFolder):
    def _is(self, folder, identity):
        return True


class ConfigAlwaysReplaced(ModelFolder):
    def _top_config_stays(self):
        return False


class ReaderWithoutOverlay(ModelFolder):
    def _newest(self, call, name):
        return call(self.path / name) if call == self.storage.open else super()._newest(call, name)


class ReaderWithoutSecondLook(ModelFolder):
    def _state_bytes(self):
        if not hasattr(self, "first"):
            self.first = super()._state_bytes()
        return self.first


class RecoveryNeedsTrainingState(ModelFolder):
    def recover(self):
        self.storage.sync_folder(self.path)
        if self.storage.exists(self.committed) and not self.storage.exists(self.path / COMMITTED / STATE):
            self._close_commit()
        super().recover()


class RecoveryDoesNotFsyncFirst(ModelFolder):
    def recover(self):
        real, calls = self.storage.sync_folder, []
        self.storage.sync_folder = lambda path: real(path) if calls or calls.append(path) else None
        super().recover()
        self.storage.sync_folder = real


class RestartsHistory(ModelFolder):
    def _build_history(self, names):
        if self.storage.exists(self.path / ".hist"):
            self.storage.remove_tree(self.path / ".hist")
        super()._build_history(names)


class MarkNotFsynced(RenamesNoFolder):
    def mark(self, folder, target):
        if not self.exists(folder / MOVING):
            self.write(folder / MOVING, f"to {target}\n".encode())


class MovesWithoutMark(RenamesNoFolder):
    def _move(self, source, target):
        if not self.exists(target):
            self.make_folder(target)
        for name in self.names(source):
            self.rename(source / name, target / name)
        self.sync_folder(source)
        self.sync_folder(target)
        self.sync_folder(target.parent)
        self.remove_folder(source)


class MoveNotFsynced(RenamesNoFolder):
    def _move(self, source, target):
        real = self.sync_folder
        self.sync_folder = lambda path: None if path == target else real(path)
        super()._move(source, target)
        self.sync_folder = real


class MarkRemovedFirst(RenamesNoFolder):
    def remove_tree(self, path):
        if self.exists(path / MOVING):
            self.remove(path / MOVING)
        super().remove_tree(path)


class PointerIgnored(ModelFolder):
    committed = property(lambda self: self.path / COMMITTED)


MISTAKES = [
    (FolderFsyncDoesNothing, "three saves", True),
    (FileFsyncDoesNothing, "three saves", True),
    (HistoryNotFsynced, "three saves", True),
    (MovesIntoFolderNotFsynced, "three saves", False),
    (PruneInPlace, "three saves", True),
    (UnlinkBeforeTrashIsDurable, "three saves", True),
    (StageNotFsynced, "three saves", True),
    (ShardsNotFsynced, "shards", True),
    (CommitNotFsynced, "three saves", True),
    (StepExistsByNumberAlone, "same step", True),
    (ConfigAlwaysReplaced, "edited config", True),
    (ReaderWithoutOverlay, "three saves", True),
    (ReaderWithoutSecondLook, "three saves", True),
    (RecoveryNeedsTrainingState, "three saves", True),
    (RecoveryDoesNotFsyncFirst, "three saves", True),
    (RestartsHistory, "three saves", False),
    (RestartsHistory, "shards", True),
]


REFUSED = [
    (MarkNotFsynced, "three saves", False),
    (MovesWithoutMark, "three saves", False),
    (MoveNotFsynced, "three saves", False),
    (MarkRemovedFirst, "three saves", True),
    (PointerIgnored, "three saves", True),
]
"""Mistakes that matter where folders cannot be renamed."""


@pytest.mark.parametrize(
    ("mistake", "name", "links"), MISTAKES + REFUSED, ids=[f"{m[0].__name__}-{m[1]}" for m in MISTAKES + REFUSED]
)
def test_the_checker_finds(mistake, name, links):
    kind = {"storage_type" if issubclass(mistake, MemoryStorage) else "folder_type": mistake}
    if (mistake, name, links) in REFUSED:
        kind.setdefault("storage_type", RenamesNoFolder)
    with pytest.raises((Fault, OSError)):
        SCENARIOS[name](Explorer(links, *QUICK, **kind))


def test_power_loss_keeps_what_was_fsynced_and_may_lose_or_tear_the_rest():
    disk = Disk()
    storage = MemoryStorage(disk)
    storage.write(ROOT / "kept", b"1234")
    storage.sync_folder(ROOT)
    with storage.create(ROOT / "torn") as output:
        output.write(b"abcd")
        output._flush()
        left = {(after.text(ROOT / "kept"), after.text(ROOT / "torn")) for after in disk.power_loss(100)}
    garbage = bytes(byte ^ 0x55 for byte in b"abcd")
    assert left == {(b"1234", torn) for torn in (None, b"", b"ab", b"abcd", garbage, bytes(4), b"\0\0cd")}


def test_power_loss_keeps_or_loses_a_rename_whole():
    disk = Disk()
    storage = MemoryStorage(disk)
    storage.make_folder(ROOT / "a")
    storage.write(ROOT / "a" / "x", b"1")
    disk.sync_all()
    storage.rename(ROOT / "a" / "x", ROOT / "x")
    found = {(after.text(ROOT / "a" / "x"), after.text(ROOT / "x")) for after in disk.power_loss(100)}
    assert found == {(b"1", None), (None, b"1")}
    storage.sync_folder(ROOT)
    assert {after.text(ROOT / "x") for after in disk.power_loss(100)} == {None, b"1"}
    storage.sync_folder(ROOT / "a")
    assert {after.text(ROOT / "x") for after in disk.power_loss(100)} == {b"1"}
