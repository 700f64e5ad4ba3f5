"""What a file may cost: less than a second for a megabyte, two for four, and 200 MB."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.hostile.bombs import PICKLES, bomb, names_of


def opened(path: Path) -> dict:
    """What a process without torch, in little memory, says of one file."""
    words = [sys.executable, "-m", "tests.hostile.child"]
    done = subprocess.run(words, cwd=ROOT, input=str(path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict]:
    """What one process says of a megabyte of each kind."""
    folder = tmp_path_factory.mktemp("bombs")
    files = {which: folder / f"{i}.pt" for i, which in enumerate(PICKLES)} | {"safetensors": folder / "x.safetensors"}
    for which, path in files.items():
        path.write_bytes(names_of(1_000_000) if which == "safetensors" else bomb(which, 1_000_000))
    words = [sys.executable, "-m", "tests.hostile.child"]
    done = subprocess.run(words, cwd=ROOT, input="\n".join(map(str, files.values())), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(files, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("which", [*PICKLES, "safetensors"])
def test_a_megabyte_of_anything_takes_less_than_a_second_and_200_megabytes(which, measured):
    found = measured[which]
    assert found["seconds"] < 1, found
    assert found["megabytes"] < 200, found
    assert "too many" not in which or "too many for" in found["refused"]


def speed() -> float:
    """Seconds of processor time that counting to ten million takes; a third of one on a machine that is not busy."""
    start, total = time.process_time(), 0
    for i in range(10_000_000):
        total += i
    return time.process_time() - start


@pytest.mark.full
@pytest.mark.parametrize("which", [*PICKLES, "safetensors"])
def test_four_megabytes_of_anything_take_at_most_two_seconds_of_such_a_machine_and_200_megabytes(which, tmp_path):
    path = tmp_path / ("x.safetensors" if which == "safetensors" else "x.pt")
    path.write_bytes(names_of(4_000_000) if which == "safetensors" else bomb(which, 4_000_000))
    before, found = speed(), opened(path)
    assert found["seconds"] < max(before, speed(), 0.33) * 6, found
    assert found["megabytes"] < 200, found


def test_keys_that_collide_are_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(bomb("keys that collide", 2_500_000))
    found = opened(tmp_path / "x.pt")
    assert "its keys were made to collide" in found["refused"]
    assert found["seconds"] < 2
