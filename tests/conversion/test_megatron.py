"""Megatron exports and iterations: Megatron's own logits in transformers, the same bytes there and back, refusals."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from core.model import GPT
from tests.makers.conversions import converted, tensors_of, texts, worst
from tests.makers.megatron_exports import (
    GPT2,
    LLAMA,
    QWEN,
    RUN,
    THETA,
    changed,
    export_of,
    exported,
    gpt2_export,
    hf_model,
    off_by,
    refused,
    write_export,
)
from tests.makers.megatron_iterations import write_iteration
from tests.makers.old_runs import copied

pytestmark = pytest.mark.usefixtures("one_thread")

FIXTURES = {
    LLAMA: (LLAMA, THETA),
    "megatron_llama_gqa_TEnames": (LLAMA, THETA),
    "megatron_llama_gqa_TEnames_oldTE_BytesIO": (LLAMA, THETA),
    QWEN: (QWEN, {"choices": {"rope_theta": 1e6}}),
    GPT2: (GPT2, {}),
}


@pytest.mark.full
@pytest.mark.parametrize("name", FIXTURES)
def test_transformers_computes_the_logits_of_megatron(fixtures, tmp_path, name):
    of, flags = FIXTURES[name]
    expected = load_file(fixtures / of / "expected.safetensors")
    facts = converted(export_of(fixtures, name), tmp_path / "hf", "hf", **flags)
    assert off_by(tmp_path / "hf", expected["input_ids"], expected["logits_fp32"]) < 2e-6
    eps = "1e-06 (Megatron, its default for Qwen)" if of == QWEN else "1e-05 (Megatron, its default)"
    assert f"norm epsilon {eps}" in texts(facts)
    states = [reason for name, reason in facts["dropped"].items() if name.endswith("_extra_state")]
    assert len(states) >= 9 and all(reason.startswith("what Transformer Engine keeps for FP8") for reason in states)


def test_names_of_transformer_engine_make_no_difference(fixtures, tmp_path):
    for k, name in enumerate(FIXTURES):
        if "llama" in name:
            converted(export_of(fixtures, name), tmp_path / str(k), "hf", **THETA)
            converted(export_of(fixtures, name), tmp_path / f"{k}.pt", "megatron")
    for k in (1, 2):
        assert tensors_of(tmp_path / str(k)) == tensors_of(tmp_path / "0")
        assert exported(tmp_path / f"{k}.pt")[1] == exported(tmp_path / "0.pt")[1]
        assert tensors_of(tmp_path / f"{k}.pt") == tensors_of(tmp_path / "0.pt")


@pytest.mark.parametrize("name", [LLAMA, QWEN, GPT2])
def test_there_and_back_gives_the_same_tensors(fixtures, tmp_path, name):
    given = {"norm_eps": 1e-4, **FIXTURES[name][1].get("choices", {})}
    converted(export_of(fixtures, name), tmp_path / "hf", "hf", choices=given)
    converted(tmp_path / "hf", tmp_path / "back", "megatron")
    state, config = exported(tmp_path / "back/exported_model.pt")
    before, said = exported(export_of(fixtures, name))
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in state)
    assert said.items() - {("vocab_size", 250)} <= config.items()
    again = converted(tmp_path / "back/exported_model.pt", tmp_path / "again", "hf")  # what the export says is taken
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (tmp_path / "hf/config.json").read_text()
    )
    assert "norm epsilon 0.0001 (from model_config)" in texts(again)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model."])
def test_prefixes_are_taken_off(fixtures, tmp_path, prefix):
    state, config = exported(export_of(fixtures, QWEN))
    source = write_export(tmp_path / "a.pt", {prefix + name: t for name, t in state.items()}, config)
    converted(source, tmp_path / "a", "hf", **THETA)
    converted(export_of(fixtures, QWEN), tmp_path / "b", "hf", **THETA)
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b")


def test_safetensors_and_pt_keep_the_names(fixtures, tmp_path):
    state = exported(export_of(fixtures, LLAMA))[0]
    converted(export_of(fixtures, LLAMA), tmp_path / "a.safetensors", "safetensors")
    converted(export_of(fixtures, LLAMA), tmp_path / "a.pt", "pt")
    for found in (load_file(tmp_path / "a.safetensors"), torch.load(tmp_path / "a.pt")):
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_layernorm_1p_adds_one_exactly(fixtures, tmp_path):
    state, config = exported(export_of(fixtures, LLAMA))
    norms = [name for name in state if "norm" in name]
    less = state | {name: (state[name].float() - 1).bfloat16() for name in norms}
    source = write_export(tmp_path / "1p.pt", less, config)
    facts = converted(source, tmp_path / "plain", "hf", **THETA)
    assert any("warning: 5 of 5 norm weights average below 0.5" in note for note in facts["notes"])
    facts = converted(source, tmp_path / "hf", "hf", more={"layernorm_1p": True}, **THETA)
    assert not any("warning" in note for note in facts["notes"])
    assert any("1 was added to 5 norm weights, which are float32 now" in note for note in facts["notes"])
    made = load_file(tmp_path / "hf/model.safetensors")
    for theirs, ours in (("decoder.final_layernorm", "model.norm"), ("decoder.layers.1.pre_mlp_layernorm", _POST)):
        assert torch.equal(made[f"{ours}.weight"], less[f"{theirs}.weight"].float() + 1)
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "float32"
    run = RUN[LLAMA] | {"apply_layernorm_1p": True}
    converted(write_iteration(tmp_path / "iter_0000001", less, **config, **run), tmp_path / "iter", "hf")
    assert tensors_of(tmp_path / "iter") == tensors_of(tmp_path / "hf")


_POST = "model.layers.1.post_attention_layernorm"


@pytest.mark.full
def test_transformers_computes_the_logits_of_norms_that_are_stored_less_one(fixtures, tmp_path):
    state, config = exported(export_of(fixtures, LLAMA))
    less = {name: tensor.float() - 1 if "norm" in name else tensor for name, tensor in state.items()}
    source = write_export(tmp_path / "exact.pt", less, config)
    converted(source, tmp_path / "exact", "hf", more={"layernorm_1p": True}, **THETA)
    expected = load_file(fixtures / LLAMA / "expected.safetensors")
    assert off_by(tmp_path / "exact", expected["input_ids"], expected["logits_fp32"]) < 2e-6


def test_padding_of_the_vocabulary_is_kept_or_cropped(fixtures, tmp_path):
    facts = converted(export_of(fixtures, LLAMA), tmp_path / "kept", "hf", **THETA)
    assert any("256 rows of the vocabulary: 250 tokens and 6 of padding, kept" in note for note in facts["notes"])
    converted(export_of(fixtures, LLAMA), tmp_path / "cropped", "hf", vocab_size=250, **THETA)
    made, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("cropped", "kept"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(made[name], whole[name][:250])
    assert json.loads((tmp_path / "cropped/config.json").read_text())["vocab_size"] == 250


@pytest.mark.full
def test_transformers_opens_a_cropped_vocabulary(fixtures, tmp_path):
    converted(export_of(fixtures, LLAMA), tmp_path / "cropped", "hf", vocab_size=250, **THETA)
    assert hf_model(tmp_path / "cropped").lm_head.weight.shape[0] == 250


@pytest.mark.full
def test_gpt2_style_becomes_a_bundle_of_ours_and_back(fixtures, tmp_path):
    source, model = gpt2_export(tmp_path / "export.pt")
    ids = torch.randint(96, (2, 32))
    with torch.no_grad():
        expected = model(ids).logits
    converted(source, tmp_path / "bundle", "bundle")
    with torch.no_grad():
        assert (GPT.load(tmp_path / "bundle")[0].eval()(ids)[0] - expected).abs().max() < 1e-5
    converted(tmp_path / "bundle", tmp_path / "back.pt", "megatron")
    assert tensors_of(tmp_path / "back.pt") == tensors_of(source)
    tanh = tmp_path / "tanh"
    converted(source, tanh, "hf", choices={"activation": "gelu_tanh"})
    assert json.loads((tanh / "config.json").read_text()) == GPT2_CONFIG


def test_gpt2_style_of_any_feed_forward_becomes_a_bundle_of_ours_with_its_logits_and_returns(fixtures, tmp_path):
    source = export_of(fixtures, GPT2)  # ffn_hidden_size 224 of a width of 64
    converted(source, tmp_path / "bundle", "bundle")
    assert json.loads((tmp_path / "bundle/config.json").read_text())["n_ffn"] == 224
    known = load_file(fixtures / GPT2 / "expected.safetensors")
    with torch.no_grad():
        logits = GPT.load(tmp_path / "bundle", load_dtype="fp32")[0].eval()(known["input_ids"].long())[0]
    assert worst(logits, known["logits_fp32"]) < 2e-6
    converted(tmp_path / "bundle", tmp_path / "back.pt", "megatron")
    model = {name: t for name, t in tensors_of(source).items() if "_extra_state" not in name}
    assert tensors_of(tmp_path / "back.pt") == model


GPT2_CONFIG = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 96, "n_positions": 32, "n_ctx": 32,
    "max_position_embeddings": 32, "n_embd": 32, "hidden_size": 32, "n_layer": 2, "num_hidden_layers": 2, "n_head": 4,
    "num_attention_heads": 4, "n_inner": 128, "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "use_cache": True,
    "activation_function": "gelu_new", "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
    "dtype": "float32", "torch_dtype": "float32",
}  # fmt: skip


def test_what_a_config_of_gpt2_leaves_out_is_what_transformers_takes_for_it(fixtures, tmp_path):
    source = copied(fixtures / "hf_gpt2", tmp_path / "source")
    path = source / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "layer_norm_epsilon"}))
    converted(source, tmp_path / "out.pt", "megatron")
    assert exported(tmp_path / "out.pt")[1]["norm_epsilon"] == 1e-5


def test_tensors_win_over_a_config_that_contradicts_them(fixtures, tmp_path):
    state, config = exported(export_of(fixtures, GPT2))
    told = config | {"ffn_hidden_size": 999, "num_query_groups": 2, "num_layers": 7}
    facts = converted(write_export(tmp_path / "a.pt", state, told), tmp_path / "a", "hf")
    said = [note for note in facts["notes"] if note.startswith("the tensors override the config: ")]
    assert sorted(note.split(": ")[1].split(" is ")[0] for note in said) == [
        "ffn_hidden_size",
        "num_layers",
        "num_query_groups",
    ]
    converted(export_of(fixtures, GPT2), tmp_path / "b", "hf")
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b")
    told = {name: value for name, value in config.items() if name != "kv_channels"} | {"num_attention_heads": 5}
    assert "no multiple of" in refused(write_export(tmp_path / "c.pt", state, told), tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            LLAMA,
            "no gate",
            "no known style: its norms have no biases, as Llama's, and its feed-forward part has no gate",
        ),
        (LLAMA, "odd gate", "expected 176 rows, or 352 where it is gated"),
        (LLAMA, "no layer 0", "layers 1 are there, 1 in between are not"),
        (LLAMA, "proj bias", "linear_proj has a bias and linear_qkv none: Llama has both or neither"),
        (LLAMA, "norm bias", "its norms have biases (LayerNorm) and its feed-forward part is gated"),
        (LLAMA, "positions", "it has a table of positions (position_embeddings), and Llama and Qwen have rotary ones."),
        (QWEN, "fc1 bias", "its feed-forward part has biases, and Qwen2ForCausalLM has none."),
        (GPT2, "qk norm", "it has a norm on q and k, and HF GPT-2 has none."),
        (GPT2, "no positions", "its norms have biases and it has no table of positions: neither Llama nor GPT-2."),
    ],
)
def test_what_transformers_has_no_model_for_is_refused(fixtures, tmp_path, name, change, said):
    state, config = exported(export_of(fixtures, name))
    assert said in refused(write_export(tmp_path / "a.pt", changed(state, change), config), tmp_path / "hf")


OTHERS = {
    "rotary_percent": 0.25, "use_rope_scaling": "yes", "rotary_seq_len_interpolation_factor": 4,
    "rotary_interleaved": True, "position_embedding_type": "none", "window_size": [128, 0], "softmax_scale": 0.5,
    "use_mup": True,
}  # fmt: skip


def test_settings_that_change_what_is_computed_are_refused(fixtures, tmp_path):
    state, config = exported(export_of(fixtures, LLAMA))
    target, source = tmp_path / "hf", export_of(fixtures, LLAMA)
    assert "rotary_percent is 0.5: only that part of a head is rotated" in refused(
        source, target, more={"rotary_percent": 0.5}, **THETA
    )
    for k, (name, value) in enumerate(OTHERS.items()):
        folder = write_iteration(tmp_path / f"iter_{k:07}", state, **config, **RUN[LLAMA], **{name: value})
        assert f"{name} is {value!r}" in refused(folder, target)
    bare = {name: value for name, value in config.items() if name != "max_position_embeddings"}
    short = write_export(tmp_path / "a.pt", state, bare)
    assert "Add --max_position_embeddings N." in refused(short, target, **THETA)
    converted(short, target, "hf", more={"max_position_embeddings": 99, "eos_token_id": 7}, **THETA)
    made = json.loads((target / "config.json").read_text())
    assert (made["max_position_embeddings"], made["eos_token_id"], made["bos_token_id"]) == (99, 7, None)
    said = refused(tmp_path / "hf", tmp_path / "x.pt", "megatron", choices={"rope_theta": 1.0})
    assert "--rope_theta is 1.0, but config.json has 500000.0. Leave it out." in said


@pytest.mark.parametrize(
    ("name", "flag", "value", "why"),
    [
        (GPT2, "rope_scaling_factor", 8.0, "its positions are a table"),
        (GPT2, "rotary_percent", 0.5, "its positions are a table"),
    ],
)
def test_a_flag_for_what_the_model_has_not_is_refused(fixtures, tmp_path, name, flag, value, why):
    said = refused(export_of(fixtures, name), tmp_path / "hf", more={flag: value})
    assert said.endswith(f"--{flag} has no effect: {why}. Leave it out.")


@pytest.mark.parametrize(("name", "flag", "value"), [(LLAMA, "activation", "gelu"), (GPT2, "rope_theta", 5e5)])
def test_a_choice_that_the_model_has_not_is_refused(fixtures, tmp_path, name, flag, value):
    said = refused(export_of(fixtures, name), tmp_path / "hf", choices={flag: value})
    assert said.endswith(f"--{flag} has no effect on a model of this family. Leave it out.")


def test_the_base_of_rotary_positions_is_asked_for_and_never_taken(fixtures, tmp_path):
    said = refused(export_of(fixtures, LLAMA), tmp_path / "hf")
    assert said == (
        f"{export_of(fixtures, LLAMA)}: nothing in the file shows its rope base, without which its logits are not "
        "known. Add --rope_theta 10000 (Megatron's default, Llama 2), 500000 (Llama 3) or 1000000 (Qwen)."
    )
    converted(export_of(fixtures, LLAMA), tmp_path / "x.pt", "megatron")  # an export again, which shows as much


def test_heads_that_no_config_says_are_asked_for(fixtures, tmp_path):
    for name, heads in ((LLAMA, 8), (GPT2, 4)):
        state = exported(export_of(fixtures, name))[0]
        bare = write_export(tmp_path / f"{heads}.pt", state, {})
        assert "Add --n_head 1, 2, 4, 8, 16, 32 or 64" in refused(bare, tmp_path / "x")
        more = {"max_position_embeddings": 64} if name == LLAMA else {}
        theta = FIXTURES[name][1].get("choices", {})
        converted(bare, tmp_path / f"hf{heads}", "hf", more=more, choices={"n_head": heads, **theta})
        converted(export_of(fixtures, name), tmp_path / f"direct{heads}", "hf", choices=theta)
        assert tensors_of(tmp_path / f"hf{heads}") == tensors_of(tmp_path / f"direct{heads}")
    converted(bare, tmp_path / "out.pt", "megatron", choices={"n_head": 4, "norm_eps": 1e-3})
    assert exported(tmp_path / "out.pt")[1].items() >= {("num_attention_heads", 4), ("norm_epsilon", 1e-3)}


@pytest.mark.parametrize("to", ["hf", "megatron", "safetensors", "pt"])
def test_classic_ranks_are_refused_and_a_missing_one_is_named(tmp_path, to):
    run = tmp_path / "iter_0000100"
    for rank in ("mp_rank_00", "mp_rank_02"):
        (run / rank).mkdir(parents=True)
        args = argparse.Namespace(num_layers=2, tensor_model_parallel_size=4)
        torch.save({"model": {"w": torch.zeros(2)}, "args": args}, run / rank / "model_optim_rng.pt")
    said = refused(run, tmp_path / "out", to)
    assert "no file says along which dimension its tensors were cut" in said
    assert "mp_rank_01, mp_rank_03 missing; there are mp_rank_00, mp_rank_02." in said


def test_the_script_prints_the_defaults_that_it_takes(fixtures, tmp_path, capsys):
    from convert_checkpoints import main

    words = [str(export_of(fixtures, LLAMA)), str(tmp_path / "hf"), "--to", "hf", "--rope_theta", "5e5"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "norm epsilon 1e-05 (Megatron, its default)\n" in out
    assert "rope base 500000.0 (from --rope_theta)\n" in out and re.search(
        "read back and compared with the source, bit for bit", out
    )
    assert json.loads((tmp_path / "hf/config.json").read_text())["rope_theta"] == 500000.0
