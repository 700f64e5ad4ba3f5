"""Decoders of transformers as ours and back: their writers' logits, every bit, every setting, and what is refused."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config.gpt import GPTConfig
from core.conversion.pairs.decoder_settings import DECODERS, Unfit
from core.conversion.pairs.decoders import hf_family, unfit
from core.errors import CheckpointMismatch
from core.model import GPT
from tests.makers.conversions import converted, expected, our_logits, same, tensors_of, worst
from tests.makers.hf_decoders import PEERS
from tests.makers.megatron_exports import LLAMA, QWEN, export_of, refused

pytestmark = pytest.mark.usefixtures("one_thread")

WRITTEN = {
    "hf_llama3_ropescaling": {},
    "hf_mistral_window": {},
    "hf_olmo2": {},
    "hf_qwen3_headdim": {"sliding_window", "max_window_layers"},  # of a model that has no windows
    "hf_smollm2_tied": {},
}
"""Folders of transformers, and what their config has otherwise than ours: settings without an effect."""

ABOUT_FILES = {
    "transformers_version",
    "torch_dtype",
    "initializer_range",
    "pretraining_tp",
    "rope_theta",
    "rope_scaling",
}
ABOUT_FILES |= {"dtype", "head_dim"}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_of_transformers_becomes_ours_with_its_logits_and_returns_bit_for_bit(shared, tmp_path, name):
    eras = shared / "eras"
    converted(eras / name, tmp_path / "ours", "bundle")
    ids, logits = expected(eras / name)
    assert worst(our_logits(tmp_path / "ours", ids), logits) < 1e-5
    converted(tmp_path / "ours", tmp_path / "back", "hf")
    assert tensors_of(tmp_path / "back") == tensors_of(eras / name)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (eras / name, tmp_path / "back"))
    assert {key for key in before if after.get(key) != before[key]} <= ABOUT_FILES | set(WRITTEN[name])


@pytest.mark.parametrize(("name", "theta"), [(LLAMA, 500000.0), (QWEN, 1000000.0)])
def test_an_export_of_megatron_becomes_ours_with_its_logits(fixtures, tmp_path, name, theta):
    more = {"max_position_embeddings": 64}
    converted(export_of(fixtures, name), tmp_path / "ours", "bundle", choices={"rope_theta": theta}, more=more)
    ids, logits = expected(fixtures / name)
    with torch.no_grad():
        found = GPT.load(tmp_path / "ours", load_dtype="fp32")[0].eval()(ids)[0]
    assert worst(found, logits) < 1e-5
    converted(tmp_path / "ours", tmp_path / "back.pt", "megatron")
    model = {k: v for k, v in tensors_of(export_of(fixtures, name)).items() if "_extra_state" not in k}
    assert tensors_of(tmp_path / "back.pt").items() >= model.items()


SCALINGS: list[dict[str, Any] | None] = [
    None,
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
]
WINDOWS = {"hf_mistral": [4, None], "hf_qwen2": [None, 4, [4, None]], "hf_qwen3": [None, [None, 4]]}
WINDOWS["hf_gemma2"] = [None, 4, [4, None], [None, 4]]
ACTIVATIONS = {"hf_phi": ["gelu", "gelu_tanh", "relu"], "hf_gpt_neox": ["gelu", "gelu_tanh", "relu"]}
BIASES: dict[str, list[tuple[bool, bool, bool]]] = {
    "hf_llama": [(False, False, False), (True, True, False), (False, False, True)],
    "hf_mistral": [(False, False, False)],
    "hf_qwen2": [(True, False, False)],
    "hf_phi": [(True, True, True)],
    "hf_gpt_neox": [(True, True, True), (False, False, True)],
}
EITHER = [(False, False, False), (True, True, False)]


@st.composite
def configs(draw: st.DrawFn, family: str) -> GPTConfig:
    """Any config of a family: heads, groups, widths, biases, tying, scaling, windows, caps, activations."""
    groups, share, size = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3])), draw(st.sampled_from([4, 8]))
    own = any(setting.fields == ("head_size",) for setting in DECODERS[family].settings)
    groups, share = (groups * share, 1) if family == "hf_gpt_neox" else (groups, share)
    uneven = [] if family in ("hf_llama", "hf_gemma2") else [16]
    width = draw(st.sampled_from([12, *uneven])) if own else groups * share * size
    bias, proj, mlp = draw(st.sampled_from(BIASES.get(family, EITHER)))
    fields = {
        "vocab_size": 16,
        "n_layer": 2,
        "block_size": 32,
        "n_embd": width,
        "n_head": groups * share,
        "n_kv_head": groups,
        "head_size": size,
        "n_ffn": draw(st.sampled_from([8, 20])),
        "bias": bias,
        "proj_bias": proj,
        "mlp_bias": mlp,
        "head_bias": family == "hf_phi",
        "dropout": 0.0,
        "tied_head": family != "hf_phi" and draw(st.booleans()),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-3])),
        "rope_theta": draw(st.sampled_from([10000.0, 500.0])),
        "rope_scaling": draw(st.sampled_from(SCALINGS)),
        "sliding_window": draw(st.sampled_from(WINDOWS.get(family, [None]))),
        **DECODERS[family].always,
    }
    if family in ACTIVATIONS:
        fields |= {"activation": draw(st.sampled_from(ACTIVATIONS[family]))}
        fields |= {"rotary_percent": draw(st.sampled_from([0.5, 1.0]))}
    else:
        fields |= {"mlp_type": draw(st.sampled_from(["geglu"] if "gemma" in family else ["swiglu", "geglu"]))}
    if "gemma" in family:
        fields |= {"embedding_scale": width**0.5}
    if family == "hf_gemma2":
        fields |= {name: draw(st.sampled_from([None, 3.0])) for name in ("logit_cap", "attention_cap")}
        fields |= {"attention_scale": draw(st.sampled_from(["head_size", 12**-0.5]))}
    if family == "hf_gpt_neox":
        fields |= {"parallel_residual": draw(st.booleans())}
    return GPTConfig(**fields)


def saved(config: GPTConfig, folder: Path) -> GPT:
    """A model with values far from neutral everywhere, saved as a bundle."""
    torch.manual_seed(3)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_checkpoint_bundle(folder, 1)
    return model.eval()


@pytest.mark.parametrize("family", DECODERS)
@settings(max_examples=3, deadline=None)
@given(st.data())
def test_ours_to_transformers_and_back_is_the_same_model(family, data):
    config = data.draw(configs(family))
    assert unfit(config, DECODERS[family]) == []
    with tempfile.TemporaryDirectory() as name:
        model = saved(config, Path(name) / "ours")
        converted(Path(name) / "ours", Path(name) / "hf", "hf")
        written = json.loads((Path(name) / "hf/config.json").read_text())
        assert f"hf_{written['model_type']}" == hf_family(config.to_dict())
        converted(Path(name) / "hf", Path(name) / "back", "bundle")
        back, *_ = GPT.load(Path(name) / "back")
        assert back.config.architecture() == config.architecture()
        assert same(back.state_dict(), model.state_dict())


@pytest.mark.full
@pytest.mark.parametrize("family", DECODERS)
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_transformers_computes_what_it_is_given(family, data):
    transformers = pytest.importorskip("transformers")
    config = data.draw(configs(family))
    ids = torch.randint(0, 16, (2, 14), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        model = saved(config, Path(name) / "ours")
        converted(Path(name) / "ours", Path(name) / "hf", "hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(name) / "hf", attn_implementation="eager")
        logits = theirs.eval()(ids).logits
        assert (model(ids)[0] - logits).abs().max() <= 1e-5 * logits.abs().max()


@pytest.mark.full
@pytest.mark.parametrize("name", PEERS)
def test_a_model_that_transformers_saved_comes_in_with_its_logits_and_leaves_bit_for_bit(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    theirs, _ = PEERS[name].make()
    theirs.save_pretrained(tmp_path / "theirs")
    converted(tmp_path / "theirs", tmp_path / "ours", "bundle")
    converted(tmp_path / "ours", tmp_path / "back", "hf")
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "theirs")
    ids = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    with torch.no_grad():
        logits = theirs(ids).logits
        assert torch.equal(back(ids).logits, logits)
    assert worst(our_logits(tmp_path / "ours", ids), logits) < 1e-5


BASE = {
    "vocab_size": 16,
    "n_layer": 2,
    "block_size": 32,
    "n_embd": 16,
    "n_head": 2,
    "head_bias": False,
    "bias": False,
    "mlp_bias": False,
}
LLAMAS = {**BASE, "pos_encoding": "rotary", "norm_type": "rmsnorm", "mlp_type": "swiglu"}
FITS_NONE = [
    ({"rotary_layout": "pairs"}, "LlamaForCausalLM: rotary_layout is pairs, expected halves"),
    ({"norm_type": "layernorm_1p"}, "norm_type is layernorm_1p, expected rmsnorm"),
    ({"norm_type": "rmsnorm_no_weight"}, "norm_type is rmsnorm_no_weight, expected rmsnorm"),
    ({"mlp_type": "relu_squared"}, "mlp_type is relu_squared, expected swiglu or geglu"),
    ({"rotary_percent": 0.5}, "rotary_percent is 0.5, and all of each head turns there"),
    ({"sliding_window": [4, 8]}, "sliding_window is [4, 8], expected none"),
    ({"bias": True, "proj_bias": False, "mlp_bias": True}, "proj_bias is false, expected true"),
    ({"proj_bias": True}, "proj_bias is true, expected false"),
    ({"logit_cap": 5.0}, "logit_cap is 5.0, expected none"),
    ({"attention_cap": 5.0}, "attention_cap is 5.0, expected none"),
    ({"attention_scale": 0.5}, "attention_scale is 0.5, expected head_size"),
    ({"embedding_scale": 2.0}, "embedding_scale is 2.0, expected 1.0"),
    ({"norm_placement": "after"}, "norm_placement is after, expected before"),
    ({"qk_norm": "width"}, "qk_norm is width, expected none"),
    ({"parallel_residual": True}, "parallel_residual is true, expected false"),
    ({"pos_encoding": "none"}, "pos_encoding is none, expected rotary"),
    ({"n_head": 3, "head_size": 4, "mlp_bias": True}, "n_embd is 16, expected a multiple of n_head, 3"),
]


@pytest.mark.parametrize(("fields", "said"), FITS_NONE, ids=[next(iter(fields)) for fields, _ in FITS_NONE])
def test_a_choice_that_no_model_of_transformers_computes_is_named(tmp_path, fields, said):
    saved(GPTConfig(**{**LLAMAS, **fields}), tmp_path / "ours")
    told = refused(tmp_path / "ours", tmp_path / "hf")
    assert told.startswith(f"{tmp_path / 'ours'}: no model of transformers computes it; the nearest is ")
    assert said in told
    assert told.endswith("--to bundle keeps it.")


def test_a_bias_of_the_head_is_no_llamas_unless_it_is_zero(tmp_path):
    model = saved(GPTConfig(**{**LLAMAS, "head_bias": True}), tmp_path / "ours")
    assert "lm_head.bias has values other than 0, and LlamaForCausalLM has no bias in its head" in refused(
        tmp_path / "ours", tmp_path / "hf"
    )
    with torch.no_grad():
        model.lm_head.bias.zero_()
    model.save_checkpoint_bundle(tmp_path / "zero", 1)
    converted(tmp_path / "zero", tmp_path / "hf", "hf")
    assert "lm_head.bias" not in tensors_of(tmp_path / "hf")


REFUSED = [
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True; our GPT computes False"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'; our GPT computes silu, swish, gelu_pytorch_tanh, gelu_new there"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "expected a rope_type of linear, yarn, llama3"),
    ({"rope_parameters": [1]}, "rope_parameters is [1], expected names and values"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; our GPT computes None"),
    ({"model_type": "cohere"}, "model_type is 'cohere' in the config, but names and shapes are of Hugging Face Llama"),
    ({"tie_word_embeddings": True}, "lm_head.weight is a tensor of its own"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=[next(iter(values)) for values, _ in REFUSED])
def test_a_setting_that_our_gpt_does_not_compute_is_refused(fixtures, tmp_path, values, said):
    source = shutil.copytree(fixtures / "hf_llama_gqa_untied", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | values))
    assert said in refused(source, tmp_path / "ours", "bundle")


@pytest.mark.parametrize("family", DECODERS)
def test_a_config_without_a_word_about_its_head_is_that_of_its_class(tmp_path, family):
    gates = {} if family in ACTIVATIONS else {"mlp_type": "geglu"}
    scale = {"embedding_scale": 4.0} if "gemma" in family else {}
    biases = dict(zip(("bias", "proj_bias", "mlp_bias"), BIASES.get(family, EITHER)[0], strict=True))
    fields = {**BASE, **DECODERS[family].always, **gates, **scale, **biases, "head_bias": family == "hf_phi"}
    saved(GPTConfig(**{**fields, "n_head": 2, "tied_head": False}), tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config.pop("tie_word_embeddings") is False
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "model_type": family.removeprefix("hf_")}))
    if "gemma" in family:  # which ties them: transformers would not use the head
        assert "has other values than model.embed_tokens.weight" in refused(tmp_path / "hf", tmp_path / "x", "bundle")
    else:
        converted(tmp_path / "hf", tmp_path / "back", "bundle")
        assert json.loads((tmp_path / "back/config.json").read_text())["tied_head"] is False


def test_weights_without_their_config_are_refused(fixtures, tmp_path):
    source = shutil.copytree(fixtures / "hf_llama_gqa_untied", tmp_path / "source")
    (source / "config.json").unlink()
    told = refused(source, tmp_path / "ours", "bundle", choices={"n_head": 8})
    assert "no config.json in it, and what it computes is not in the tensors. Put the model's own there." in told


def read(family: str, config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for setting in DECODERS[family].settings for name, value in setting.read(config).items()}


SPELLINGS = [
    ("hf_llama", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_theta", 500.0),
    ("hf_llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling", SCALINGS[1]),
    ("hf_llama", {}, "block_size", 2048),
    ("hf_llama", {}, "norm_eps", 1e-6),
    ("hf_llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_scaling", None),
    (
        "hf_qwen2",
        {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        "rope_scaling",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    ("hf_phi", {"rope_theta": 10000.0}, "rotary_percent", 0.5),
    ("hf_phi", {"partial_rotary_factor": 0.4}, "rotary_percent", 0.4),
    ("hf_gpt_neox", {"rotary_pct": 1.0}, "rotary_percent", 1.0),
    ("hf_gpt_neox", {}, "rotary_percent", 0.25),
    ("hf_gpt_neox", {"rotary_emb_base": 500}, "rope_theta", 500),
    ("hf_gpt_neox", {}, "parallel_residual", True),
    ("hf_mistral", {}, "sliding_window", 4096),
    ("hf_mistral", {"sliding_window": None}, "sliding_window", None),
    ("hf_qwen2", {"sliding_window": 8}, "sliding_window", None),
    (
        "hf_qwen2",
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 3},
        "sliding_window",
        [None, 8, 8],
    ),
    ("hf_gemma2", {"sliding_window": 8, "num_hidden_layers": 3, "hidden_size": 4}, "sliding_window", [8, None, 8]),
    ("hf_gemma2", {"num_hidden_layers": 1, "hidden_size": 4}, "attention_cap", 50.0),
    ("hf_gemma2", {"num_hidden_layers": 1, "hidden_size": 4}, "logit_cap", 30.0),
    ("hf_gemma2", {"num_hidden_layers": 1, "hidden_size": 4, "head_dim": 256}, "attention_scale", "head_size"),
    ("hf_gemma2", {"num_hidden_layers": 1, "hidden_size": 4, "head_dim": 16}, "attention_scale", 1 / 16),
    ("hf_gemma", {"hidden_size": 16, "hidden_activation": None, "hidden_act": "gelu_new"}, "mlp_type", "geglu"),
    ("hf_gemma", {"hidden_size": 16, "hidden_act": "gelu_pytorch_tanh"}, "embedding_scale", 4.0),
]


@pytest.mark.parametrize(("family", "config", "field", "value"), SPELLINGS)
def test_every_spelling_and_default_of_transformers_is_read(family, config, field, value):
    assert read(family, config)[field] == value


def test_a_gate_of_the_exact_gelu_is_another_model():
    with pytest.raises(Unfit, match="hidden_act is 'gelu'; our GPT computes silu, swish, gelu_pytorch_tanh, gelu_new"):
        read("hf_gemma", {"hidden_size": 16, "hidden_act": "gelu"})
    with pytest.raises(Unfit, match="layer_types is \\['chunked_attention'\\]"):
        read("hf_gemma2", {"hidden_size": 4, "num_hidden_layers": 1, "layer_types": ["chunked_attention"]})
    with pytest.raises(Unfit, match="query_pre_attn_scalar is 0, expected a number above 0"):
        read("hf_gemma2", {"hidden_size": 4, "num_hidden_layers": 1, "query_pre_attn_scalar": 0})


def test_what_begins_and_ends_a_text_is_kept_through_ours(fixtures, tmp_path):
    source = shutil.copytree(fixtures / "hf_llama_gqa_untied", tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"bos_token_id": 5, "eos_token_id": [6, 7]}
    (source / "config.json").write_text(json.dumps(config))
    converted(source, tmp_path / "ours", "bundle")
    converted(tmp_path / "ours", tmp_path / "hf", "hf")
    after = json.loads((tmp_path / "hf/config.json").read_text())
    assert (after["bos_token_id"], after["eos_token_id"]) == (5, [6, 7])


def test_a_config_that_is_none_of_ours_is_refused_before_anything_is_written(tmp_path):
    saved(GPTConfig(**LLAMAS), tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    (tmp_path / "ours/config.json").write_text(json.dumps(config | {"n_kv_head": 3}))
    with pytest.raises(CheckpointMismatch, match="n_head 2 is not divisible by n_kv_head 3"):
        converted(tmp_path / "ours", tmp_path / "hf", "hf")
