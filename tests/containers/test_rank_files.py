"""Files of ranks with DTensors in them, and the folder of a step, with torch's DTensor as the oracle."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from core.containers.dcp.dtensor import shards_of
from core.containers.open import open_container
from core.containers.part import part_of_model
from core.containers.pickles.inert import Call, Global
from core.containers.rank_files import open_rank_files, rank_files
from core.containers.spec import TensorSpec
from core.containers.step_folder import is_step_folder, open_step_folder
from core.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointNotFound
from tests.makers.containers import assert_same, checksum_fails, sharded_tensor, tensor, write_fsdp1, write_ranks
from tests.makers.conversions import converted
from tests.makers.dcp_folders import save
from tests.makers.fsdp_ranks import free_port, write_with_fsdp
from tests.makers.torch_files import bits, flattened


@pytest.fixture
def step(shared) -> Path:
    return shared / "fixtures/dcp_fsdp2_4ranks/0000002"


@pytest.fixture
def copied(step, tmp_path) -> Path:
    """The files of four ranks, model only, which may be changed."""
    for file in step.glob("model_rank*.pt"):
        shutil.copy(file, tmp_path)
    return tmp_path


def expected_optimizer(step: Path) -> dict[str, torch.Tensor]:
    optim = torch.load(step.parent / "expected_optim.pt", weights_only=False)
    return flattened({"state": optim["state"]})


def test_the_shards_of_four_real_ranks_are_the_model(copied, step):
    container = open_rank_files(copied)
    assert container.kind == "files of 4 ranks"
    assert_same(container, safetensors.torch.load_file(step.parent / "expected_model.safetensors"))
    assert (container.foreign, container.notes) == ([], [])
    assert container.content == container.tensors
    assert container.tensors["pos_embed"].file == "model_rank00000.pt"
    assert [chunk.begin for chunk in container.tensors["embed.weight"].chunks] == [(0, 0), (26, 0), (52, 0), (78, 0)]
    assert container.files == {p.name: p.stat().st_size for p in copied.iterdir()}
    assert [c.names for c in container.checks if checksum_fails(container, c)] == []


def test_model_and_optimizer_of_one_folder_get_first_names(step):
    container = open_rank_files(step)
    assert rank_files(step).keys() == {"model", "optimizer"}
    model = safetensors.torch.load_file(step.parent / "expected_model.safetensors")
    optimizer = expected_optimizer(step)
    assert_same(
        container, {f"model.{n}": t for n, t in model.items()} | {f"optimizer.{n}": t for n, t in optimizer.items()}
    )
    assert container.content["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    held = container.content["optimizer"]["state"]["embed.weight"]["exp_avg"]
    assert held is container.tensors["optimizer.state.embed.weight.exp_avg"]


LAYOUTS = {
    "rows": (Shard(0), Replicate()),
    "columns": (Replicate(), Shard(1)),
    "both": (Shard(0), Shard(1)),
    "rows_twice": (Shard(0), Shard(0)),
    "fsdp_over_tp": (_StridedShard(0, split_factor=2), Shard(0)),
    "fsdp_over_tp_columns": (_StridedShard(1, split_factor=2), Shard(1)),
    "copies": (Replicate(), Replicate()),
}


@given(st.tuples(st.integers(0, 7), st.integers(1, 7)), st.sampled_from(list(LAYOUTS)))
@settings(max_examples=30, deadline=None)
def test_any_layout_on_a_mesh_of_two_dimensions_is_put_together(tmp_path_factory, shape, layout):
    w = torch.randn(shape)
    folder = write_ranks(tmp_path_factory.mktemp("x"), (2, 2), {"w": (w, LAYOUTS[layout])})
    assert_same(open_rank_files(folder), {"w": w})


def test_a_layout_with_gaps_between_rows_is_refused(tmp_path):
    write_ranks(tmp_path, (2,), {"w": (torch.randn(8, 2), (_StridedShard(0, split_factor=2),))})
    with pytest.raises(CheckpointError, match=r"_rank00000\.pt: w: a DTensor is laid out as .*_StridedShard"):
        open_rank_files(tmp_path)


def test_sums_that_were_not_made_are_refused(tmp_path):
    write_ranks(tmp_path, (2,), {"w": (torch.randn(8, 2), (Partial(),))})
    with pytest.raises(CheckpointError, match=r"_rank00000\.pt: w: a DTensor is laid out as .*Partial"):
        open_rank_files(tmp_path)


@pytest.mark.parametrize(
    ("mesh", "begin"),
    [
        ({"mesh": TensorSpec("", "int64", (2, 2), (2, 1), 0, 32, "1")}, (4, 2)),  # before torch 2.9
        ({"_layout": {"shape": (2, 2), "stride": (2, 1)}}, (4, 2)),  # torch 2.9
        ({"_layout": {"axes": ({"shape": (2,)}, {"shape": (2,)})}}, (4, 2)),
        ({"_layout": {"axes": ({"shape": (1, 2)}, {"shape": (2,)})}}, (4, 2)),
    ],
)
def test_meshes_of_older_and_newer_torch_are_understood(mesh, begin):
    def record(name: str, *args, state=None) -> Call:
        call = Call(Global("torch.distributed.tensor", name), args)
        call.state = state
        return call

    local = TensorSpec("", "float32", (3, 2), (2, 1), 0, 24, "0")
    placements = (record("Shard", state={"dim": 0}), record("Shard", state={"dim": 1}))
    mesh = record("DeviceMesh", state={**mesh, "_coordinate_on_dim": [1, 1]})
    spec = record("DTensorSpec", state={"mesh": mesh, "placements": placements})
    state = {"_local_tensor": local, "_spec": spec}
    kind = Global("torch.distributed.tensor", "DTensor")
    dtensor = Call(
        Global("torch._tensor", "_rebuild_from_type_v2"),
        (Global("torch._utils", "_rebuild_wrapper_subclass"), kind, (kind, "torch.float32", (7, 4), (4, 1)), state),
    )
    (shard,) = shards_of(dtensor, "x")
    assert (shard.begin, shard.ranks, shard.shape) == (begin, 4, (7, 4))
    spec.state["shard_order"] = (record("ShardOrderEntry", 0, (1, 0)),)
    with pytest.raises(CheckpointError, match="x: a DTensor is laid out as"):
        shards_of(dtensor, "x")
    assert shards_of(Call(Global("a", "b"), ()), "x") is None


def test_tied_tensors_share_a_storage(tmp_path):
    w = torch.randn(6, 2)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    part = distribute_tensor(w, init_device_mesh("cpu", (1,)), (Shard(0),), src_data_rank=None)
    torch.save({"wte": part, "head": part, "other": part + 1}, tmp_path / "model_rank00000.pt")
    dist.destroy_process_group()
    tensors = open_rank_files(tmp_path).tensors
    assert tensors["wte"].storage == tensors["head"].storage != tensors["other"].storage


# ShardedTensors of FSDP1, and the names that programs give the files


@pytest.mark.parametrize(
    "name",
    ["model_rank{rank:05}.pt", "model_world_size_3_rank_{rank}.pt", "model_final.rank_{rank}.pth", "x_rank{rank}.bin"],
)
@pytest.mark.parametrize("rows", [2, 3, 7])  # 2: the last rank has nothing
def test_sharded_tensors_of_fsdp1_are_put_together_under_any_name(tmp_path, name, rows):
    model = {"a.weight": torch.randn(rows, 5), "b": torch.randn(9).bfloat16()}
    write_fsdp1(tmp_path, name, model, 3, lambda rank: {"step": 4})
    container = open_container(tmp_path)
    assert container.kind == "files of 3 ranks"
    assert_same(container, model)
    assert (container.foreign, container.notes, container.content["step"]) == ([], [], 4)
    assert [c.names for c in container.checks if checksum_fails(container, c)] == []


def test_a_shard_that_contradicts_its_place_is_damage(tmp_path):
    write_fsdp1(tmp_path, "model_rank{rank:05}.pt", {"w": torch.ones(4, 2)}, 2)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    places = [([0, 0], (2, 2), 0), ([2, 0], (2, 2), 1)]
    part = sharded_tensor([(torch.ones(2, 2), [2, 0])], (4, 2), places)
    part.local_shards()[0].metadata.shard_sizes = [3, 2]
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        torch.save({"w": part}, tmp_path / "model_rank00001.pt")
    dist.destroy_process_group()
    with pytest.raises(CheckpointDamaged, match=r"rank00001\.pt: w: a shard .* \(2, 2\) of .* \(3, 2\) from \(2, 0\)"):
        open_rank_files(tmp_path)


def test_a_missing_rank_of_fsdp1_is_named(tmp_path):
    write_fsdp1(tmp_path, "model_final.rank_{rank}.pth", {"w": torch.ones(6, 2)}, 3)
    (tmp_path / "model_final.rank_1.pth").unlink()
    with pytest.raises(CheckpointDamaged, match=r"model_final\.rank_1\.pth missing, 2 of 3 ranks are here\. 1 tensors"):
        open_rank_files(tmp_path)


def test_what_only_looks_like_a_rank_files_class_is_named(tmp_path):
    owner = b"ctorch.distributed._shard.sharded_tensor.api\nShardedTensor\n"
    evil = b"\x80\x02c__builtin__\ngetattr\n" + owner + b"X\x04\0\0\0load\x86R)R."
    with zipfile.ZipFile(tmp_path / "model_rank00000.pt", "w") as file:
        file.writestr("archive/data.pkl", evil)
        file.writestr("archive/version", "3")
    assert "ShardedTensor" in open_rank_files(tmp_path).foreign[0]


def test_a_folder_of_verl_has_its_config_and_the_state_of_its_run(tmp_path):
    model = {"w": torch.randn(6, 2)}
    moments = {"exp_avg": torch.randn(6, 2)}
    write_ranks(tmp_path, (2,), {"w": (model["w"], (Shard(0),))})
    for rank in range(2):
        (tmp_path / f"model_rank{rank:05}.pt").rename(tmp_path / f"model_world_size_2_rank_{rank}.pt")
        torch.save(
            {"state": {0: moments}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            tmp_path / f"optim_world_size_2_rank_{rank}.pt",
        )
        torch.save(
            {"lr_scheduler": {"last_epoch": 7}, "rng": {"cpu": torch.tensor([rank])}},
            tmp_path / f"extra_state_world_size_2_rank_{rank}.pt",
        )
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface/config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 2}))
    container = open_container(tmp_path)
    assert torch.equal(tensor(container, "model.w"), model["w"])
    assert torch.equal(tensor(container, "optim.state.0.exp_avg"), moments["exp_avg"])
    assert container.content["config"]["num_attention_heads"] == 2
    assert container.content["extra_state"]["lr_scheduler"] == {"last_epoch": 7}
    assert container.notes == [
        "extra_state_world_size_2_rank_*.pt: rng.cpu: ranks have copies that differ. The first rank's count."
    ]
    assert container.files["huggingface/config.json"] > 0


def test_an_optimizer_of_plain_parts_is_not_taken_from_the_first_rank(tmp_path):
    write_fsdp1(tmp_path, "model_world_size_2_rank_{rank}.pt", {"w": torch.ones(4, 2)}, 2)
    for rank in range(2):  # FSDP1's own optimizer has a rank's part of each moment, end to end
        state = {"state": {0: {"exp_avg": torch.full((4,), float(rank))}}, "param_groups": []}
        torch.save(state, tmp_path / f"optim_world_size_2_rank_{rank}.pt")
    container = open_container(tmp_path)
    assert list(container.tensors) == ["model.w"]
    assert container.notes[0].startswith(f"not joined: {tmp_path}: the files of 2 ranks (optim_world_size_2_rank_*.pt)")
    with pytest.raises(CheckpointMismatch, match="expected an optimizer"):
        converted(tmp_path, tmp_path.with_suffix(".pt"), "pt", include_optimizer=True)


def test_files_of_ranks_beside_a_model_are_not_taken_for_it(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "model_000100.pt")
    torch.save({"state": {}}, tmp_path / "optim_000100_rank0.pt")
    assert rank_files(tmp_path) == {}  # a folder of nanochat


def test_plain_parts_that_differ_are_not_joined_and_equal_copies_are_one_model(tmp_path):
    for rank in range(2):
        torch.save({"w": torch.full((2,), float(rank))}, tmp_path / f"model.rank_{rank}.pth")
    with pytest.raises(
        CheckpointError, match=r"the files of 2 ranks \(model\.rank_\*\.pth\), which cannot .* differ in w"
    ):
        open_container(tmp_path)
    shutil.copy(tmp_path / "model.rank_0.pth", tmp_path / "model.rank_1.pth")
    assert_same(open_container(tmp_path), {"w": torch.zeros(2)})


def test_several_saves_in_one_folder_are_named(tmp_path):
    for step in ("0001249", "0002499"):
        write_fsdp1(tmp_path, f"model_{step}.rank_{{rank}}.pth", {"w": torch.ones(2)}, 2)
    with pytest.raises(
        CheckpointNotFound, match=r"holds 2 sets of rank files, model_0001249\.rank_\*\.pth, model_0002499"
    ):
        open_rank_files(tmp_path)


def test_flat_parameters_of_dinov2_are_refused_with_the_file_that_has_the_teacher(tmp_path):
    write_fsdp1(tmp_path, "model_0002499.rank_{rank}.pth", {"_flat_param": torch.ones(72)}, 2)
    assert "save a full state dict" in part_of_model(open_container(tmp_path))
    for step in ("training_1249", "training_2499"):
        (tmp_path / "eval" / step).mkdir(parents=True)
        torch.save({}, tmp_path / "eval" / step / "teacher_checkpoint.pth")
    said = part_of_model(open_container(tmp_path))
    assert said.endswith(
        f"{tmp_path}/eval/training_2499/teacher_checkpoint.pth has the weights of the teacher whole, as "
        "dinov2 writes them: take that."
    )


@pytest.mark.full
def test_what_two_real_ranks_of_fsdp_wrote_is_the_model(tmp_path):
    torch.multiprocessing.spawn(write_with_fsdp, (tmp_path, free_port()), nprocs=2)
    whole = torch.load(tmp_path / "whole.pt")
    for name in ("fsdp2", "fsdp1"):
        assert_same(open_container(tmp_path / name), whole)
    assert "_flat_param" in part_of_model(open_container(tmp_path / "local"))
    assert_same(open_container(tmp_path / "nocoll"), {f"model.{name}": tensor for name, tensor in whole.items()})


# what is missing or damaged


def test_a_missing_rank_is_named_and_refused_when_its_part_is_needed(copied):
    (copied / "model_rank00002.pt").unlink()
    with pytest.raises(CheckpointDamaged) as caught:
        open_rank_files(copied)
    said = str(caught.value)
    assert said.startswith(
        f"{copied}: model_rank00002.pt missing, 3 of 4 ranks are here. 23 tensors lack parts, first "
    )
    assert "embed.weight: its blocks have 2250 elements, its shape (101, 30) 3030: some are missing" in said


def test_missing_last_ranks_are_known_from_the_mesh(copied):
    for rank in (1, 2, 3):
        (copied / f"model_rank0000{rank}.pt").unlink()
    with pytest.raises(CheckpointDamaged, match=r"_rank00001\.pt, .*_rank00003\.pt missing, 1 of 4 ranks are here"):
        open_rank_files(copied)


def test_a_missing_copy_is_only_noted(tmp_path):
    w = torch.randn(6, 2)
    write_ranks(tmp_path, (2, 2), {"w": (w, (Replicate(), Shard(0)))})
    (tmp_path / "model_rank00000.pt").unlink()
    container = open_rank_files(tmp_path)
    assert_same(container, {"w": w})
    assert container.notes == ["model_rank00000.pt missing, 3 of 4 ranks are here; nothing is lost with them."]


def test_copies_that_differ_are_noted_and_the_first_counts(tmp_path):
    write_ranks(tmp_path, (2,), {"w": (torch.ones(4), (Shard(0),))}, plain=lambda rank: {"rng": torch.tensor([rank])})
    container = open_rank_files(tmp_path)
    assert container.notes == ["model_rank*.pt: rng: ranks have copies that differ. The first rank's count."]
    assert torch.equal(tensor(container, "rng"), torch.tensor([0]))


def test_files_of_different_saves_are_refused(tmp_path, copied):
    other = tmp_path / "other"
    other.mkdir()
    write_ranks(other, (4,), {"scale": (torch.ones(2), (Shard(0),))})
    shutil.copy(other / "model_rank00001.pt", copied)
    with pytest.raises(
        CheckpointDamaged, match=r"_rank00001\.pt: scale is a part of float32 \(2,\), in .* \(1,\)\. The"
    ):
        open_rank_files(copied)


def test_a_part_of_another_size_than_its_place_is_refused(tmp_path):
    for name, rows in (("a", 8), ("b", 9)):
        (tmp_path / name).mkdir()
        write_ranks(tmp_path / name, (2,), {"w": (torch.ones(rows), (Shard(0),))})
    file = tmp_path / "a/model_rank00000.pt"
    data = torch.load(file, weights_only=False)
    data["w"]._spec.tensor_meta = None
    object.__setattr__(data["w"], "_local_tensor", torch.ones(3))
    torch.save(data, file)
    with pytest.raises(CheckpointDamaged, match=r"w: holds \(3,\) of a DTensor \(8,\), expected \(4,\) at \(0,\) of a"):
        open_rank_files(tmp_path / "a")


def test_no_files_of_ranks(tmp_path):
    with pytest.raises(CheckpointNotFound, match=r"no rank files here, expected model_rank00000\.pt"):
        open_rank_files(tmp_path)


# the folder of a step


def test_the_parts_of_a_step_are_named_after_what_they_are(step):
    assert is_step_folder(step)
    container = open_step_folder(step)
    expected = {f"optimizer.{n}": t for n, t in expected_optimizer(step).items()}
    for part in ("model", "ema"):
        loaded = safetensors.torch.load_file(step.parent / f"expected_{part}.safetensors")
        expected |= {f"{part}.{n}": t for n, t in loaded.items()}
    assert_same(container, expected)
    assert container.kind == "step folder, ema (DCP), model (DCP), optimizer (4 ranks)"
    assert container.content["metadata"] == json.loads((step / "metadata.json").read_text())
    files = [p for p in step.rglob("*") if p.is_file()]
    assert container.files == {p.relative_to(step).as_posix(): p.stat().st_size for p in files}
    assert container.notes == ["model_rank*.pt: 4 files with the model again, not looked into."]
    assert [c.names for c in container.checks if checksum_fails(container, c)] == []


def test_a_step_of_safetensors_has_its_average_beside_the_model(tmp_path):
    model, ema = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    safetensors.torch.save_file(model, tmp_path / "model.safetensors")
    assert not is_step_folder(tmp_path)
    safetensors.torch.save_file(ema, tmp_path / "ema.safetensors")
    assert is_step_folder(tmp_path)
    container = open_step_folder(tmp_path)
    assert container.kind == "step folder, ema (safetensors), model (safetensors)"
    assert_same(container, {"model.w": model["w"], "ema.w": ema["w"]})


def test_the_files_of_ranks_are_read_where_no_folder_has_the_model(step, tmp_path):
    shutil.copy(step / "metadata.json", tmp_path)
    for file in step.glob("model_rank*.pt"):
        shutil.copy(file, tmp_path)
    assert is_step_folder(tmp_path)
    container = open_step_folder(tmp_path)
    model = safetensors.torch.load_file(step.parent / "expected_model.safetensors")
    assert_same(container, {f"model.{n}": t for n, t in model.items()})
    assert container.kind == "step folder, model (4 ranks)"


def test_damage_in_a_part_names_the_part(step, tmp_path):
    folder = shutil.copytree(step, tmp_path / "x")
    (folder / "ema_sharded/.metadata").unlink()
    with pytest.raises(CheckpointDamaged, match=r"x/ema_sharded/\.metadata: missing\. The \.distcp files \(4\) hold"):
        open_step_folder(folder)
    shutil.rmtree(folder / "ema_sharded")
    (folder / "metadata.json").write_text('{"train_steps": 2')
    with pytest.raises(CheckpointDamaged, match=r"x/metadata\.json: 17 bytes that are not valid JSON"):
        open_step_folder(folder)


def test_a_folder_without_parts_is_no_step(tmp_path):
    (tmp_path / "metadata.json").write_text("{}")
    assert not is_step_folder(tmp_path)  # as are the folders of other programs
    with pytest.raises(CheckpointNotFound, match="not a step folder, expected model_sharded/, ema"):
        open_step_folder(tmp_path)


def test_specs_of_the_content_are_those_by_name(step):
    container = open_step_folder(step)
    spec = container.content["ema"]["embed.weight"]
    assert isinstance(spec, TensorSpec) and spec is container.tensors["ema.embed.weight"]
    assert spec.chunks[1].file == "ema_sharded/__1_0.distcp"
    assert bits(tensor(container, spec.name)).numel() == spec.nbytes


def test_names_of_a_part_may_not_collide(tmp_path):
    save({"w": torch.ones(2)}, tmp_path / "model_sharded")
    save({"w": torch.ones(2)}, tmp_path / "metadata_sharded")
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(CheckpointDamaged, match='two parts of it are called "metadata"'):
        open_step_folder(tmp_path)
