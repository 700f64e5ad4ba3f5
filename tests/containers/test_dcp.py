"""DCP folders, with torch.distributed.checkpoint and its real 4-rank folders as the oracles."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import SerializationFormat

from core.containers.dcp.folder import is_dcp, open_dcp
from core.containers.open import open_container
from core.containers.spec import TensorSpec
from core.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from tests.makers.containers import assert_same, checksum_fails, tensor, write_rank_local
from tests.makers.dcp_folders import Writer, load, save, write_rows
from tests.makers.torch_files import bits


@pytest.fixture
def ranks(shared) -> Path:
    return shared / "fixtures/dcp_fsdp2_4ranks"


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows")


def without_specs(content):
    if isinstance(content, dict):
        return {k: without_specs(v) for k, v in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_specs(v) for v in content]
    return "tensor" if isinstance(content, (TensorSpec, torch.Tensor)) else content


# what is right


@pytest.mark.parametrize("part", ["model", "ema"])
def test_shards_of_four_ranks_are_the_tensors_that_were_saved(ranks, part):
    container = open_dcp(ranks / f"0000002/{part}_sharded")
    assert container.kind == "DCP folder, 4 files"
    assert_same(container, safetensors.torch.load_file(ranks / f"expected_{part}.safetensors"))
    assert (container.notes, container.foreign) == ([], [])
    assert len(container.tensors["embed.weight"].chunks) == 4
    assert container.tensors["pos_embed"].chunks == ()  # every rank had it, one stored it
    assert [c.names for c in container.checks if checksum_fails(container, c)] == []


def test_nested_saves_keep_their_nesting_and_optimizer_state(ranks):
    container = open_dcp(ranks / "nested_step-3")
    optim = torch.load(ranks / "expected_optim.pt", weights_only=False)
    state = container.content["optim"]["state"]
    assert {n: set(held) for n, held in state.items()} == {n: set(held) for n, held in optim["state"].items()}
    for name, held in optim["state"].items():
        for key, expected in held.items():
            assert state[name][key] is container.tensors[f"optim.state.{name}.{key}"]
            assert torch.equal(bits(tensor(container, state[name][key].name)), bits(expected))
    (group,) = container.content["optim"]["param_groups"]
    assert group == optim["param_groups"][0]
    assert without_specs(container.content) == without_specs(load(ranks / "nested_step-3"))


def test_empty_shards_leave_no_chunks(rows):
    container = open_dcp(rows)
    assert_same(container, {"w": torch.arange(28.0).reshape(7, 4)})
    assert [chunk.begin for chunk in container.tensors["w"].chunks] == [(0, 0), (3, 0), (6, 0)]
    assert container.content == {"w": container.tensors["w"], "lr": 0.5}


def test_tensors_within_values_are_named_after_them(tmp_path):
    writer = Writer(tmp_path)
    writer.value("rng", {"cpu": torch.arange(5), "seed": 3})
    container = open_dcp(writer.close())
    assert_same(container, {"rng.cpu": torch.arange(5)})
    assert container.content["rng"]["seed"] == 3


def test_strides_within_an_item_are_kept(tmp_path):
    save({"t": torch.randn(4, 6).t(), "v": torch.randn(3, 4, 5).permute(2, 0, 1)}, tmp_path / "x")
    container = open_dcp(tmp_path / "x")
    assert container.tensors["t"].strides == (1, 6)
    assert_same(container, load(tmp_path / "x"))


@st.composite
def tilings(draw):
    """A shape and blocks that fill it, made by cutting blocks in two again and again."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        begin, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, size[dim]))
        for first, count in ((0, at), (at, size[dim] - at)):
            here = tuple(b + first * (d == dim) for d, b in enumerate(begin))
            boxes.append((here, tuple(count if d == dim else n for d, n in enumerate(size))))
    return shape, draw(st.permutations(list({begin: (begin, n) for begin, n in boxes if 0 not in n}.values())))


