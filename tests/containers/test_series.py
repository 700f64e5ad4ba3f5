"""Numbered files in one folder: which are the model, and when nobody can tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from core.containers.open import open_container
from core.containers.series import choose_series, series_of
from core.errors import CheckpointError, CheckpointMismatch, CheckpointNotFound
from tests.makers.conversions import converted, same

NAMES = [f"layers.{i}.up.weight" for i in range(6)]


def series(folder: Path, total: int, value: float, stem: str = "model", suffix: str = "safetensors") -> dict:
    """Write an export in so many files, all of its tensors of one value; returns the file of each tensor."""
    folder.mkdir(exist_ok=True)
    for i in range(total):
        tensors = {name: torch.full((4, 3), value) for name in NAMES[i::total]}
        path = folder / f"{stem}-{i + 1:05}-of-{total:05}.{suffix}"
        save_file(tensors, path, {"format": "pt"}) if suffix == "safetensors" else torch.save(tensors, path)
    return {name: f"{stem}-{k % total + 1:05}-of-{total:05}.{suffix}" for k, name in enumerate(NAMES)}


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3), (4, 1)])
def test_of_two_series_without_an_index_neither_is_taken(tmp_path, stem, suffix, old, new):
    series(tmp_path / "m", old, 0.0, stem, suffix)
    series(tmp_path / "m", new, 1.0, stem, suffix)
    with pytest.raises(CheckpointNotFound) as caught:
        open_container(tmp_path / "m")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'm'}: holds 2 series of numbered files, and no index says which is the model")
    assert f"{stem}-*-of-{old:05}.{suffix} (complete, {old} files)" in said
    assert f"{stem}-*-of-{new:05}.{suffix} (complete, {new} files)" in said
    assert "Move the files of all but one to another folder, or name the index of one (*.index.json)." in said


@pytest.mark.parametrize("removed", [1, 2, 3])
def test_of_two_series_the_only_complete_one_is_taken_and_named(tmp_path, removed):
    series(tmp_path / "m", 3, 0.0)
    series(tmp_path / "m", 2, 1.0)
    (tmp_path / "m" / f"model-{removed:05}-of-00003.safetensors").unlink()
    notes = converted(tmp_path / "m", tmp_path / "o.pt", "pt")["notes"]
    assert same(torch.load(tmp_path / "o.pt", weights_only=True), dict.fromkeys(sorted(NAMES), torch.ones(4, 3)))
    assert notes == [
        f"{tmp_path / 'm'}: holds 2 series of numbered files; model-*-of-00002.safetensors (2 files) is taken, the "
        f"only complete one: model-*-of-00003.safetensors lacks model-{removed:05}-of-00003.safetensors"
    ]


def test_two_incomplete_series_are_both_named_with_what_they_lack(tmp_path):
    for total in (2, 3):
        series(tmp_path / "m", total, 0.0)
        (tmp_path / "m" / f"model-00001-of-{total:05}.safetensors").unlink()
    with pytest.raises(CheckpointNotFound, match=r"\(lacks model-00001-of-00002.*\(lacks model-00001-of-00003"):
        open_container(tmp_path / "m")


@pytest.mark.parametrize("total", [2, 3])
@pytest.mark.parametrize("named", ["folder", "index", "other index"])
def test_an_index_decides_between_two_series(tmp_path, total, named):
    files = {count: series(tmp_path / "m", count, float(count)) for count in (2, 3)}
    index = tmp_path / "m" / ("model.safetensors.index.json" if named != "other index" else "mine.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": files[total]}))
    notes = converted(tmp_path / "m" if named == "folder" else index, tmp_path / "o.pt", "pt")["notes"]
    made = torch.load(tmp_path / "o.pt", weights_only=True)
    assert same(made, dict.fromkeys(sorted(NAMES), torch.full((4, 3), float(total))))
    assert f"{index} is taken; also here: model-*-of-{5 - total:05}.safetensors" in notes


def test_numbered_files_of_two_endings_are_two_series_without_an_index(tmp_path):
    series(tmp_path / "m", 2, 0.0)
    series(tmp_path / "m", 2, 1.0, "pytorch_model", "bin")
    with pytest.raises(CheckpointNotFound, match=r"model-\*-of-00002.safetensors .*pytorch_model-\*-of-00002.bin"):
        open_container(tmp_path / "m")


@pytest.mark.parametrize("absent", [(), (2,)])
def test_one_numbered_file_is_not_converted_as_the_model(tmp_path, absent):
    series(tmp_path / "m", 3, 1.0)
    for k in absent:
        (tmp_path / "m" / f"model-{k:05}-of-00003.safetensors").unlink()
    first = tmp_path / "m" / "model-00001-of-00003.safetensors"
    with pytest.raises(CheckpointMismatch) as caught:
        converted(first, tmp_path / "o.pt", "pt")
    what = f"{first}: one of 3 files of one model (model-*-of-00003.safetensors)"
    lost = "not there: model-00002-of-00003.safetensors. Copy them beside it, and name the folder."
    assert str(caught.value) == (
        f"{what}; {lost}" if absent else f"{what}, which lie beside it. Name the folder, {tmp_path / 'm'}."
    )
    assert not (tmp_path / "o.pt").exists()


@given(
    st.lists(st.tuples(st.sampled_from(["model", "a-b", "x"]), st.integers(1, 4)), unique=True, max_size=3), st.data()
)
def test_a_series_is_chosen_when_it_alone_is_complete(kinds, data):
    names: list[str] = []
    complete = []
    for stem, total in kinds:
        there = data.draw(st.sets(st.integers(1, total), min_size=1))
        names += [f"{stem}-{i:05}-of-{total:05}.safetensors" for i in there]
        complete += [(stem, total)] if len(there) == total else []
    assert {(one.stem, one.total) for one in series_of(names)} == set(kinds)
    try:
        chosen, said = choose_series(names, "here")
    except CheckpointError:
        assert len(kinds) > 1 and len(complete) != 1
        return
    if len(kinds) == 1:
        assert chosen is not None and (chosen.stem, chosen.total) == kinds[0] and not said
    elif kinds:
        assert chosen is not None and [(chosen.stem, chosen.total)] == complete and chosen.label in said
    else:
        assert chosen is None
