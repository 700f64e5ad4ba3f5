"""Conversions between our GPT and Hugging Face GPT-2: the same logits, and the same bytes there and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointMismatch
from core.model import GPT
from tests.makers.conversions import converted, expected, hf_logits, index_of, our_logits, tensors_of, worst
from tests.makers.models import config, started, train_and_save

# Hugging Face


@pytest.mark.parametrize("folder", ["hf_gpt2", "hf_gpt2_sharded"])
def test_hugging_face_gpt2_becomes_a_bundle_with_the_same_logits_and_comes_back(shared, tmp_path, folder):
    ids, logits = expected(shared / "fixtures/hf_gpt2")
    converted(shared / "fixtures" / folder, tmp_path / "b", "bundle")
    assert json.loads((tmp_path / "b/config.json").read_text())["activation"] == "gelu_tanh"
    assert (our_logits(tmp_path / "b", ids) - logits).abs().max() < 1e-5
    converted(tmp_path / "b", tmp_path / "hf", "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(shared / "fixtures" / folder)


@pytest.mark.full
def test_transformers_computes_the_same_logits_from_what_came_back(shared, tmp_path):
    ids, logits = expected(shared / "fixtures/hf_gpt2")
    converted(shared / "fixtures/hf_gpt2", tmp_path / "b", "bundle")
    converted(tmp_path / "b", tmp_path / "hf", "hf")
    assert worst(hf_logits(tmp_path / "hf", ids), logits) < 2e-6


def test_names_as_the_first_files_of_gpt2_have_them_without_prefix_and_with_masks(hf, tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 4, "n_layer": 3, "n_ctx": 64}))
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(hf / "model.safetensors").items()}
    masks = {f"h.{i}.attn.bias": torch.ones(64, 64).tril()[None, None].clone() for i in range(3)}
    save_file({**tensors, **masks}, folder / "model.safetensors")
    plan = converted(folder, tmp_path / "b", "bundle")
    assert plan["dropped"] == dict.fromkeys(masks, "the causal mask")
    ids, logits = expected(hf)
    assert (our_logits(tmp_path / "b", ids) - logits).abs().max() < 1e-5
    converted(folder, tmp_path / "hf", "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(hf)


def test_a_bin_file_in_a_folder_is_read_without_running_anything(hf, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(hf / "config.json", folder)
    shutil.copy(hf / "pytorch_model.bin.ref", folder / "pytorch_model.bin")
    converted(folder, tmp_path / "b", "bundle")
    made = torch.load(tmp_path / "b/model.pt", weights_only=True)
    source = torch.load(hf / "pytorch_model.bin.ref", weights_only=True)
    assert torch.equal(made["blocks.1.fwd.net.0.weight"], source["transformer.h.1.mlp.c_fc.weight"].t())
    assert torch.equal(made["ln_f.bias"], source["transformer.ln_f.bias"])
    with pytest.raises(CheckpointMismatch, match=r"nothing in the file shows its heads and activation, without which"):
        converted(hf / "pytorch_model.bin.ref", tmp_path / "d", "bundle")


def test_hugging_face_gpt2_is_refused_by_nanogpt_for_its_activation(hf, tmp_path):
    with pytest.raises(CheckpointMismatch) as caught:
        converted(hf, tmp_path / "ckpt.pt", "nanogpt")
    assert str(caught.value) == (
        f"{hf}: it computes the tanh form of GELU (gelu_new), nanoGPT the exact GELU: other logits. --to bundle and "
        "--to hf keep it."
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("activation_function", "silu", "activation_function is 'silu'; our GPT computes gelu, "),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True; our GPT computes False."),
        ("n_head", 5, "n_head is 5"),
    ],
)
def test_what_our_gpt_does_not_compute_is_refused_by_field(hf, tmp_path, field, value, message):
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, field: value}))
    with pytest.raises(CheckpointMismatch) as caught:
        converted(folder, tmp_path / "b", "bundle")
    assert message in str(caught.value) and not (tmp_path / "b").exists()


# Ours


def zero_head_bias(source: Path, target: Path) -> Path:
    folder = Path(shutil.copytree(source, target))
    weights = torch.load(folder / "model.pt", weights_only=True)
    weights["lm_head.bias"].zero_()
    torch.save(weights, folder / "model.pt")
    return folder


@pytest.mark.full
def test_transformers_computes_the_logits_of_a_lecture_model_whose_head_has_no_bias(shared, tmp_path):
    source = shared / "fixtures/lecture_char/bundle"
    ids, logits = expected(shared / "fixtures/lecture_char")
    bias = torch.load(source / "model.pt", weights_only=True)["lm_head.bias"]
    converted(zero_head_bias(source, tmp_path / "zero"), tmp_path / "hf", "hf")
    assert worst(hf_logits(tmp_path / "hf", ids), logits - bias) < 2e-6


def test_a_lecture_bundle_becomes_hugging_face_once_its_head_has_no_bias(shared, tmp_path):
    source = shared / "fixtures/lecture_char/bundle"
    with pytest.raises(CheckpointMismatch) as caught:
        converted(source, tmp_path / "hf", "hf")
    assert str(caught.value) == (
        f"{source}: lm_head.bias has values other than 0, and HF GPT-2 has no bias in its head: it would compute other "
        "logits. --to safetensors and --to bundle keep it; python train.py --tied_head starts a model that GPT-2 and "
        "nanoGPT compute."
    )
    plan = converted(zero_head_bias(source, tmp_path / "zero"), tmp_path / "hf", "hf")
    assert plan["dropped"]["lm_head.bias"] == "all zeros; HF GPT-2 has no bias in its head"
    made = json.loads((tmp_path / "hf/config.json").read_text())
    assert (made["activation_function"], made["tie_word_embeddings"], made["dtype"]) == ("relu", False, "float32")
    assert made["torch_dtype"] == made["dtype"] and "trained for 30 steps" in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize("part", ["bundle", "legacy/latest.pt", "legacy/final.pt", "bundle_v2_bf16"])
def test_lecture_files_become_bundles_with_the_same_logits(shared, tmp_path, part):
    ids, logits = expected(shared / "fixtures/lecture_char")
    converted(shared / "fixtures/lecture_char" / part, tmp_path / "b", "bundle")
    found = our_logits(tmp_path / "b", ids)
    assert (found - logits).abs().max() < (0.05 if "bf16" in part else 1e-5)
    assert found.dtype == torch.float32


SHAPES = pytest.mark.parametrize(
    "fields",
    [
        {"bias": False, "tied_head": True, "head_bias": False},
        {"bias": True, "tied_head": False, "head_bias": False, "activation": "gelu_tanh"},
        {"bias": False, "norm_bias": False, "mlp_bias": False, "head_bias": True, "activation": "relu"},
    ],
)


def model_to_hugging_face(folder: Path, fields: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Save a model of ours in `m`, convert it to `hf`; ids, and the logits that it computes."""
    model = GPT(config(**fields)).eval()
    if model.config.head_bias:
        torch.nn.init.zeros_(model.lm_head.bias)
    model.save_checkpoint_bundle(folder / "m", step=7)
    converted(folder / "m", folder / "hf", "hf", shard_size=20_000)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        return ids, model(ids)[0]


