"""Bundles of models with choices: what is written of them, that a resume is exact, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from convert_checkpoints import main as convert
from core.checkpoint import CheckpointManager
from core.config.gpt import GPTConfig
from core.errors import CheckpointMismatch
from core.model import GPT
from tests.makers.decoder_reference import LLAMA3
from tests.makers.doors import looked_at
from tests.makers.models import SMALL, equal, save_durably, save_steps, started, tokenizer, update

CHOICES = {
    "pos_encoding": "rotary",
    "rope_theta": 500.0,
    "rope_scaling": LLAMA3,
    "norm_type": "rmsnorm",
    "norm_placement": "both",
    "mlp_type": "swiglu",
    "n_ffn": 24,
    "n_kv_head": 1,
    "head_size": 8,
    "qk_norm": "width",
    "qkv_bias": True,
    "sliding_window": [5, None],
    "logit_cap": 9.0,
    "attention_cap": 7.0,
    "embedding_scale": 3.0,
}
PHI = {"pos_encoding": "rotary", "rotary_percent": 0.5, "parallel_residual": True, "shared_attention_norm": True}
BOTH = pytest.mark.parametrize("choices", [CHOICES, PHI], ids=["gated", "parallel"])


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@BOTH
def test_a_resume_is_exact_and_only_choices_are_written(tmp_path, choices):
    made, model, optimizer = started(tmp_path, config={**SMALL, **choices})
    with made:
        for _ in range(2):
            update(model, optimizer)
        save_durably(made, model, optimizer, step=2)
        update(model, optimizer)
    written = config_of(tmp_path / "dante")
    wanted = {name: value for name, value in choices.items() if name != "qkv_bias"}
    assert {name: written[name] for name in GPTConfig.NEUTRAL if name in written} == wanted
    assert (written["bias"], written["proj_bias"]) == ((True, False) if "qkv_bias" in choices else (False, None))
    assert written["format_version"] == 3 and ("activation" in written) == ("mlp_type" not in choices)
    with CheckpointManager("dante", tmp_path) as again:
        resumed, states, step = again.initialize_for_training({}, tokenizer(), None, 1e-3)
        update(resumed, states)
    assert step == 2 and resumed.config == model.config
    assert equal(resumed.state_dict(), model.state_dict())


NEUTRAL = {
    **{name: value for name, value in GPTConfig.NEUTRAL.items() if value is not None},
    "n_kv_head": 6,
    "n_ffn": 4 * 384,
    "head_size": 64,
    "qkv_bias": False,
    "mlp_type": "gelu",
    "qk_norm": False,
    "sliding_window": [None] * 6,
    "rope_scaling": {"rope_type": "default"},
}


def test_a_field_that_says_what_is_implied_is_not_written():
    assert set(NEUTRAL) | {"logit_cap", "attention_cap"} == set(GPTConfig.NEUTRAL)
    spelled, plain = GPTConfig(**NEUTRAL), GPTConfig()
    assert spelled.to_dict() == plain.to_dict() and plain.to_dict()["format_version"] == 2
    assert spelled.architecture() == plain.architecture()


OTHERS = {
    "rope_theta": 10000.0,
    "rope_scaling": {**LLAMA3, "factor": 4.0},
    "rotary_layout": "pairs",
    "norm_type": "rmsnorm_1p",
    "mlp_type": "geglu",
    "sliding_window": 5,
    "logit_cap": 8.0,
    "attention_cap": None,
    "embedding_scale": 1.0,
    "attention_scale": 0.5,
}


def test_an_edit_that_changes_the_mathematics_is_refused_with_the_value_that_was_saved(tmp_path):
    save_steps(tmp_path, 1, config={**SMALL, **CHOICES})
    path = tmp_path / "dante/config.json"
    values = config_of(tmp_path / "dante")
    for name, other in OTHERS.items():
        path.write_text(json.dumps({**values, name: other}))
        then = values.get(name, GPTConfig.NEUTRAL[name])
        with pytest.raises(CheckpointMismatch) as caught:
            GPT.load(tmp_path / "dante")
        assert f"{name} is {other}, step 1 was saved with {then}. Set it to {then}" in str(caught.value)


MISFITS = {
    "mlp_type": (None, "mlp_type is None, but blocks.0.fwd.gate.weight is there"),
    "qk_norm": (None, "qk_norm is None, but blocks.0.sa.q_norm_wide.weight is there"),
    "norm_placement": ("before", "norm_placement is before, but blocks.0.ln1_post.weight is there"),
    "norm_type": ("rmsnorm_no_weight", "norm_type is rmsnorm_no_weight, but blocks.0.ln1.weight is there"),
    "qkv_bias": (False, "bias is false, but blocks.0.sa.qkv.bias is there. Set bias to true"),
    "parallel_residual": (True, "parallel_residual is true, but norm_placement is both, expected before"),
    "n_kv_head": (2, "blocks.0.sa.qkv.weight"),
    "n_ffn": (128, "blocks.0.fwd.gate.weight"),
    "head_size": (16, "blocks.0.sa.qkv.weight"),
    "block_size": (None, "block_size is missing, and weights without a table of positions do not show it"),
}


def test_a_field_that_does_not_fit_the_tensors_names_the_tensor(tmp_path):
    save_steps(tmp_path, 1, config={**SMALL, **CHOICES})
    path = tmp_path / "dante/config.json"
    values = config_of(tmp_path / "dante")
    for name, (value, said) in MISFITS.items():
        edited = {**values, name: value}
        path.write_text(json.dumps(edited if name != "block_size" else {k: v for k, v in values.items() if k != name}))
        with pytest.raises(CheckpointMismatch) as caught:
            GPT.load(tmp_path / "dante")
        assert str(caught.value).startswith(str(path)) and said in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n_head": 6, "n_kv_head": 4}, "n_head 6 is not divisible by n_kv_head 4; n_kv_head may be 1, 2, 3, 6"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0, but pos_encoding is learned, expected rotary"),
        ({"rotary_layout": "pairs"}, "rotary_layout is pairs, but pos_encoding is learned, expected rotary"),
        ({"pos_encoding": "rotary", "head_size": 7}, "of head_size 7 is 7 numbers, expected an even number from 2"),
        ({"pos_encoding": "rotary", "rotary_percent": 0.01}, "is 0 numbers, expected an even number from 2"),
        ({"rotary_percent": 1.5}, "rotary_percent is 1.5, expected a number above 0 and at most 1"),
        ({"pos_encoding": "rotary", "rope_scaling": {"type": "dynamic"}}, "a rope_type of linear, yarn, llama3"),
        ({"rope_scaling": {"rope_type": []}}, "rope_scaling is {'rope_type': []}, expected a rope_type of linear"),
        ({"rope_scaling": [1]}, "rope_scaling is [1], expected a rope_type of linear"),
        ({"norm_type": []}, "norm_type is [], expected layernorm"),
        ({"sliding_window": {}}, "sliding_window is {}, expected a whole number"),
        ({"pos_encoding": "rotary", "rope_scaling": {"type": "yarn"}}, "yarn has no factor, original_max_position"),
        (
            {"pos_encoding": "rotary", "rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}},
            "rope_scaling linear has beta, which this model does not compute",
        ),
        (
            {"pos_encoding": "rotary", "rope_scaling": {"type": "linear", "factor": -2}},
            "rope_scaling has factor -2, expected a number above 0",
        ),
        (
            {"pos_encoding": "rotary", "rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "a low_freq_factor that is not below high_freq_factor",
        ),
        (
            {"pos_encoding": "rotary", "rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}},
            "yarn has no original_max_position_embeddings",
        ),
        ({"shared_attention_norm": True}, "but parallel_residual is false, expected true"),
        ({"sliding_window": [3, None]}, "sliding_window has 2 layers, but n_layer is 6"),
        ({"sliding_window": 0}, "sliding_window is 0, expected a whole number of at least 1, or a list"),
        ({"mlp_type": "reglu"}, "mlp_type is 'reglu', expected gelu, gelu_tanh, relu, relu_squared, swiglu, geglu"),
        ({"logit_cap": 0}, "logit_cap is 0, expected a number above 0"),
        ({"qk_norm": "both"}, "qk_norm is 'both', expected head, width"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(fields, said):
    with pytest.raises(CheckpointMismatch) as caught:
        GPTConfig(**fields)
    assert str(caught.value).startswith("config: ") and said in str(caught.value)


def test_an_activation_in_both_fields_of_a_file_must_be_one():
    assert GPTConfig.from_dict({"mlp_type": "relu"}).activation == "relu"
    assert GPTConfig.from_dict({"mlp_type": "relu_squared"}).to_dict()["mlp_type"] == "relu_squared"
    with pytest.raises(CheckpointMismatch, match="mlp_type is relu, and activation is gelu"):
        GPTConfig.from_dict({"mlp_type": "relu", "activation": "gelu"})


def test_inspection_names_the_parts_of_a_model_with_choices(tmp_path):
    save_steps(tmp_path, 1, config={**SMALL, **CHOICES, "head_bias": True})
    out = looked_at(tmp_path / "dante")[0]
    assert "2 layers, 2 heads in 1 group of 8, width 32, feed-forward 24\n" in out
    assert "context 16, positions rotary\nRMSNorm, q and k normed, gated SwiGLU, biases: qkv, mlp, head\n" in out
    assert "WARNING" not in out
    (tmp_path / "dante/config.json").write_text(json.dumps({"n_head": 2, "norm_type": [], "pos_encoding": {}}))
    assert "norm_type:[]" in looked_at(tmp_path / "dante")[0]
    with pytest.raises(CheckpointMismatch, match=r"norm_type is .*, expected layernorm"):
        GPT.load(tmp_path / "dante")


@BOTH
def test_conversions_keep_the_choices_or_refuse_by_name(tmp_path, choices):
    model, _ = save_steps(tmp_path, 1, config={**SMALL, **choices})
    source = str(tmp_path / "dante")
    assert convert([source, str(tmp_path / "copy"), "--to", "bundle"]) == 0
    copy = GPT.load(tmp_path / "copy")[0]
    ids = torch.arange(12)[None]
    assert copy.config.architecture() == model.config.architecture()
    assert torch.equal(copy(ids)[0], model.eval()(ids)[0])
    for target, said in {
        "hf": "no model of transformers computes it; the nearest is .*, expected",
        "nanogpt": " is .*, and nanoGPT computes .*: other logits",
    }.items():
        with pytest.raises(CheckpointMismatch, match=said):
            convert([source, str(tmp_path / target), "--to", target])


def test_a_state_dict_of_a_model_with_choices_needs_its_config(tmp_path):
    save_steps(tmp_path, 1, config={**SMALL, "mlp_type": "swiglu"})
    bare = tmp_path / "bare.pt"
    (tmp_path / "dante/model.pt").rename(bare)
    said = "blocks.0.fwd.gate.weight is none of GPT-2's shape, and no config.json tells what is computed with it"
    with pytest.raises(CheckpointMismatch, match=said):
        convert([str(bare), str(tmp_path / "out"), "--to", "bundle", "--activation", "gelu", "--n_head", "2"])
