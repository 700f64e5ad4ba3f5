"""What is unfinished is left alone while its process lives, and removed when it is dead."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from core.bundle import owner
from core.bundle.commit import ModelFolder
from core.bundle.owner import runs, stage_name
from core.bundle.storage import DISK

NAMES = """
import sys
from core.bundle.owner import new_stage_name
print(new_stage_name(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child():
    with subprocess.Popen(
        [sys.executable, "-c", NAMES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as made:
        yield made
        made.kill()


def test_the_stage_of_another_process_goes_when_that_process_has_ended(tmp_path, child):
    stage = tmp_path / child.stdout.readline().strip()
    stage.mkdir()
    place = ModelFolder(tmp_path)
    place.recover()
    assert stage.is_dir()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for its exit code
    place.recover()
    assert not stage.exists()


def test_a_stage_of_this_process_stays_while_it_is_filled(tmp_path):
    place = ModelFolder(tmp_path)
    with place.staging() as stage:
        place.recover()
        assert stage.is_dir()
    place.recover()
    assert not stage.exists()
    with pytest.raises(ZeroDivisionError), place.staging() as stage:
        raise ZeroDivisionError
    assert not stage.exists()


def test_a_file_that_is_written_beside_a_model_stays_when_its_folder_is_recovered(tmp_path):
    with DISK.published(tmp_path / "export.pt") as part:
        DISK.write(part, b"content")
        ModelFolder(tmp_path).recover()
    assert (tmp_path / "export.pt").read_bytes() == b"content"


@pytest.mark.parametrize("machine", ["another machine", "no owner", "a number given again"])
def test_what_no_living_process_can_have_made_is_removed(tmp_path, monkeypatch, machine):
    with stage_name() as name:
        mine, since, _ = name.removeprefix(".stage-").replace("-", ".").split(".")[:3], owner.began(), None
        assert mine[1:] == [str(os.getpid()), str(since)]
        if machine == "another machine":
            name = name.replace(mine[0], "00000000")
        elif machine == "no owner":
            name = ".stage-0123456789abcdef"
        else:
            name = name.replace(f".{os.getpid()}.{since}", f".{os.getppid()}.{since + 1}")
        (tmp_path / name).mkdir()
        ModelFolder(tmp_path).recover()
        assert not (tmp_path / name).exists()


def test_a_process_that_cannot_be_asked_runs(monkeypatch):
    """Where /proc hides the processes of others, only a number that nobody has is dead."""
    monkeypatch.setattr(owner, "_process", lambda pid: None)
    answers = {1: PermissionError, 2: ProcessLookupError, 3: None}

    def kill(pid, signal):
        if answers[pid]:
            raise answers[pid]

    monkeypatch.setattr(os, "kill", kill)
    assert [runs(pid, 5) for pid in (1, 2, 3)] == [True, False, True]
    monkeypatch.setattr(os, "name", "nt")
    assert runs(2, 5)
    assert owner.began() == 0
