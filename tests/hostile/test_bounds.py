"""What a file may cost: a second and 200 MB for four megabytes (`tests.hostile.costs` measures every door)."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

import inspect_model
from core.containers.dcp.metadata import read_metadata
from core.containers.open import open_container
from core.containers.pickles.collisions import Table
from core.containers.pickles.inert import Malformed
from core.errors import CheckpointDamaged
from tests.conftest import ROOT
from tests.hostile.bombs import PICKLES, bomb, colliding, names_of
from tests.hostile.costs import speed


def opened(path: Path) -> dict:
    """What a process without torch, in little memory, says of one file."""
    words = [sys.executable, "-m", "tests.hostile.child"]
    done = subprocess.run(words, cwd=ROOT, input=str(path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SOME = (
    "some of everything",
    "keys that collide",
    "pairs",
    "tensors",
    "set one by one",
    "texts in quotes",
    "safetensors",
)
"""Kinds of which tier ci takes a third of a megabyte; the others are measured at their whole size."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict]:
    """What one process says of a third of a megabyte of each kind."""
    folder = tmp_path_factory.mktemp("bombs")
    files = {which: folder / ("x.safetensors" if which == "safetensors" else f"{which}.pt") for which in SOME}
    for which, path in files.items():
        path.write_bytes(names_of(300_000) if which == "safetensors" else bomb(which, 300_000))
    words = [sys.executable, "-m", "tests.hostile.child"]
    before = speed()
    done = subprocess.run(words, cwd=ROOT, input="\n".join(map(str, files.values())), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(zip(files, map(json.loads, done.stdout.splitlines()), strict=True))
    return {**found, "speeds": (before, speed())}


@pytest.mark.parametrize("which", SOME)
def test_a_third_of_a_megabyte_of_anything_takes_less_than_half_a_second_and_200_megabytes(which, measured):
    found, speeds = measured[which], measured["speeds"]
    assert found["seconds"] < 1.5 * max(0.33, *speeds), found
    assert found["megabytes"] < 200, found


@pytest.mark.full
@pytest.mark.parametrize("which", [*PICKLES, "safetensors"])
def test_four_megabytes_of_anything_take_about_a_second_and_200_megabytes(which, tmp_path):
    path = tmp_path / ("x.safetensors" if which == "safetensors" else "x.pt")
    path.write_bytes(names_of(4_000_000) if which == "safetensors" else bomb(which, 4_000_000))
    before, found = speed(), opened(path)
    assert found["seconds"] < 5 * max(before, speed(), 0.33), found
    assert found["megabytes"] < 200, found


def test_keys_that_collide_are_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(bomb("keys that collide", 300_000))
    with pytest.raises(CheckpointDamaged, match="its keys were made to collide in a dictionary or set"):
        open_container(tmp_path / "x.pt")


COLLIDING = [int.from_bytes(key, "little") for key in re.findall(rb"J(....)N", colliding(100_000), re.DOTALL)]


@pytest.mark.parametrize("batch", [1, 1000, 100_000])
def test_keys_that_collide_are_refused_in_batches_of_any_size(batch):
    held: dict[int, None] = {}
    table = Table(held)
    with pytest.raises(Malformed, match="made to collide"):
        for start in range(0, len(COLLIDING), batch):
            held.update(dict.fromkeys(COLLIDING[start : start + batch]))
            table.add(COLLIDING[start : start + batch])


HONEST = {
    "a range": range(50_000),
    "ids": [hash(str(i)) & (1 << 48) - 1 for i in range(50_000)],
    "parts of ids": [part << 32 | i for part in range(50) for i in range(1000)],
    "steps": range(0, 50_000 * 1024, 1024),
    "negative": range(0, -50_000, -1),
    "times": [i / 1024 for i in range(20_000)],
    "tenths": [i / 10 for i in range(50_000)],
    "shifted": [i << 40 for i in range(50_000)],
    "some texts": [*map(str, range(20_000)), *range(20_000)],
}


@pytest.mark.parametrize("which", HONEST)
@pytest.mark.parametrize("kind", [dict.fromkeys, set])
def test_usual_keys_do_not_collide(kind, which):
    Table(kind(HONEST[which]))


HELD: dict[str, Any] = {
    "pairs": [(i, float(i)) for i in range(20_000)],
    "entries of a log": [{"step": i, "loss": float(i)} for i in range(20_000)],
    "a vocabulary": {chr(i): i for i in range(0xD000)},
    "its other side": {i: chr(i) for i in range(0xD000)},
    "an order": list(range(100_000)),
    "words": [True, False, None] * 100_000,
    "bytes": [0] * 500_000,
    "tensors": list(torch.zeros(3000).split(1)),
}


@pytest.mark.parametrize("which", HELD)
@pytest.mark.parametrize("protocol", [2, 5])
def test_what_programs_save_is_never_too_much(which, protocol, tmp_path):
    torch.save({which: HELD[which]}, tmp_path / "x.pt", pickle_protocol=protocol)
    found = open_container(tmp_path / "x.pt")
    assert len(found.content[which]) == len(HELD[which])


def test_the_metadata_of_many_tensors_is_never_too_much():
    whole, ranges = torch.Size([1]), {}
    for i in range(4000):
        block = dcp.ChunkStorageMetadata(torch.Size([0]), whole)
        ranges[f"{i:x}"] = dcp.TensorStorageMetadata(dcp.TensorProperties(torch.float32), whole, [block])
    places = {dcp.MetadataIndex(name, torch.Size([0]), 0): _StorageInfo("a.distcp", 0, 16) for name in ranges}
    data = pickle.dumps(dcp.Metadata(ranges, {name: (name,) for name in ranges}, places))
    assert len(read_metadata(data, "x").entries) == 4000


def test_the_first_screen_lists_500_entries_of_a_content_and_counts_the_others(tmp_path, capsys):
    torch.save({str(i): i for i in range(700)}, tmp_path / "x.pt")
    assert inspect_model.main([str(tmp_path / "x.pt")]) == 0
    said = capsys.readouterr().out
    assert "\n499  :  499\n... and 200 more entries, which --json has too\n" in said
    assert inspect_model.main([str(tmp_path / "x.pt"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["content"]) == 700
