"""The config beside a model, padding, and where in a file the weights lie."""

from __future__ import annotations

import pytest

from core.families.architecture import padding
from core.families.identify import identify, weights_key
from tests.makers.family_tables import build, named

SEED_CONFIG = {
    "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "ffn_hidden_size": 14336,
}  # fmt: skip


def test_megatron_export_whose_config_does_not_fit_is_shown_as_such():
    shapes = build(
        named("Megatron export with local names"),
        n_layer=32,
        n_embd=4096,
        q_size=4096,
        kv_size=4096,
        n_ffn=14336,
        fc1_rows=14336,
        vocab_size=128256,
        block_size=2048,
        off=["qk_norm", "head"],
    )
    found = identify(shapes, SEED_CONFIG)
    assert found.family == "megatron_gpt2"
    assert found.architecture.parameters == 6_440_951_808
    assert (found.architecture.gated, found.architecture.tied_head, found.architecture.positions) == (
        False,
        True,
        "learned",
    )
    assert (found.architecture.n_head, found.architecture.n_kv_head, found.architecture.head_size) == (32, 32, 128)
    assert found.conflicts == [
        "num_query_groups is 8 in the config, but the tensors have 32 of size 128 "
        "(decoder.layers.0.self_attention.linear_qkv.weight is (12288, 4096))",
        "max_position_embeddings is 8192 in the config, but the tensors have 2048 "
        "(embedding.position_embeddings.weight is (2048, 4096))",
    ]


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("n_layer", 4, "n_layer is 4 in the config, but the tensors have 3"),
        ("n_head", 5, "n_head is 5 in the config, but the tensors have 64 rows of queries, no multiple of it"),
        ("n_embd", 128, "n_embd is 128 in the config, but the tensors have 64 (transformer.wte.weight is (34, 64))"),
        ("vocab_size", 50304, "vocab_size is 50304 in the config, but the tensors have 34"),
        ("block_size", 1024, "block_size is 1024 in the config, but the tensors have 64"),
        ("bias", True, "bias is true in the config, but transformer.h.{i}.attn.c_attn.bias is not there"),
        ("n_layer", "three", "n_layer is 'three' in the config, not a number of at least 1"),
        pytest.param(
            "n_layer", 10**5000, "n_layer is too large to be shown in the config, not a number of at least 1", id="huge"
        ),
    ],
)
def test_every_contradiction_has_both_numbers(field, value, sentence):
    shapes = build(named("nanoGPT"), n_layer=3, n_embd=64, vocab_size=34)
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith(".bias")}
    args = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 64, "bias": False, "vocab_size": 34, "dropout": 0.0}
    assert identify(shapes, args).conflicts == []
    conflicts = identify(shapes, {**args, field: value}).conflicts
    assert len(conflicts) == 1 and conflicts[0].startswith(sentence)


def test_heads_that_contradict_themselves_are_left_open():
    shapes = build(named("Megatron export with local names"), off=["qk_norm"])
    found = identify(shapes, {"num_attention_heads": 8, "kv_channels": 32})
    assert found.architecture.n_head is None
    assert found.conflicts[0].startswith("num_attention_heads is 8 in the config, but the tensors have 16 of size 32 (")


def test_megatron_arguments_without_grouped_queries_name_no_groups():
    shapes = build(named("Megatron export with local names"), kv_size=512, off=["qk_norm"])
    config = {"num_attention_heads": 8, "kv_channels": 64, "num_query_groups": 1, "group_query_attention": False}
    found = identify(shapes, config)
    assert (found.architecture.n_kv_head, found.conflicts) == (8, [])


def test_tied_head_is_seen_in_the_storages_or_told_by_the_config():
    shapes = build(named("nanoGPT"))
    storages = {name: name for name in shapes}
    assert identify(shapes).architecture.tied_head is None
    assert identify(shapes, None, storages).architecture.tied_head is False
    together = identify(shapes, None, {**storages, "lm_head.weight": "transformer.wte.weight"}).architecture
    assert together.tied_head is True
    assert identify(shapes).architecture.parameters - together.parameters == 50304 * 256
    llama = build(named("Hugging Face Llama"))
    assert identify(llama, {"tie_word_embeddings": True}).architecture.tied_head is True
    found = identify(llama, {"tie_word_embeddings": True}, {name: name for name in llama})
    assert found.conflicts == ["tie_word_embeddings is true in the config, but lm_head.weight is a tensor of its own"]


def test_another_model_type_with_llamas_names_is_said():
    found = identify(build(named("Hugging Face Llama"), off=["qk_norm"]), {"model_type": "mistral"})
    assert found.conflicts == ["model_type is 'mistral' in the config, but names and shapes are of Hugging Face Llama"]


@pytest.mark.parametrize(
    ("rows", "vocabulary", "words"),
    [
        (50304, None, "probably the 50257 tokens of GPT-2 + 47 padding rows (a multiple of 128)"),
        (50257, None, ""),
        (51200, None, "probably the 50257 tokens of GPT-2 + 943 padding rows (a multiple of 1024)"),
        (32768, None, ""),
        (65, None, ""),
        (256, 250, "250 tokens + 6 padding rows (a multiple of 128)"),
        (320, 300, "300 tokens + 20 padding rows (a multiple of 64)"),
        (257, 250, ""),
        (None, 250, ""),
    ],
)
def test_padding_is_only_claimed_where_a_vocabulary_explains_it(rows, vocabulary, words):
    assert padding(rows, vocabulary) == words


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (["model.transformer.h.0.attn.c_attn.weight", "optimizer.state.0.exp_avg"], "model."),
        (["model._orig_mod.blocks.0.attn.qkv_w", "optimizers.0.state.0.exp_avg"], "model."),
        (["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], ""),
        (["model.model.layers.0.self_attn.q_proj.weight", "model.lm_head.weight"], "model."),
        (["state_dict.layers.0.self_attn.q_proj.weight"], "state_dict."),
        (["module.blocks.0.sa.qkv.weight"], ""),
        (
            ["checkpoint.model_state_dict.module.decoder.layers.0.self_attention.linear_qkv.weight"],
            "checkpoint.model_state_dict.",
        ),
        (["h.0.attn.c_attn.weight"], ""),
        (["ema.blocks.0.sa.qkv.weight", "model.blocks.0.sa.qkv.weight", "model.blocks.1.sa.qkv.weight"], "model."),
        (
            [f"{prefix}decoder.layers.self_attention.linear_qkv.weight" for prefix in ("optimizer.state.exp_avg.", "")],
            "",
        ),
        (["layers.0.fc.weight"], ""),
        ([], ""),
    ],
)
def test_key_of_the_weights_in_a_flat_list(names, key):
    assert weights_key(names) == key


@pytest.mark.parametrize(
    ("width", "conflicts"), [(256, []), (200, ["n_inner is 200 in the config, but the tensors have 256"])]
)
def test_a_feed_forward_of_four_times_the_width_is_held_against_the_config(width, conflicts):
    shapes = build(named("nanoGPT"), n_layer=2, n_embd=64, vocab_size=96, block_size=32)
    found = identify(shapes, {"n_inner": width, "n_head": 4})
    assert [conflict.split(" (")[0] for conflict in found.conflicts] == conflicts