@given(tilings())
@settings(max_examples=40, deadline=None)
def test_whatever_the_blocks_they_make_the_tensor_that_torch_loads(tmp_path_factory, tiling):
    shape, boxes = tiling
    writer = Writer(tmp_path_factory.mktemp("x"), files=3)
    writer.tensor("w", torch.randn(shape), boxes)
    folder = writer.close()
    assert_same(open_dcp(folder), load(folder))


@given(tilings(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_block_that_is_missing_moved_or_of_another_size_is_found(tmp_path_factory, tiling, data):
    shape, boxes = tiling
    i = data.draw(st.integers(0, len(boxes) - 1))
    begin, size = map(list, boxes.pop(i))
    dim = data.draw(st.integers(0, len(shape) - 1))
    how = data.draw(st.sampled_from(["missing", "moved", "longer", "shorter"]))
    begin[dim] += how == "moved"
    size[dim] += {"longer": 1, "shorter": -1}.get(how, 0)
    if how != "missing" and tuple(begin) not in [begin for begin, _ in boxes]:
        boxes.append((tuple(begin), tuple(size)))
    writer = Writer(tmp_path_factory.mktemp("x"))
    writer.tensor("w", torch.randn([n + 1 for n in shape]), boxes)
    writer.metadata.state_dict_metadata["w"].size = torch.Size(shape)
    with pytest.raises(CheckpointDamaged, match=r"\.metadata: w: "):
        open_dcp(writer.close())


# other ways in which torch writes a folder


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_folder_whose_ranks_wrote_metadata_of_their_own_is_whole(tmp_path, world):
    tensors = {"w": torch.randn(7, 4), "scale": torch.randn(5)}
    folder = write_rank_local(tmp_path / "x", tensors, world, {"step": 5})
    assert not (folder / ".metadata").exists()
    for path in (folder, folder / "__0.metadata", folder / "__0_0.distcp"):
        container = open_container(path)
        assert_same(container, {f"model.{name}": tensor for name, tensor in tensors.items()})
        assert (container.kind, container.content["step"]) == (f"DCP folder, {world} file{'s' * (world > 1)}", 5)
        said = f"its 1 values that are no tensors are those of the first of {world} ranks."
        assert container.notes == [said] * (world > 1)
        assert [c.names for c in container.checks if checksum_fails(container, c)] == []
    assert set(container.files) == {p.name for p in folder.iterdir()}


def test_a_rank_whose_files_are_missing_is_told_where_each_wrote_its_own(tmp_path):
    folder = write_rank_local(tmp_path, {"w": torch.randn(7, 4)}, 3, {})
    (folder / "__2.metadata").unlink()
    with pytest.raises(CheckpointDamaged, match=r"model\.w: its blocks have 24 .* what __0\.metadata, __1\.metadata "):
        open_dcp(folder)
    other = write_rank_local(tmp_path / "other", {"w": torch.randn(8, 4)}, 3, {})
    shutil.copy(other / "__2.metadata", folder)
    with pytest.raises(
        CheckpointDamaged, match=rf"{folder}: model\.w is float32 \(8, 4\) in __2_0\.distcp, and .*saves"
    ):
        open_dcp(folder)


def test_a_folder_of_safetensors_is_read_though_torch_only_writes_it(tmp_path):
    tensors = {"a.weight": torch.randn(7, 4), "b": torch.randn(3).bfloat16()}
    form = SerializationFormat.SAFETENSORS
    with warnings.catch_warnings(action="ignore"):  # in one process
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(tmp_path, serialization_format=form))
    container = open_container(tmp_path)
    assert container.kind == "DCP folder, 1 file of safetensors"
    assert_same(container, tensors)
    assert_same(container, safetensors.torch.load((tmp_path / "__0_0.distcp").read_bytes()))


def test_parts_of_a_tensor_in_safetensors_of_several_ranks_are_joined(tmp_path):
    w = torch.randn(7, 4)
    for rank, (begin, end) in enumerate([(0, 4), (4, 7)]):
        info = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [begin, 0]}}), "format": "pt"}
        safetensors.torch.save_file({"w": w[begin:end].clone()}, tmp_path / f"__{rank}_0.distcp", info)
    (tmp_path / ".metadata").write_bytes(b"")
    assert_same(open_dcp(tmp_path), {"w": w})
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointDamaged, match=r"w is in __1_0\.distcp alone: its blocks have 12 elements"):
        open_dcp(tmp_path)


