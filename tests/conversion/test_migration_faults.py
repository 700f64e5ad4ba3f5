"""Files that cannot be migrated, and full disks: nothing is lost. tests/faults/ kills migrations."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import torch

import convert_checkpoints
from core.bundle.commit import ModelFolder
from core.bundle.storage import DISK
from core.containers.trees import leaves
from core.conversion.migration.plan import BUNDLE, FAILED
from core.errors import CheckpointMismatch
from tests.makers.doors import Shell
from tests.makers.generations import fuse
from tests.makers.locks import locked
from tests.makers.migrations import bits, edit, listing, migrated, plain, write
from tests.makers.models import flip, state_of
from tests.makers.old_runs import assert_same_bits

# What cannot be migrated


def misfit(path: Path) -> None:
    edit(path, lambda content: content["config"].update(block_size=99))


def foreign(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "hook": Shell("executed")}, path)


FAULTS = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "5000 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "flipped": (lambda path: flip(path, 20000), "is damaged (CRC32"),
    "misfit": (misfit, "Set block_size to 12"),
    "foreign": (foreign, "posix.system"),
    "no step": (lambda path: edit(path, lambda content: content.update(step="ten")), 'step is "ten"'),
    "split pair": (lambda path: edit(path, lambda c: c.update(note="\ud83d\ude00")), "two halves of one character"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_file_that_cannot_be_migrated_is_said_and_the_others_are_done(folder, fault):
    spoil, words = FAULTS[fault]
    write(folder, "latest.pt", 30)
    theirs = write(folder, "final.pt", 20)
    spoil(folder / "latest.pt")
    found = migrated(folder)
    assert found["latest.pt"].action == FAILED and not found["latest.pt"].may_be_deleted
    assert str(folder / "latest.pt") in found["latest.pt"].error and words in found["latest.pt"].error
    assert found["final.pt"].action == BUNDLE
    assert_same_bits(bits(folder), fuse(plain(theirs)))
    assert "latest.pt" not in [entry["name"] for entry in state_of(folder)["legacy"]]


def test_half_of_a_surrogate_pair_migrates_as_it_is(folder):
    write(folder, "latest.pt", 30)
    edit(folder / "latest.pt", lambda content: content.update(note="a\ud800"))
    assert migrated(folder)["latest.pt"].action == BUNDLE
    assert "a\ud800" in leaves(state_of(folder))


def test_folder_in_which_a_trainer_writes_fails_alone(tmp_path, capsys):
    root = tmp_path / "checkpoints"
    for name in ("busy", "free"):
        write(root / name, "latest.pt", 30)
    with locked(root / "busy") as trainer:
        code = convert_checkpoints.main(["--checkpoint_root", str(root)])
    shown = capsys.readouterr()
    assert code == 1 and f"error: {root / 'busy'}: process {trainer.pid} on" in shown.err
    assert not (root / "busy" / "model.pt").exists() and (root / "free" / "model.pt").exists()
    assert convert_checkpoints.main(["--checkpoint_root", str(root)]) == 0


def test_disk_that_fills_up_is_one_sentence_and_leaves_nothing_behind(folder, monkeypatch):
    write(folder, "latest.pt", 30)
    before = listing(folder)
    left = 0

    def full(call, *args):
        nonlocal left
        left -= call is os.write
        if left < 0 and call is os.write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*args)

    monkeypatch.setattr(DISK, "change", full, raising=False)
    for writes in range(5):
        left = writes
        outcome = migrated(folder)["latest.pt"]
        assert outcome.action == FAILED
        said = r": not migrated: No space left on device \(\d+\.\d KB needed, \d+\.\d [MGT]B free\)\."
        assert re.match(re.escape(str(folder / "latest.pt")) + said, outcome.error)
        assert [p.name for p in folder.iterdir() if p.name != ".lock"] == ["latest.pt"]
    assert listing(folder) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_one_sentence(folder):
    write(folder, "latest.pt", 30)
    folder.chmod(0o555)
    outcome = migrated(folder)["latest.pt"]
    folder.chmod(0o755)
    assert f"{folder / '.lock'}: Permission denied" in outcome.error


def test_file_system_that_became_read_only_is_one_sentence(folder, monkeypatch):
    write(folder, "latest.pt", 30)

    def refuses(call, *args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    monkeypatch.setattr(DISK, "change", refuses, raising=False)
    outcome = migrated(folder)["latest.pt"]
    assert outcome.action == FAILED and "Read-only file system" in outcome.error


def test_kept_step_is_never_replaced(folder):
    write(folder, "latest.pt", 30)
    write(folder, "final.pt", 20)
    migrated(folder)
    before, place = listing(folder / "step_00000020"), ModelFolder(folder)
    stage = place.stage()
    with pytest.raises(CheckpointMismatch, match=r"step_00000020: this step is kept already"):
        place.keep(stage, 20)
    assert listing(folder / "step_00000020") == before and stage.is_dir()
