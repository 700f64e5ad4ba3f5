"""Programs of which there is no fixture, and what tells one from another."""

from __future__ import annotations

import math
import re

import pytest
import torch

from core.config.gpt import GPTConfig
from core.families import gpt, hf_gpt2
from core.families.identify import FAMILIES, identify
from tests.makers.family_tables import build, named

CONFIGS = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 8},
}
SIDES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 8}


@pytest.mark.full
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_transformers_builds_is_recognised_with_its_number_of_parameters(kind):
    import transformers

    sides = {} if kind == "gpt2" else {**SIDES, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=320, eos_token_id=1, bos_token_id=1, **sides, **CONFIGS[kind]
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    state = model.state_dict(keep_vars=True)
    storages = {name: str(id(tensor)) for name, tensor in state.items()}
    found = identify({name: tuple(tensor.shape) for name, tensor in state.items()}, config.to_dict(), storages)
    assert (found.family, found.missing, found.unplaced, found.conflicts) == (f"hf_{kind}", [], [], [])
    assert (found.architecture.n_layer, found.architecture.n_head) == (3, 8)
    assert found.architecture.parameters == sum(tensor.numel() for tensor in model.parameters())
    assert found.architecture.tied_head is config.tie_word_embeddings


def test_our_own_model_is_recognised():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50304, bias=True)
    found = identify(gpt.shapes(config), config.to_dict())
    architecture = found.architecture
    assert (found.family, found.program, found.conflicts) == ("fused", "our GPT", [])
    assert (architecture.n_layer, architecture.n_head, architecture.head_size) == (2, 2, 16)
    assert architecture.padding == "probably the 50257 tokens of GPT-2 + 47 padding rows (a multiple of 128)"
    assert architecture.parameters == sum(math.prod(shape) for shape in gpt.shapes(config).values())


def test_heads_of_a_fused_model_are_not_guessed():
    found = identify(gpt.shapes(GPTConfig(n_layer=2, n_head=2, n_embd=32)))
    assert (found.architecture.n_head, found.architecture.head_size, found.architecture.n_layer) == (None, None, 2)


@pytest.mark.parametrize("feed_forward", ["ffwd", "fwd"])
def test_lecture_with_either_name_of_the_feed_forward_part(feed_forward):
    family = next(
        f for f in FAMILIES if f"blocks.{{i}}.{feed_forward}.net.0.weight" in f.tensors and f.name == "lecture"
    )
    found = identify(build(family, head_size=64, off=["qkv_bias"]))
    assert (found.family, found.missing, found.unplaced, found.conflicts) == ("lecture", [], [], [])
    assert (found.architecture.n_layer, found.architecture.n_head, found.architecture.head_size) == (9, 4, 64)


def test_qwen3_shows_its_head_size_in_the_norm_of_q_and_k():
    found = identify(build(named("Hugging Face Llama"), off=["qkv_bias", "proj_bias", "mlp_bias", "head"]))
    architecture = found.architecture
    assert (found.family, found.program) == ("hf_qwen3", "Hugging Face Qwen3")
    assert (architecture.n_head, architecture.n_kv_head, architecture.head_size) == (8, 2, 64)
    assert (architecture.qk_norm, architecture.tied_head, architecture.from_config) == (True, True, ())


def test_llama_with_biases_everywhere_is_no_qwen2():
    assert identify(build(named("Hugging Face Llama"), off=["qk_norm"])).family == "hf_llama"


def test_old_llama_files_show_the_head_size_in_the_rotary_frequencies():
    shapes = build(named("Hugging Face Llama"), off=["qkv_bias", "proj_bias", "mlp_bias", "qk_norm"])
    shapes |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (32,) for i in range(9)}
    found = identify(shapes)
    assert (found.family, found.architecture.n_head, found.architecture.n_kv_head) == ("hf_llama", 8, 2)
    assert found.architecture.notes[-1].startswith("9 buffers (288 numbers) are not counted")


@pytest.mark.parametrize(
    "program", ["Megatron torch_dist, local names", "Megatron torch_dist, Transformer Engine names"]
)
def test_stacked_megatron_has_its_layers_in_the_first_side(program):
    shapes = build(
        named(program), n_layer=5, fc1_rows=1408, off=["positions", "qkv_bias", "proj_bias", "mlp_bias", "norm_bias"]
    )
    assert shapes["decoder.layers.mlp.linear_fc1.weight"] == (5, 1408, 256)
    found = identify(shapes)
    assert (found.family, found.program) == ("megatron_qwen3", f"{program}, Qwen3 style")
    assert (found.architecture.n_layer, found.architecture.n_head, found.architecture.n_kv_head) == (5, 8, 2)
    assert (found.architecture.gated, found.missing, found.conflicts) == (True, [], [])


def test_modded_of_2025_02_is_told_from_2025_06():
    found = identify(
        build(named("modded-nanogpt train_gpt.py, 2025-02"), n_layer=12, vocab_size=50257, head_rows=50304)
    )
    assert (found.family, found.program) == ("modded_small_2025_02", "modded-nanogpt train_gpt.py, 2025-02")
    assert (found.architecture.n_layer, found.architecture.n_head, found.architecture.head_rows) == (12, 4, 50304)
    assert (found.missing, found.conflicts, found.architecture.padding) == ([], [], "")


