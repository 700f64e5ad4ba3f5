"""Hostile folders of our own form: whatever a training state says, only files of the folder are opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from core.bundle.bundle import open_bundle
from core.bundle.storage import DISK
from core.containers.json_files import LARGEST, parse_json, read_json
from core.errors import CheckpointDamaged, CheckpointError
from tests.conftest import ROOT
from tests.fuzz.mutations import sealed
from tests.hostile.assemble import FOUR, items, tensor, torch_zip
from tests.hostile.case import shown

CONFIG = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 2, "vocab_size": 2, "dropout": 0.0, "bias": False}


NAMES = ["../outside.pt", "/etc/passwd", "/dev/zero", "..", ".", "", "\0", "x" * 5000]
ENTRIES = [None, 1, "x", [], {}, {"size": "x", "crc32": "zz"}, {"size": -1, "crc32": 5}]


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "outside.pt").write_bytes(b"outside")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "batch_size": 1, "device": "cpu"}))
    (folder / "tokenizer.json").write_text(json.dumps({"token_kind": "char", "chars": ["a", "b"]}))
    (folder / "model.pt").write_bytes(torch_zip(items(w=tensor()) + b".", {"0": FOUR}))
    return folder


def say(folder: Path, **changes: Any) -> None:
    """Write a training state with these entries."""
    sizes = {name: (folder / name).read_bytes() for name in ("config.json", "tokenizer.json", "model.pt")}
    files = {name: {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"} for name, data in sizes.items()}
    state = {"step": 1, "format_version": 2, "integrity": {"files": {**files, **changes.pop("files", {})}}, **changes}
    (folder / "training_state.json").write_bytes(sealed(state))


def test_the_folder_is_sound_before_it_is_made_hostile(folder):
    say(folder)
    with open_bundle(folder) as bundle:
        assert (bundle.step, list(bundle.weights.tensors)) == (1, ["w"])
    assert "Last recorded training step: 1" in shown(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_state_names_no_file_out_of_its_folder(name, folder):
    say(folder, files={name: {"size": 7, "crc32": "00000000"}})
    with pytest.raises(CheckpointError, match="training_state"):
        open_bundle(folder).close()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_whatever_is_recorded_of_a_file_ends_in_no_traceback(entry, words, folder):
    say(folder, files={"model.pt": entry})
    shown(folder, *words)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "training_state.json"])
@pytest.mark.parametrize(
    ("depth", "words"),
    [
        (900, []),
        (900, ["--json"]),
        (100_000, []),
        (100_000, ["--json"]),
    ],
)
def test_deep_json_ends_in_no_traceback(name, depth, words, folder):
    say(folder)
    data = (folder / name).read_bytes().rstrip().removesuffix(b"}")
    if name == "training_state.json":
        data = b'{"step": 1'  # as programs before ours wrote it, without a checksum
    (folder / name).write_bytes(data + b', "x": ' + b"[" * depth + b"]" * depth + b"}")
    shown(folder, *words)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are a thing of POSIX")
@pytest.mark.parametrize("name", ["config.json", "model.pt", "training_state.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name, folder):
    say(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    words = [sys.executable, str(ROOT / "inspect_model.py"), str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=3)
    except subprocess.TimeoutExpired:
        pytest.fail("it waits for somebody to write into the pipe")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "training_state.json"])
def test_a_sparse_giant_is_refused_by_its_size(name, folder):
    say(folder)
    with (folder / name).open("r+b") as file:
        file.truncate(3 << 30)
    with pytest.raises(CheckpointError, match=rf"{name}: .*3221225472"):
        open_bundle(folder).close()
    assert "3221225472" in shown(folder)


@pytest.mark.parametrize(("levels", "opens"), [(199, True), (201, False), (900, False)])
def test_json_of_over_200_levels_is_refused(levels, opens, tmp_path):
    data = b'{"[": "{", "deep": ' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"
    if opens:
        assert parse_json(data, "x.json")["["] == "{"
    else:
        with pytest.raises(CheckpointDamaged, match=r"x.json: its JSON is nested deeper than 200 levels"):
            parse_json(data, "x.json")


def test_a_json_file_of_64_megabytes_is_read_and_no_larger_one(tmp_path):
    with (tmp_path / "x.json").open("w+b") as file:
        file.write(b'{"a": 1}')
        file.truncate(LARGEST + 1)
        with pytest.raises(CheckpointDamaged, match=f"has {LARGEST + 1} bytes, at most {LARGEST} are read"):
            read_json(file, "x.json")
        with pytest.raises(CheckpointDamaged, match=f"at most {LARGEST} are read"):
            DISK.read(tmp_path / "x.json")
        file.truncate(8)
        assert read_json(file, "x.json") == {"a": 1}


def test_json_of_more_lists_than_anything_needs_is_refused_before_it_is_read():
    pairs = b'{"merges":[' + b",".join([b'["a","b"]'] * 50_000) + b"]}"
    assert len(parse_json(pairs, "x")["merges"]) == 50_000
    with pytest.raises(CheckpointDamaged, match=r"^x: its JSON has over 150000 lists and objects, too many for 500"):
        parse_json(b'{"a":[' + b"[]," * 166_660 + b"0.00000000000000000]}", "x")
