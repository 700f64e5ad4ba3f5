"""Iterations of Megatron (torch_dist): recognised, inspected, converted by the arguments of their run."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.inspection.inspect import inspect_path
from core.model import GPT
from tests.makers.conversions import converted, tensors_of, texts, worst
from tests.makers.megatron_exports import GPT2, LLAMA, QWEN, RUN, THETA, export_of, exported, off_by, refused
from tests.makers.megatron_iterations import STATEFUL, stacked, write_iteration

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.full
@pytest.mark.parametrize("name", [LLAMA, QWEN, GPT2])
def test_transformers_computes_the_logits_of_an_iteration(fixtures, tmp_path, name):
    state, config = exported(export_of(fixtures, name))
    converted(write_iteration(tmp_path / "iter_0000100", state, **config, **RUN[name]), tmp_path / "hf", "hf")
    expected = load_file(fixtures / name / "expected.safetensors")
    assert off_by(tmp_path / "hf", expected["input_ids"], expected["logits_fp32"]) < 2e-6


@pytest.mark.parametrize("name", [LLAMA, QWEN, GPT2])
def test_an_iteration_becomes_a_bundle_of_ours_with_its_logits(fixtures, tmp_path, name):
    state, config = exported(export_of(fixtures, name))
    converted(write_iteration(tmp_path / "iter_0000100", state, **config, **RUN[name]), tmp_path / "ours", "bundle")
    known = load_file(fixtures / name / "expected.safetensors")
    with torch.no_grad():
        logits = GPT.load(tmp_path / "ours", load_dtype="fp32")[0].eval()(known["input_ids"].long())[0]
    assert worst(logits, known["logits_fp32"]) < 1e-5


@pytest.mark.parametrize("name", [LLAMA, QWEN, GPT2])
@pytest.mark.parametrize("common", ["common.pt", "common_state"])
def test_an_iteration_is_converted_by_the_arguments_of_its_run(fixtures, tmp_path, name, common):
    state, config = exported(export_of(fixtures, name))
    source = write_iteration(tmp_path / "iter_0000100", state, common=common, **config, **RUN[name])
    facts = converted(source, tmp_path / "hf", "hf")
    assert not any("a default" in note or "the tensors win" in note for note in facts["notes"])
    layers = config["num_layers"]
    others = f"{len(stacked(state))} of optimizer, 2 of rng_state, 1 of {common.removesuffix('.pt')}"
    assert sorted(others.split(", ")) == sorted(facts["notes"][0].split(": ")[1].split(", "))
    assert facts["dropped"] == {
        f"decoder.layers.{part}._extra_state/shard_{i}_{layers}": "what Transformer Engine keeps for FP8, here None"
        for part in STATEFUL
        for i in range(layers)
    }
    converted(export_of(fixtures, name), tmp_path / "direct", "hf", **({} if name == GPT2 else THETA))
    assert tensors_of(tmp_path / "hf") == tensors_of(tmp_path / "direct")
    converted(source, tmp_path / "export", "megatron")
    found, said = exported(tmp_path / "export/exported_model.pt")
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    assert config.items() <= said.items() and RUN[name].items() - {("add_qkv_bias", False)} <= said.items()
    converted(source, tmp_path / "a.safetensors", "safetensors")
    kept = load_file(tmp_path / "a.safetensors")
    assert kept["decoder.layers.mlp.linear_fc2.weight"].shape[0] == config["num_layers"]


def test_layers_that_are_saved_apart_make_no_difference(fixtures, tmp_path):
    state, config = exported(export_of(fixtures, LLAMA))
    for k, apart in enumerate((False, True)):
        source = write_iteration(tmp_path / f"iter_{k:07}", state, layers_apart=apart, **config, **RUN[LLAMA])
        converted(source, tmp_path / str(k), "hf")
    assert tensors_of(tmp_path / "1") == tensors_of(tmp_path / "0")


@pytest.mark.parametrize(
    ("extra", "said"), [(io.BytesIO(b"amax"), "_io.BytesIO"), (torch.zeros(5, dtype=torch.uint8), "a tensor")]
)
def test_what_transformer_engine_keeps_of_each_layer_is_listed_and_in_nobodys_way(fixtures, tmp_path, extra, said):
    state, config = exported(export_of(fixtures, QWEN))
    source = write_iteration(tmp_path / "iter_0000001", state, extra=extra, **config, **RUN[QWEN])
    facts = converted(source, tmp_path / "hf", "hf")
    reasons = [reason for name, reason in facts["dropped"].items() if "_extra_state/shard_" in name]
    assert len(reasons) == 12 and all(f"keeps for FP8, here {said}" in reason for reason in reasons)
    converted(export_of(fixtures, QWEN), tmp_path / "direct", "hf", **THETA)
    assert tensors_of(tmp_path / "hf") == tensors_of(tmp_path / "direct")
    converted(source, tmp_path / "x.safetensors", "safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == stacked(state).keys()


@pytest.mark.parametrize("common", ["common.pt", "common_state"])
def test_inspection_knows_the_model_and_what_its_run_says(fixtures, tmp_path, common):
    state, config = exported(export_of(fixtures, LLAMA))
    write_iteration(tmp_path / "iter_0000100", state, common=common, **config, **RUN[LLAMA])
    for path in (tmp_path, tmp_path / "iter_0000100"):
        with inspect_path(path) as found:
            shape = found.identity.architecture
            assert found.container.kind == "Megatron iteration (torch_dist), DCP folder, 4 files"
            assert found.weights.keys() == stacked(state).keys() and found.step == 100
            assert (shape.n_head, shape.n_kv_head, shape.head_size, shape.block_size) == (8, 2, 8, 64)
            assert shape.parameters == sum(tensor.numel() for tensor in state.values())
            assert not found.identity.conflicts and not found.identity.unplaced and not found.container.foreign


def test_a_gate_in_two_tensors_is_refused_by_name(fixtures, tmp_path):
    """What singleton_local_shards makes of a gate, which Megatron's own training does not ask for."""
    state, config = exported(export_of(fixtures, LLAMA))
    for i in range(2):
        gate, up = state.pop(f"decoder.layers.{i}.mlp.linear_fc1.weight").chunk(2)
        state |= {
            f"decoder.layers.{i}.mlp.linear_fc1.weight_w": gate,
            f"decoder.layers.{i}.mlp.linear_fc1.weight_v": up,
        }
    source = write_iteration(tmp_path / "iter_0000001", state, layers_apart=True, **config, **RUN[LLAMA])
    assert "decoder.layers.0.mlp.linear_fc1.weight_w has no place in it." in refused(source, tmp_path / "hf")