@SHAPES
def test_our_own_models_of_every_shape_go_to_hugging_face_and_back(tmp_path, fields):
    ids, logits = model_to_hugging_face(tmp_path, fields)
    index = index_of(tmp_path / "hf")
    assert index["metadata"]["total_size"] == sum(len(t[2]) for t in tensors_of(tmp_path / "hf").values())
    converted(tmp_path / "hf", tmp_path / "back", "bundle")
    assert (our_logits(tmp_path / "back", ids) - logits).abs().max() < 1e-5
    first, second = tensors_of(tmp_path / "m/model.pt"), tensors_of(tmp_path / "back/model.pt")
    assert all(second[name] == tensor for name, tensor in first.items() if name != "lm_head.bias")
    assert all(not any(second[name][2]) for name in second.keys() - first.keys())


@pytest.mark.full
@SHAPES
def test_transformers_computes_the_logits_of_our_own_models(tmp_path, fields):
    ids, logits = model_to_hugging_face(tmp_path, fields)
    assert worst(hf_logits(tmp_path / "hf", ids), logits) < 2e-6


def test_a_bundle_keeps_its_history_of_training_and_optimizer(tmp_path):
    made, model, optimizer = started(tmp_path, "dante")
    train_and_save(made, model, optimizer, 3, val_loss=lambda step: 4.0 - step / 10)
    converted(tmp_path / "dante", tmp_path / "copy", "bundle")
    first, second = (torch.load(tmp_path / n / "optimizer.pt", weights_only=True) for n in ("dante", "copy"))
    assert first["param_groups"] == second["param_groups"]
    assert all(torch.equal(first["state"][k]["exp_avg"], second["state"][k]["exp_avg"]) for k in first["state"])
    states = [json.loads((tmp_path / n / "training_state.json").read_text()) for n in ("dante", "copy")]
    assert states[0]["best"] == states[1]["best"] and states[1]["step"] == 3
    assert GPT.load(tmp_path / "copy")[2] == 3
