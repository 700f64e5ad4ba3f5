"""Megatron's folders, written by the library that writes them (DCP), with its names and shapes."""

from __future__ import annotations

import argparse
import os

import pytest
import torch

from core.containers.megatron_folder import is_megatron_folder, open_megatron_folder
from core.containers.pickles.foreign import attributes
from core.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from tests.makers.containers import assert_same, layers_stacked, write_megatron
from tests.makers.dcp_folders import save


def test_an_iteration_has_its_tensors_and_the_arguments_of_its_run(tmp_path):
    folder = write_megatron(tmp_path / "iter_0000100")
    assert is_megatron_folder(folder)
    container = open_megatron_folder(folder)
    assert_same(container, layers_stacked() | {"common.seen": torch.arange(3)})
    assert container.kind == "Megatron iteration (torch_dist), DCP folder, 1 file"
    assert attributes(container.content["common"]["args"]) == {
        "num_layers": 3,
        "hidden_size": 4,
        "swiglu": True,
        "params_dtype": "torch.bfloat16",
    }
    assert container.content["metadata"]["sharded_backend"] == "torch_dist"
    assert container.foreign == []
    assert container.files == {p.name: p.stat().st_size for p in folder.iterdir()}


def test_of_several_iterations_the_one_that_megatron_would_load_is_read(tmp_path):
    for n in (100, 200):
        write_megatron(tmp_path / f"iter_{n:07}")
    assert is_megatron_folder(tmp_path)
    assert open_megatron_folder(tmp_path).notes == [
        f"iter_0000200 of {tmp_path}: the last one; also there: iter_0000100."
    ]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100\n")
    container = open_megatron_folder(tmp_path)
    assert container.path == tmp_path / "iter_0000100"
    assert container.notes == [
        f"iter_0000100 of {tmp_path}: latest_checkpointed_iteration.txt names it; also there: iter_0000200."
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("300", "names iter_0000300, found iter_0000100. Name the folder of an iteration."),
        ("release", "names release, found iter_0000100."),
        ("../x", 'says "../x", expected the number of an iteration or release.'),
        ("", 'says "", expected'),
        ("9" * 60, "expected the number of an iteration"),
    ],
)
def test_a_tracker_file_that_names_nothing_is_refused(tmp_path, text, said):
    write_megatron(tmp_path / "iter_0000100")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointDamaged) as caught:
        open_megatron_folder(tmp_path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/latest_checkpointed_iteration.txt: ")


def test_the_files_of_classic_ranks_are_opened_each_and_not_converted(tmp_path):
    expected = {}
    for rank in ("mp_rank_00", "mp_rank_01"):
        (tmp_path / rank).mkdir()
        weight = torch.randn(8, 4)
        args = argparse.Namespace(num_layers=2)
        torch.save({"model": {"w": weight}, "args": args}, tmp_path / rank / "model_optim_rng.pt")
        (tmp_path / rank / "distrib_optim.pt").write_bytes(b"x" * 5)
        expected[f"{rank}.model.w"] = weight
    assert is_megatron_folder(tmp_path)
    container = open_megatron_folder(tmp_path)
    assert_same(container, expected)
    assert container.kind == "Megatron iteration (classic), 2 ranks"
    assert container.files["mp_rank_01/distrib_optim.pt"] == 5
    (note,) = container.notes
    assert note.startswith("cannot be converted as it is: no file says along which dimension its tensors were cut.")
    assert attributes(container.content["mp_rank_01"]["args"]) == {"num_layers": 2}


def test_the_file_of_the_only_rank_is_as_it_would_be_alone(tmp_path):
    (tmp_path / "iter_0000007/mp_rank_00").mkdir(parents=True)
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "iter_0000007/mp_rank_00/model_optim_rng.pt")
    container = open_megatron_folder(tmp_path)
    assert_same(container, {"model.w": torch.ones(3)})
    assert container.content == {"model": {"w": container.tensors["model.w"]}}
    assert container.kind == "Megatron iteration (classic), 1 rank"
    assert container.notes[0].startswith("cannot be converted as it is: it holds the program's own objects")


def test_an_iteration_without_arguments_says_so(tmp_path):
    folder = write_megatron(tmp_path / "iter_0000100")
    (folder / "common.pt").unlink()
    assert open_megatron_folder(tmp_path).notes[0] == "common.pt is missing: the arguments of the run are not known."
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(CheckpointDamaged, match=r"iter_0000100: holds no Megatron checkpoint: neither \.metadata nor"):
        open_megatron_folder(tmp_path)


def test_other_folders_are_none(tmp_path):
    save(layers_stacked(), tmp_path / "dcp")
    for folder in (tmp_path, tmp_path / "dcp"):
        assert not is_megatron_folder(folder)
        with pytest.raises(CheckpointNotFound, match="not a Megatron folder, expected iter_0000100 and the like"):
            open_megatron_folder(folder)


def test_damaged_parts_are_named(tmp_path):
    folder = write_megatron(tmp_path / "iter_0000100")
    size = (folder / "common.pt").stat().st_size
    os.truncate(folder / "common.pt", size - 1)
    with pytest.raises(CheckpointDamaged, match=r"common\.pt: cut off after"):
        open_megatron_folder(folder)
    (folder / "common.pt").unlink()
    (folder / "common.pt").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointDamaged, match="a link that leads outside the folder"):
        open_megatron_folder(folder)
    (folder / "common.pt").unlink()
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"metadata\.json: 100000 bytes that are not valid JSON"):
        open_megatron_folder(folder)
    os.truncate(folder / "metadata.json", 100_000_001)
    with pytest.raises(CheckpointDamaged, match=r"metadata\.json: has 100000001 bytes, at most 100000000 are read\."):
        open_megatron_folder(folder)
