"""Hostile files and folders: refused in one line or opened with the finding, at once, in little memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.containers.open import open_container
from core.errors import CheckpointError
from tests.conftest import ROOT
from tests.hostile.assemble import torch_zip
from tests.hostile.case import shown
from tests.hostile.files import CASES
from tests.hostile.pickles import PAYLOADS


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder; the working folder is another one, in which nothing is ever executed."""
    (tmp_path / "work").mkdir()
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_or_opened_with_the_finding(name, folder):
    case = CASES[name]
    path = case.write(folder)
    if case.refused:
        with pytest.raises(CheckpointError, match=case.refused) as caught:
            open_container(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value).replace(str(path), "")) < 1000
    else:
        container = open_container(path)
        said = [*container.foreign, *container.notes]
        assert not case.reported or any(case.reported in line for line in said), said
    assert list(Path().iterdir()) == []


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict]:
    """What a process without torch, in little memory, says of each case."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = {}
    for i, (name, case) in enumerate(CASES.items()):
        (folder / str(i)).mkdir()
        paths[name] = case.write(folder / str(i))
    words = [sys.executable, "-m", "tests.hostile.child"]
    done = subprocess.run(words, cwd=ROOT, input="\n".join(map(str, paths.values())), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(paths, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_takes_less_than_a_second_and_200_megabytes(name, measured):
    found = measured[name]
    assert found["seconds"] < 1
    assert found["megabytes"] < 200


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_shows_a_hostile_file_without_a_traceback(name, folder):
    out = shown(CASES[name].write(folder))
    assert re.sub(r"[ -~\n]", "", out.encode("ascii", "xmlcharrefreplace").decode()) == ""


@pytest.mark.parametrize("name", [*PAYLOADS])
def test_the_command_line_shows_a_hostile_pickle(name, folder):
    (folder / "x.pt").write_bytes(torch_zip(PAYLOADS[name].data))
    for words in ([], ["--json"], ["--tensors"]):
        said = shown(folder / "x.pt", *words)
        assert ("nothing was executed" in said) != PAYLOADS[name].refused
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["GLOBAL", "EXT1", "two directories", "a list in itself", "an item of 2**62 bytes"])
def test_the_script_itself_ends_with_0_or_1_and_no_traceback(name, folder):
    if name in PAYLOADS:
        path = folder / "x.pt"
        path.write_bytes(torch_zip(PAYLOADS[name].data))
    else:
        path = CASES[name].write(folder)
    done = subprocess.run([sys.executable, ROOT / "inspect_model.py", path], capture_output=True, text=True)
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stdout + done.stderr
    assert str(path) in done.stdout + done.stderr
    assert list(Path().iterdir()) == []