def test_a_gate_of_another_activation_is_refused(fixtures, tmp_path):
    state, config = exported(export_of(fixtures, LLAMA))
    source = write_iteration(tmp_path / "iter_0000001", state, **config, **{**RUN[LLAMA], "swiglu": False})
    assert refused(source, tmp_path / "hf").endswith(
        "swiglu is false in its config, and it has a gate: of another activation than Llama's silu."
    )


# Positions scaled as Llama 3's


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def frequencies(base: float, width: int, factor: float) -> torch.Tensor:
    """Those of Megatron's RotaryEmbedding with rope_scaling, written down one by one."""
    found = []
    for plain in 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)):
        periods = 8192 * plain / (2 * torch.pi)  # in the texts of the first training
        part = (8192 / (2 * torch.pi / plain) - 1) / (4 - 1)
        low, mixed = plain / factor, (1 - part) * plain / factor + part * plain
        found.append(low if periods < 1 else plain if periods > 4 else mixed)
    return torch.stack(found)


SCALED = pytest.mark.parametrize(("args", "factor"), [({}, 8.0), ({"rope_scaling_factor": 32.0}, 32.0)])


@pytest.mark.full
@SCALED
def test_transformers_scales_positions_as_megatron_does_to_the_bit(fixtures, tmp_path, args, factor):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    state, config = exported(export_of(fixtures, LLAMA))
    run = {**config, **RUN[LLAMA], "use_rope_scaling": True, **args}
    converted(write_iteration(tmp_path / "iter_0000001", state, **run), tmp_path / "hf", "hf")
    opened = AutoConfig.from_pretrained(tmp_path / "hf")
    opened.head_dim = 64
    found = LlamaRotaryEmbedding(opened).inv_freq
    assert torch.equal(found, frequencies(500000.0, 64, factor))
    assert len({*(found / frequencies(500000.0, 64, 1.0)).tolist()}) > 3  # kept, divided, and some between


