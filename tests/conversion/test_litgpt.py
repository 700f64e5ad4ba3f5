"""litgpt's checkpoints: to our GPT with litgpt's own logits, back bit for bit, and to transformers."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.containers.flat_yaml import dump_flat_yaml, parse_flat_yaml
from core.conversion.pairs.litgpt import OF_WINDOWS
from core.conversion.plan import Options
from core.conversion.planning import plan_conversion
from core.conversion.text import matrix
from core.errors import CheckpointMismatch
from tests.makers.conversions import converted, expected, hf_logits, our_logits, same, texts, worst
from tests.makers.litgpt_models import (
    CLASS,
    KINDS,
    LLAMA3,
    Reference,
    config_of,
    interleaved,
    state_of,
    write,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[3, 17, 44, 8, 8, 21, 0, 39, 12, 30, 5, 47], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
CLOSE = 5e-6  # of the range of logits: fp32 against float64
FIXTURES = ("gemma2", "phi", "qwen3")


def config_in(folder: Path) -> dict[str, Any]:
    path = folder / "model_config.yaml"
    return parse_flat_yaml(path.read_bytes(), str(path))


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "lit_model.pth", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_litgpts_logits_and_goes_back_bit_for_bit(tmp_path, kind):
    config = config_of(kind)
    state = state_of(config)
    source = write(tmp_path / "source", config, state)
    converted(source, tmp_path / "bundle", "bundle")
    theirs = Reference(state, config).logits(IDS)
    assert worst(our_logits(tmp_path / "bundle", IDS).double(), theirs) < CLOSE
    converted(tmp_path / "bundle", tmp_path / "back", "litgpt")
    again, made = weights_in(tmp_path / "back"), config_in(tmp_path / "back")
    assert same(again, state)
    assert torch.equal(Reference(again, made).logits(IDS), theirs)
    free = {"name", "vocab_size", "padding_multiple"}  # which decide no logit, but for Gemma in a name
    assert {**CLASS, **made}.items() >= {
        n: v for n, v in config.items() if n not in free | {"n_expert", "latent_attention"}
    }.items()


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_sizes_biases_and_tying(tmp_path_factory, kind, data):
    groups, share, size = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([4, 8, 12])),
    )
    config = config_of(
        kind,
        n_layer=data.draw(st.integers(1, 3)),
        n_query_groups=groups,
        n_head=groups * share,
        head_size=size,
        n_embd=data.draw(st.sampled_from([24, groups * share * size])),
        intermediate_size=data.draw(st.integers(1, 50)),
        lm_head_bias=data.draw(st.booleans()),
        attn_bias=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
        padded_vocab_size=data.draw(st.integers(48, 70)),
        sliding_window_indices=None,
    )
    state = state_of(config, data.draw(st.integers(0, 99)))
    if tied := data.draw(st.booleans()):
        state["lm_head.weight"] = state["transformer.wte.weight"]
    folder = tmp_path_factory.mktemp("any")
    converted(write(folder / "source", config, state), folder / "bundle", "bundle")
    assert worst(our_logits(folder / "bundle", IDS).double(), Reference(state, config).logits(IDS)) < 2 * CLOSE
    assert json.loads((folder / "bundle" / "config.json").read_text()).get("tied_head", False) is tied
    if config["norm_qk_type"] == "default" or config["n_head"] > 1:
        converted(folder / "bundle", folder / "back", "litgpt")
        assert same(weights_in(folder / "back"), state)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "phi", "pythia"])
@pytest.mark.parametrize("raw", [True, False])
def test_interleaved_rows_of_old_files_are_the_same_model(tmp_path, kind, raw):
    config = config_of(kind, n_layer=2, sliding_window_indices=None)
    state = state_of(config)
    old = write(tmp_path / "old", config, interleaved(state, config), raw=raw)
    facts = converted(old, tmp_path / "new", "litgpt")
    assert facts["program"] == "litgpt, with interleaved q, k and v"
    assert same(weights_in(tmp_path / "new"), state)


FLIPS: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"norm_eps": 0.5}),
    ("gemma2", {"rope_base": 100}),
    ("gemma2", {"rotary_percentage": 0.5}),
    ("gemma2", {"rope_condense_ratio": 3}),
    ("gemma2", {"rope_adjustments": LLAMA3}),
    ("gemma2", {"rope_adjustments": {"factor": 3.0}}),
    ("gemma2", {"rope_interleave": True}),
    ("gemma2", {"name": "Danube"}),
    ("gemma2", {"name": "", "hf_config": {"name": "Danube"}}),
    ("gemma2", {"scale_embeddings": False}),
    ("gemma2", {"attention_scores_scalar": None}),
    ("gemma2", {"attention_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"sliding_window_size": 2}),
    ("gemma2", {"sliding_window_indices": [0, 1, 1, 0]}),
    ("gemma2", {"sliding_window_indices": None}),
    ("gemma2", {"mlp_class_name": "LLaMAMLP"}),
    ("phi", {"gelu_approximate": "none"}),
    ("pythia", {"parallel_residual": False}),
]
"""Fields that change no tensor."""


@pytest.mark.parametrize(("kind", "changed"), FLIPS, ids=[f"{k} {n}" for k, c in FLIPS for n in [next(iter(c))]])
def test_each_field_that_decides_logits_is_read(tmp_path, kind, changed):
    config = config_of(kind, n_layer=2)
    state = state_of(config)
    before = Reference(state, config).logits(IDS)
    config |= changed
    theirs = Reference(state, config).logits(IDS)
    converted(write(tmp_path / "source", config, state), tmp_path / "bundle", "bundle", verify=False)
    assert worst(our_logits(tmp_path / "bundle", IDS).double(), theirs) < CLOSE
    assert worst(before, theirs) > 20 * CLOSE


@pytest.mark.parametrize(
    ("fields", "indices"),
    [
        ({"sliding_window_layer_placing": "interleaved"}, [1, 0, 1]),
        ({"sliding_window_layer_placing": 2}, [1, 0, 1]),
        ({"sliding_window_layer_placing": "all"}, [1, 1, 1]),
        (
            {"sliding_window_layer_placing": None, "sliding_window_layer_stride": 2, "sliding_window_offset": 1},
            [0, 1, 0],
        ),
    ],
)
def test_fields_of_old_windows_are_read(tmp_path, fields, indices):
    config = config_of("gemma2", **fields, sliding_window_size=3)
    del config["sliding_window_indices"]
    converted(write(tmp_path / "source", config, state_of(config)), tmp_path / "new", "bundle", verify=False)
    window = json.loads((tmp_path / "new" / "config.json").read_text())["sliding_window"]
    assert window == (3 if all(indices) else [3 if one else None for one in indices])


def test_a_config_without_newer_fields_has_the_defaults_of_the_class(tmp_path):
    config = config_of("pythia")
    old = {name: value for name, value in config.items() if value != CLASS.get(name, "")}
    state = state_of(config)
    facts = converted(write(tmp_path / "source", old, state), tmp_path / "bundle", "bundle")
    assert {
        "norm epsilon 1e-05 (litgpt, default of its Config)",
        "rope base 10000.0 (litgpt, default of its Config)",
    } <= {*texts(facts)}
    assert worst(our_logits(tmp_path / "bundle", IDS).double(), Reference(state, config).logits(IDS)) < CLOSE


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama2", {"n_expert": 8}, "n_expert is 8; our GPT computes 0"),
    (
        "llama2",
        {"latent_attention": {"kv_lora_rank": 4}},
        "latent_attention is {'kv_lora_rank': 4}; our GPT computes None",
    ),
    ("llama2", {"rope_local_base_freq": 1e4}, "rope_local_base_freq is 10000.0; our GPT computes None"),
    ("llama2", {"new_field": 1}, "new_field is 1, which is no known field of litgpt's Config"),
    (
        "llama2",
        {"norm_class_name": "BatchNorm"},
        "norm_class_name is 'BatchNorm'; our GPT computes LayerNorm and RMSNorm",
    ),
    (
        "llama2",
        {"mlp_class_name": "LLaMAMoE"},
        "mlp_class_name is 'LLaMAMoE' and gelu_approximate 'none'; our GPT computes",
    ),
    (
        "gemma",
        {"gelu_approximate": "none"},
        "mlp_class_name is 'GemmaMLP' and gelu_approximate 'none'; our GPT computes",
    ),
    (
        "llama2",
        {"rope_adjustments": {"factor": 2.0, "beta_fast": 32}},
        "rope_adjustments is {'beta_fast': 32, 'factor': 2.0}; our GPT",
    ),
    ("llama3", {"rope_condense_ratio": 2}, "with a rope_condense_ratio; our GPT computes factor, low_freq_factor, "),
    (
        "llama2",
        {"sliding_window_size": 4, "sliding_window_indices": [1]},
        "sliding_window_indices is [1], expected 0 or 1",
    ),
    ("olmo2", {"norm_qk_type": "default"}, "norm_qk_type is 'default', but norms of queries and keys are of a width"),
    ("olmo2", {"norm_qk": False}, "norm_qk is False, but norms of queries and keys are there"),
    ("pythia", {"name": "OLMo-1B-hf"}, "norm_class_name is LayerNorm in OLMo-1B-hf, which has no weights there"),
    (
        "llama2",
        {"norm_2": False},
        "norm_1, norm_2, post_attention_norm and post_mlp_norm are (True, False, False, False)",
    ),
    ("llama2", {"rope_base": "big"}, "rope_base is 'big', expected a number above 0"),
    ("llama2", {"shared_attention_norm": True}, "shared_attention_norm is true, but parallel_residual is false"),
    ("llama2", {"lm_head_bias": True}, "lm_head_bias is true in the config, but lm_head.bias is not there"),
]


@pytest.mark.parametrize(("kind", "changed", "said"), REFUSED, ids=[next(iter(changed)) for _, changed, _ in REFUSED])
def test_what_our_gpt_does_not_compute_is_refused_by_name(tmp_path, kind, changed, said):
    config = config_of(kind)
    source = write(tmp_path / "source", {**config, **changed}, state_of(config))
    with pytest.raises(CheckpointMismatch) as error:
        converted(source, tmp_path / "bundle", "bundle")
    assert said in str(error.value) and str(source) in str(error.value)
    assert not (tmp_path / "bundle").exists()


odd = st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from([0.5, 1e30, "x"]) | st.lists(st.integers(0, 1))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted({*CLASS, *OF_WINDOWS, "hf_config"})), odd, min_size=1, max_size=3))
def test_no_value_of_a_config_is_too_odd(tmp_path, changed):
    config = config_of("gemma2", n_layer=1)
    if not (tmp_path / "source").exists():
        write(tmp_path / "source", config, state_of(config))
    (tmp_path / "source" / "model_config.yaml").write_bytes(dump_flat_yaml({**config, **changed}))
    with ExitStack() as held, suppress(CheckpointMismatch):
        plan_conversion(tmp_path / "source", tmp_path / "bundle", "bundle", Options(), held)


def test_a_file_without_its_config_is_refused_with_its_name(tmp_path):
    source = write(tmp_path / "source", config_of("llama2"), state_of(config_of("llama2")))
    (source / "model_config.yaml").unlink()
    with pytest.raises(CheckpointMismatch, match=r"no model_config\.yaml beside it was read"):
        converted(source, tmp_path / "bundle", "bundle")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}},
            "rope_scaling is yarn",
        ),
        ({"sliding_window": [2, 3, None]}, "sliding_window has 2 different windows, expected one"),
        ({"mlp_type": "relu_squared"}, "mlp_type is relu_squared, expected swiglu or geglu or gelu or gelu_tanh"),
        ({"embedding_scale": 3.0}, "embedding_scale is 3.0, expected 1.0 or "),
        (
            {"norm_type": "rmsnorm_no_weight"},
            "norm_type is rmsnorm_no_weight, expected layernorm or rmsnorm or rmsnorm_1p",
        ),
    ],
    ids=["rope_scaling", "sliding_window", "mlp_type", "embedding_scale", "norm_type"],
)
def test_what_litgpt_does_not_compute_is_refused_on_the_way_out(tmp_path, changed, said):
    config = config_of("llama2")
    converted(write(tmp_path / "source", config, state_of(config)), tmp_path / "bundle", "bundle")
    beside = tmp_path / "bundle" / "config.json"
    beside.write_text(json.dumps({**json.loads(beside.read_text()), **changed}))
    if changed.keys() & {"mlp_type", "norm_type"}:  # which have other tensors
        state = torch.load(tmp_path / "bundle" / "model.pt", weights_only=True)
        lost = "gate" if "mlp_type" in changed else "ln"
        torch.save({n: t for n, t in state.items() if lost not in n}, tmp_path / "bundle" / "model.pt")
        (tmp_path / "bundle" / "training_state.json").unlink()
    with pytest.raises(CheckpointMismatch) as error:
        converted(tmp_path / "bundle", tmp_path / "back", "litgpt")
    assert said in str(error.value) and "litgpt computes other logits. --to bundle keeps it." in str(error.value)


def test_moments_of_a_run_go_along_with_the_rows_of_their_weights(tmp_path):
    config = config_of("qwen2", n_layer=1)
    state = interleaved(state_of(config), config)
    moments = {
        k: {"step": torch.tensor(3.0), "exp_avg": 2 * t, "exp_avg_sq": t * t} for k, t in enumerate(state.values())
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": list(range(len(state)))}
    source = write(tmp_path / "source", config, state)
    run = {"model": state, "optimizer": {"state": moments, "param_groups": [group]}, "step_count": 3}
    torch.save(run, source / "lit_model.pth")
    converted(source, tmp_path / "bundle", "bundle")
    weights = torch.load(tmp_path / "bundle" / "model.pt", weights_only=True)
    saved = torch.load(tmp_path / "bundle" / "optimizer.pt", weights_only=True)
    (names,) = (group["param_names"] for group in saved["param_groups"])
    assert {*names} == weights.keys()
    assert all(torch.equal(saved["state"][k]["exp_avg"], 2 * weights[name]) for k, name in enumerate(names))
    assert json.loads((tmp_path / "bundle" / "training_state.json").read_text())["step"] == 3


def test_a_tied_head_is_two_names_of_one_storage(tmp_path):
    config = config_of("gemma")
    state = state_of(config)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    converted(write(tmp_path / "source", config, state), tmp_path / "bundle", "bundle")
    assert json.loads((tmp_path / "bundle" / "config.json").read_text())["tied_head"] is True
    converted(tmp_path / "bundle", tmp_path / "back", "litgpt")
    again = weights_in(tmp_path / "back")
    assert same(again, state)
    assert again["lm_head.weight"].data_ptr() == again["transformer.wte.weight"].data_ptr()


def test_tokenizer_files_go_along_and_padding_can_be_cropped(tmp_path):
    config = config_of("llama2", n_layer=1)
    source = write(tmp_path / "source", config, state_of(config))
    vocab = {f"w{i}": i for i in range(45)}
    definition = {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}, "added_tokens": []}
    (source / "tokenizer.json").write_text(json.dumps(definition))
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    converted(source, tmp_path / "bundle", "bundle", vocab_size=45)
    assert json.loads((tmp_path / "bundle" / "tokenizer.json").read_text())["definition"] == definition
    converted(tmp_path / "bundle", tmp_path / "back", "litgpt")
    assert json.loads((tmp_path / "back" / "tokenizer.json").read_text()) == definition
    assert weights_in(tmp_path / "back")["lm_head.weight"].shape == (45, 32)
    converted(source, tmp_path / "cropped", "litgpt", vocab_size=46)
    assert [config_in(tmp_path / "cropped")[name] for name in ("vocab_size", "padded_vocab_size")] == [45, 46]
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "cropped" / name).read_bytes() == (source / name).read_bytes()


def test_what_litgpt_can_become_is_what_its_kinds_compute():
    formats = matrix()
    for family in ("litgpt", "litgpt_neox", "litgpt_olmo2", "litgpt_interleaved"):
        assert "nanogpt" not in formats[family] and {"bundle", "hf", "litgpt"} <= {*formats[family]}
    assert "megatron" in formats["litgpt"] and "megatron" not in [*formats["litgpt_neox"], *formats["litgpt_olmo2"]]
    assert "litgpt" not in formats["nanogpt"] and "litgpt" not in formats["hf_gpt2"]
    assert all("litgpt" in formats[f"hf_{name}"] for name in ("llama", "qwen3", "phi", "gpt_neox", "olmo2", "gemma2"))


@pytest.mark.parametrize("name", FIXTURES)
def test_litgpts_own_files_have_its_logits_and_come_back_as_they_are(shared, tmp_path, name):
    fixture = shared / "eras" / f"litgpt_{name}"
    (tmp_path / "source").mkdir()
    for file in ("lit_model.pth", "model_config.yaml"):
        shutil.copy(fixture / file, tmp_path / "source")
    converted(tmp_path / "source", tmp_path / "bundle", "bundle")
    ids, logits = expected(fixture)
    assert worst(our_logits(tmp_path / "bundle", ids), logits) < 1e-5
    converted(tmp_path / "bundle", tmp_path / "back", "litgpt")
    assert same(weights_in(tmp_path / "back"), weights_in(tmp_path / "source")["model"])
    theirs, made = ({**CLASS, **config_in(tmp_path / folder)} for folder in ("source", "back"))
    assert {key: made[key] for key in CLASS.keys() - {"name"}} == {key: theirs[key] for key in CLASS.keys() - {"name"}}


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi": "PhiForCausalLM",
    "pythia": "GPTNeoXForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
WAYS_OUT = [kind for kind in KINDS if kind != "llama_of_pairs"]  # which no model of transformers computes


@pytest.mark.full
@pytest.mark.parametrize("kind", WAYS_OUT)
def test_each_kind_becomes_the_model_of_transformers_that_it_is(tmp_path, kind):
    pytest.importorskip("transformers")
    config = config_of(kind)
    state = state_of(config)
    converted(write(tmp_path / "source", config, state), tmp_path / "hf", "hf")
    made = json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"]
    assert made == [next(name for start, name in reversed(ARCHITECTURES.items()) if kind.startswith(start))]
    assert worst(hf_logits(tmp_path / "hf", IDS).double(), Reference(state, config).logits(IDS)) < 1e-5
    converted(tmp_path / "hf", tmp_path / "back", "litgpt")
    assert same(weights_in(tmp_path / "back"), state)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_litgpt_itself_loads_what_is_written(tmp_path, kind):
    model = pytest.importorskip("litgpt.model", reason="litgpt is not installed: it needs another huggingface_hub")
    from litgpt.config import Config

    config = config_of(kind)
    state = state_of(config)
    source = write(tmp_path / "source", config, state)
    converted(source, tmp_path / "bundle", "bundle")
    converted(tmp_path / "bundle", tmp_path / "back", "litgpt")
    logits = []
    for folder in (source, tmp_path / "back"):
        gpt = model.GPT(Config.from_file(folder / "model_config.yaml"))
        gpt.load_state_dict(weights_in(folder))
        with torch.no_grad():
            logits.append(gpt(IDS))
    assert torch.equal(*logits)
    assert worst(our_logits(tmp_path / "bundle", IDS), logits[0]) < CLOSE
