"""Tables between Megatron's and Hugging Face's names, applied in both directions by core/families/rules.py.

Megatron's names are those of its local layers; TRANSFORMER_ENGINE and `unstacked` lead to them from the others.
"""

from __future__ import annotations

from . import megatron
from .rules import RENAME, TRANSPOSE, Chain, Concat, Interleave, Inverse, Row, Stack, Table, layer

TRANSFORMER_ENGINE: Table = tuple((name, local, RENAME) for name, local in megatron.FUSED_NORMS.items())


def unstacked(n_layer: int) -> Table:
    """The table from tensors of all layers in one to those of each layer."""
    rows: list[Row] = []
    for name in dict.fromkeys((*megatron.LOCAL, *megatron.TRANSFORMER_ENGINE)):
        if "{i}" in name:
            layers = tuple(name.replace("{i}", str(i)) for i in range(n_layer))
            rows.append((name.replace("{i}.", ""), layers, UNSTACK))
    return tuple(rows)


INTERLEAVE, CONCAT = Interleave(), Concat(0)
UNSTACK = Inverse(Stack(0), "take out of the stack of layers")
QKV = Inverse(INTERLEAVE, f"split: {INTERLEAVE}")
GATE_UP = Inverse(CONCAT, f"split: {CONCAT}")
QKV_ROWS = Chain((QKV, Concat(0, ("q_size", "kv_size", "kv_size"))))
QKV_COLUMNS = Chain((*QKV_ROWS.rules, TRANSPOSE))


LLAMA: Table = (
    ("embedding.word_embeddings.weight", "model.embed_tokens.weight", RENAME),
    ("decoder.layers.{i}.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight", RENAME),
    *layer(
        "decoder.layers.{i}.self_attention.linear_qkv",
        tuple(f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
        QKV,
        QKV,
    ),
    ("decoder.layers.{i}.self_attention.q_layernorm.weight", "model.layers.{i}.self_attn.q_norm.weight", RENAME),
    ("decoder.layers.{i}.self_attention.k_layernorm.weight", "model.layers.{i}.self_attn.k_norm.weight", RENAME),
    *layer("decoder.layers.{i}.self_attention.linear_proj", "model.layers.{i}.self_attn.o_proj"),
    ("decoder.layers.{i}.pre_mlp_layernorm.weight", "model.layers.{i}.post_attention_layernorm.weight", RENAME),
    *layer(
        "decoder.layers.{i}.mlp.linear_fc1",
        ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
        GATE_UP,
        GATE_UP,
    ),
    *layer("decoder.layers.{i}.mlp.linear_fc2", "model.layers.{i}.mlp.down_proj"),
    ("decoder.final_layernorm.weight", "model.norm.weight", RENAME),
    ("output_layer.weight", "lm_head.weight", RENAME),
)
"""Llama, Qwen2 and Qwen3. Both rotate the halves of a head, so that no row of q and k changes its place in it."""

GPT2: Table = (
    ("embedding.word_embeddings.weight", "transformer.wte.weight", RENAME),
    ("embedding.position_embeddings.weight", "transformer.wpe.weight", RENAME),
    *layer("decoder.layers.{i}.input_layernorm", "transformer.h.{i}.ln_1"),
    *layer("decoder.layers.{i}.self_attention.linear_qkv", "transformer.h.{i}.attn.c_attn", QKV_COLUMNS, QKV_ROWS),
    *layer("decoder.layers.{i}.self_attention.linear_proj", "transformer.h.{i}.attn.c_proj", TRANSPOSE),
    *layer("decoder.layers.{i}.pre_mlp_layernorm", "transformer.h.{i}.ln_2"),
    *layer("decoder.layers.{i}.mlp.linear_fc1", "transformer.h.{i}.mlp.c_fc", TRANSPOSE),
    *layer("decoder.layers.{i}.mlp.linear_fc2", "transformer.h.{i}.mlp.c_proj", TRANSPOSE),
    *layer("decoder.final_layernorm", "transformer.ln_f"),
    ("output_layer.weight", "lm_head.weight", RENAME),
)
"""GPT-2: q | k | v on top of each other, and Conv1D weights [in, out]."""