# what is missing or damaged


def test_a_folder_that_lost_its_metadata_says_how_many_items_it_has(ranks, tmp_path):
    folder = shutil.copytree(ranks / "0000002/model_sharded", tmp_path / "x")
    (folder / ".metadata").unlink()
    assert is_dcp(folder)
    with pytest.raises(CheckpointDamaged) as caught:
        open_dcp(folder)
    count = len(dcp.FileSystemReader(ranks / "0000002/model_sharded").read_metadata().storage_data)
    assert str(caught.value).startswith(f"{folder}/.metadata: missing. The .distcp files (4) hold {count} whole items")
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-1])
    with pytest.raises(CheckpointDamaged, match=rf"__0_0\.distcp: no zip ends at byte {len(data) - 1}; 0 items follow"):
        open_dcp(folder)


def test_other_folders_are_none(tmp_path):
    assert not is_dcp(tmp_path) and not is_dcp(tmp_path / "gone")
    with pytest.raises(CheckpointNotFound, match=r"not a DCP folder: it has no \.metadata and no \*\.distcp files\.$"):
        open_dcp(tmp_path)


def test_what_belongs_to_nothing_is_noted(rows):
    (rows / "__9_0.distcp").write_bytes(b"x")
    with (rows / "__0_0.distcp").open("ab") as file:
        file.write(bytes(10))
    size = (rows / "__0_0.distcp").stat().st_size
    assert open_dcp(rows).notes == [
        f"__0_0.distcp: 10 of its {size} bytes belong to no item.",
        "__9_0.distcp: .metadata names nothing in it. It may be of another save.",
    ]


def test_blocks_that_overlap_and_leave_a_hole_are_found_though_the_sum_is_right(tmp_path):
    writer = Writer(tmp_path)
    writer.tensor("w", torch.randn(7, 4), [((0, 0), (4, 4)), ((3, 0), (3, 4))])
    with pytest.raises(CheckpointDamaged, match="w: some of its blocks overlap, and some elements are missing"):
        open_dcp(writer.close())


@pytest.mark.parametrize("other", [torch.zeros(7, 4).double(), torch.zeros(4, 7)])
def test_an_item_of_another_save_is_found(tmp_path, other):
    for name, w in (("a", torch.zeros(7, 4)), ("b", other)):
        writer = Writer(tmp_path / name, files=1)
        writer.tensor("w", w)
        writer.close()
    shutil.copy(tmp_path / "b/__0_0.distcp", tmp_path / "a")
    with pytest.raises(CheckpointDamaged, match=r"__0_0\.distcp: w"):
        open_dcp(tmp_path / "a")


def test_every_flipped_bit_of_an_item_is_harmless_or_found(tmp_path):
    """The second of two alike items is recognised without being parsed: that must not hide anything."""
    writer = Writer(tmp_path, files=1)
    for name in ("a", "b"):
        writer.tensor(name, torch.arange(5.0))
    file = writer.close() / "__0_0.distcp"
    sound, info = open_dcp(tmp_path), writer.info("b")
    data = file.read_bytes()
    found = 0
    for byte in range(info.offset, info.offset + info.length):
        file.write_bytes(data[:byte] + bytes([data[byte] ^ 1 << byte % 8]) + data[byte + 1 :])
        try:
            opened = open_dcp(tmp_path)
        except CheckpointError:
            found += 1
            continue
        b = sound.tensors["b"]
        if opened.tensors != sound.tensors or b.offset <= byte < b.offset + b.nbytes:
            assert [c.names for c in opened.checks if checksum_fails(opened, c)] == [("b",)]
    assert found > 400