@SCALED
def test_scaled_positions_become_those_of_llama_3(fixtures, tmp_path, args, factor):
    state, config = exported(export_of(fixtures, LLAMA))
    run = {**config, **RUN[LLAMA], "use_rope_scaling": True, **args}
    source = write_iteration(tmp_path / "iter_0000001", state, **run)
    converted(source, tmp_path / "hf", "hf")
    made = config_of(tmp_path / "hf")
    scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": factor}
    scaling["original_max_position_embeddings"] = 8192
    assert made["rope_scaling"] == scaling and made["rope_parameters"] == {**scaling, "rope_theta": 500000.0}
    for k, path in enumerate((tmp_path / "hf", source)):
        converted(path, tmp_path / f"{k}.pt", "megatron")
        said = exported(tmp_path / f"{k}.pt")[1]
        assert said["use_rope_scaling"] is True and said.get("rope_scaling_factor", 8.0) == factor
        converted(tmp_path / f"{k}.pt", tmp_path / f"again{k}", "hf")
        assert (
            json.loads((tmp_path / f"again{k}/config.json").read_text())["rope_parameters"] == made["rope_parameters"]
        )
    flagged = {"rope_scaling_factor": factor}
    converted(export_of(fixtures, LLAMA), tmp_path / "flag", "hf", more=flagged, **THETA)
    assert config_of(tmp_path / "flag")["rope_parameters"] == made["rope_parameters"]


def test_a_factor_that_shortens_is_refused(fixtures, tmp_path):
    said = refused(export_of(fixtures, LLAMA), tmp_path / "hf", more={"rope_scaling_factor": 0.5}, **THETA)
    assert said.endswith("rope_scaling_factor is 0.5, expected a number of at least 1: it makes texts longer.")


# What the arguments of a run may hold


def test_what_is_no_data_in_the_arguments_of_a_run_is_neither_executed_nor_in_the_way(fixtures, tmp_path):
    state, config = exported(export_of(fixtures, LLAMA))
    source = write_iteration(tmp_path / "run/iter_0000100", state, **config, **RUN[LLAMA], trap=Trap())
    converted(source, tmp_path / "hf", "hf")
    (source / "common.pt").unlink()
    assert "Add --n_head 1, 2, 4, 8" in refused(source, tmp_path / "x")


class Trap:
    """Ends the process of whoever unpickles it; Megatron's own arguments hold enums of its modules."""

    def __reduce__(self):
        return sys.exit, (99,)


def test_a_flag_wins_over_what_the_run_says_and_is_said(fixtures, tmp_path):
    state, config = exported(export_of(fixtures, LLAMA))
    source = write_iteration(tmp_path / "iter_0000001", state, **config, **RUN[LLAMA])
    facts = converted(source, tmp_path / "hf", "hf", choices={"rope_theta": 7.0})
    assert "rope base 7.0 (from --rope_theta, overriding 500000 in common.pt)" in texts(facts)
    assert json.loads((tmp_path / "hf/config.json").read_text())["rope_parameters"]["rope_theta"] == 7.0