def test_later_modded_nanogpt_is_named_and_unknown():
    found = identify({"embed.weight": (50304, 768), "qk_bank": (20, 768, 768), "mlp_bank": (24, 3072, 768)})
    assert (found.family, found.architecture) == ("unknown", None)
    assert found.reason == "qk_bank is of modded-nanogpt after 2025-06, whose versions are another model each"


def nanochat_shapes(n_layer=4):
    shapes = {"transformer.wte.weight": (65536, 256), "lm_head.weight": (65536, 256)}
    for i in range(n_layer):
        block = f"transformer.h.{i}"
        shapes |= {
            f"{block}.attn.c_q.weight": (256, 256),
            f"{block}.attn.c_k.weight": (128, 256),
            f"{block}.attn.c_v.weight": (128, 256),
            f"{block}.attn.c_proj.weight": (256, 256),
            f"{block}.mlp.c_fc.weight": (1024, 256),
            f"{block}.mlp.c_proj.weight": (256, 1024),
        }
        if i % 2 == (n_layer - 1) % 2:
            shapes |= {f"{block}.attn.ve_gate.weight": (1, 32), f"value_embeds.{i}.weight": (65536, 128)}
    shapes |= {"resid_lambdas": (n_layer,), "x0_lambdas": (n_layer,), "smear_gate.weight": (1, 24)}
    return shapes | {"smear_lambda": (1,), "backout_lambda": (1,)}


def test_nanochat_shows_its_groups_in_the_gate_of_the_value_embeddings():
    found = identify({f"_orig_mod.{name}": shape for name, shape in nanochat_shapes().items()})
    architecture = found.architecture
    assert (found.family, found.prefix, found.missing, found.conflicts) == ("nanochat", "_orig_mod.", [], [])
    assert (architecture.n_layer, architecture.n_head, architecture.n_kv_head, architecture.head_size) == (4, 2, 1, 128)
    assert architecture.parameters_without_embeddings == architecture.parameters - 65536 * (256 + 2 * 128)


def test_first_nanochat_has_no_lambdas_and_is_whole():
    shapes = {name: shape for name, shape in nanochat_shapes().items() if re.match("transformer|lm_head", name)}
    shapes = {name: shape for name, shape in shapes.items() if "ve_gate" not in name}
    config = {"sequence_len": 2048, "vocab_size": 65536, "n_layer": 4, "n_head": 2, "n_kv_head": 1, "n_embd": 256}
    found = identify(shapes, config)
    assert (found.family, found.missing, found.conflicts) == ("nanochat", [], [])
    assert (found.architecture.n_head, found.architecture.n_kv_head, found.architecture.block_size) == (2, 1, 2048)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name.startswith("litgpt")], ids=lambda f: f.name)
def test_litgpt_gated_or_not_new_or_old(family):
    off = [name for name in family.switches if name.endswith("bias")]
    shapes = build(family, off=[*off, "norm_after_attention", "norm_after_mlp"])
    config = {"n_layer": 9, "n_head": 8, "n_query_groups": 2, "head_size": 64, "vocab_size": 50254, "block_size": 128}
    found = identify(shapes, {**config, "padded_vocab_size": 50304, "intermediate_size": 704, "n_embd": 256})
    assert (found.family, found.program, found.missing, found.conflicts) == (family.name, family.program, [], [])
    assert (found.architecture.n_head, found.architecture.n_kv_head, found.architecture.gated) == (
        8,
        2,
        bool(family.gated),
    )
    assert (found.architecture.norm, found.architecture.block_size) == ("RMSNorm", 128)


def test_gpt2_without_its_first_word_and_with_old_buffers():
    shapes = {name.removeprefix("transformer."): shape for name, shape in build(named("Hugging Face GPT-2")).items()}
    shapes |= {f"h.{i}.attn.bias": (1, 1, 64, 64) for i in range(9)} | {f"h.{i}.attn.masked_bias": () for i in range(9)}
    del shapes["h.3.ln_1.bias"]
    found = identify(shapes)
    assert (found.family, found.prefix, found.missing) == ("hf_gpt2", "", ["h.3.ln_1.bias"])
    assert (found.architecture.n_layer, found.unplaced, len(found.buffers)) == (9, [], 18)


def test_conv1d_tells_gpt2_from_nanogpt_of_the_same_names():
    theirs = build(named("Hugging Face GPT-2"), n_ffn=1024)
    assert identify(theirs).family == "hf_gpt2"
    ours = {n: s[::-1] if re.sub(r"\d+", "{i}", n) in hf_gpt2.TRANSPOSED else s for n, s in theirs.items()}
    assert identify(ours).family == "nanogpt"


def test_old_nanogpt_masks_are_buffers_that_show_the_context():
    shapes = build(named("nanoGPT")) | {f"transformer.h.{i}.attn.bias": (1, 1, 64, 64) for i in range(9)}
    del shapes["transformer.wpe.weight"]
    found = identify(shapes)
    assert (found.family, found.architecture.block_size, found.missing) == ("nanogpt", 64, ["transformer.wpe.weight"])
