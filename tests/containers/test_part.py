"""A part of a model under the whole model's names: placeholders, pieces end to end, files of one rank."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.containers.open import open_container
from core.containers.part import rank_pattern
from core.errors import CheckpointError, CheckpointMismatch
from core.inspection.inspect import inspect_path
from core.inspection.report import facts_of
from tests.makers.containers import CASES, assert_same
from tests.makers.conversions import converted, same

WEIGHTS = {f"layers.{i}.{name}": (4, 4) for i in range(3) for name in ("up.weight", "down.weight")}


def written(tensors: dict[str, torch.Tensor], path: Path, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def refused(path: Path, to: str = "pt") -> str:
    """The refusal of a conversion; inspection shows the file all the same, with the reason as a contradiction."""
    with pytest.raises(CheckpointMismatch) as caught:
        converted(path, path.parent / f"out.{to}", to)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and not (path.parent / f"out.{to}").exists()
    with inspect_path(path) as found:
        assert f"only a part of a model: {said.removeprefix(f'{path}: ')}" in facts_of(found)["contradictions"]
    return said


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "zero_pp_rank_0_mp_rank_00_model_states.pt"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("kept", [0, 2])
def test_placeholders_of_zero_3_are_no_model(tmp_path, name, prefix, kept):
    tensors = {n: torch.zeros(0) for n in WEIGHTS} | {f"layers.{i}.norm.weight": torch.ones(4) for i in range(kept)}
    said = refused(written(tensors, tmp_path / "m" / name, prefix))
    assert f"{len(WEIGHTS)} of {len(tensors)} parameters have the shape (0,), such as {prefix}layers.0." in said
    assert "DeepSpeed's ZeRO-3" in said and "`python zero_to_fp32.py FOLDER OUT` joins them; convert OUT." in said
    script = tmp_path / "m" / "zero_to_fp32.py"
    script.write_text("")
    assert f"`python {script} {tmp_path / 'm'} OUT` joins them" in refused(tmp_path / "m" / name)


def test_a_few_empty_tensors_are_those_of_a_model(tmp_path):
    tensors = {n: torch.ones(4, 4) for n in WEIGHTS} | {"unused.weight": torch.zeros(0), "unused.bias": torch.zeros(0)}
    path = written(tensors, tmp_path / "m.safetensors")
    converted(path, tmp_path / "o.pt", "pt")
    assert same(torch.load(tmp_path / "o.pt", weights_only=True), tensors)


@pytest.mark.parametrize("name", ["_flat_param", "flat_param", "flat_param_0", "_fsdp_wrapped_module.flat_param_3"])
@pytest.mark.parametrize("prefix", ["", "model.", "_fsdp_wrapped_module."])
def test_fsdps_flat_parameters_are_no_model(tmp_path, name, prefix):
    said = refused(written({name: torch.zeros(72), "bias": torch.zeros(3)}, tmp_path / "m.pt", prefix))
    assert f"{prefix}{name} (72,) holds many parameters end to end" in said
    assert "FULL_STATE_DICT" in said and "full_state_dict=True" in said


def test_deepspeeds_flat_groups_are_no_model(tmp_path):
    torch.save({"optimizer_state_dict": {"fp32_flat_groups": [torch.zeros(9)]}}, tmp_path / "optim_states.pt")
    assert "a rank's part of DeepSpeed's ZeRO. Run zero_to_fp32.py" in refused(tmp_path / "optim_states.pt")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_pieces_in_one_dimension_are_no_model(tmp_path, rank):
    flat = torch.zeros(16 * len(WEIGHTS)).chunk(2)[rank]
    pieces = {name: flat[:9].clone() for name in WEIGHTS} | {"norm.weight": torch.ones(4)}
    assert "none of its 7 weights has two dimensions (layers.0.down.weight is (9,))" in refused(
        written(pieces, tmp_path / "m.safetensors")
    )


def test_vectors_with_the_names_of_norms_are_kept(tmp_path):
    norms = {f"layers.{i}.input_layernorm.weight": torch.ones(4) for i in range(5)} | {"ln_f.weight": torch.ones(4)}
    converted(written(norms, tmp_path / "m.safetensors"), tmp_path / "o.pt", "pt")
    assert same(torch.load(tmp_path / "o.pt", weights_only=True), dict(sorted(norms.items())))


RANKS = [
    ("consolidated.00.pth", "consolidated.01.pth"),
    ("model_final.rank_0.pth", "model_final.rank_1.pth"),
    ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
    ("tp_rank_0_pp_rank_0.pt", "tp_rank_0_pp_rank_1.pt"),
    ("tp0-pp1.pt", "tp0-pp0.pt"),
    ("rank0/weights.pt", "rank1/weights.pt"),
    ("mp_rank_00_001/weights.pt", "mp_rank_00_000/weights.pt"),
]


@pytest.mark.parametrize(("one", "other"), [*RANKS, *((b, a) for a, b in RANKS)])
def test_a_file_of_one_rank_is_no_model_when_its_siblings_lie_beside_it(tmp_path, one, other):
    tensors = {name: torch.ones(4, 4) for name in WEIGHTS}
    path = written(tensors, tmp_path / one)
    converted(path, tmp_path / "alone.pt", "pt")
    written(tensors, tmp_path / other)
    said = refused(path)
    assert f"the file of one rank; beside it are those of 1 more ({other})" in said
    assert "if each has the whole model, copy this one to a folder of its own" in said


@pytest.mark.parametrize(
    "names", [("lora_rank_8.pt", "lora_rank_16.pt"), ("frank0.pt", "frank1.pt"), ("v1.pt", "v2.pt")]
)
def test_other_numbers_in_names_are_no_ranks(tmp_path, names):
    tensors = {name: torch.ones(4, 4) for name in WEIGHTS}
    for name in names:
        written(tensors, tmp_path / "m" / name)
    converted(tmp_path / "m" / names[0], tmp_path / "o.pt", "pt")
    assert same(torch.load(tmp_path / "o.pt", weights_only=True), tensors)


def test_a_folder_of_rank_files_that_cannot_be_joined_names_no_file_to_take(tmp_path):
    for rank in range(3):
        written({"a.weight": torch.full((4, 4), float(rank))}, tmp_path / f"model_final.rank_{rank}.pth")
    with pytest.raises(
        CheckpointError, match=r"the files of 3 ranks \(.*\), which cannot be joined here: .*Join them with"
    ):
        inspect_path(tmp_path)


def test_a_grid_of_ranks_is_not_called_several_saves(tmp_path):
    for name in ("tp_rank_0_pp_rank_0.pt", "tp_rank_1_pp_rank_0.pt"):
        written({"a.weight": torch.ones(4, 4)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"the files of 2 ranks \(.*Join them with the program that wrote them"):
        inspect_path(tmp_path)


def test_one_file_of_several_saves_of_ranks_is_shown_with_what_to_do(tmp_path):
    for name in ("m_10.rank_0.pth", "m_10.rank_1.pth", "m_20.rank_0.pth", "m_20.rank_1.pth"):
        written({"a.weight": torch.ones(4, 4)}, tmp_path / name)
    with inspect_path(tmp_path / "m_20.rank_0.pth") as found:
        assert "those of 1 more (m_20.rank_1.pth). Copy these to a folder of their own, and name it" in found.partial


@pytest.mark.parametrize(
    ("name", "others"),
    [("a_rank_3.pt", ["a_rank_10.pt"]), ("mp_rank_00_001", ["mp_rank_01_000"]), ("consolidated.00.pth", [])],
)
def test_the_pattern_of_a_rank_matches_the_names_of_others(name, others):
    pattern = rank_pattern(name)
    assert pattern is not None and all(re.fullmatch(pattern, other) for other in (name, *others))
    assert rank_pattern("model.pt") is None


def test_the_shards_of_verl_are_joined_and_two_worlds_are_two_sets(tmp_path):
    case = next(one for one in CASES if one.name == "rank_files")
    folder = case.write(tmp_path)
    names = sorted(folder.glob("model_rank*.pt"))
    whole = case.load(folder)
    for k, path in enumerate(names):
        path.rename(folder / f"model_world_size_{len(names)}_rank_{k}.pt")
    assert_same(open_container(folder), whole)
    shutil.copyfile(folder / f"model_world_size_{len(names)}_rank_0.pt", folder / "model_world_size_9_rank_8.pt")
    with pytest.raises(CheckpointError, match="holds 2 sets of rank files"):
        open_container(folder)
