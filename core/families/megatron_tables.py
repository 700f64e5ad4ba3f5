"""Tables between Megatron's and Hugging Face's names, applied in both directions by core/families/rules.py.

Megatron's names are those of its local layers; TRANSFORMER_ENGINE and `unstacked` lead to them from the others.
"""

from __future__ import annotations

from . import megatron
from .rules import RENAME, TRANSPOSE, Chain, Concat, Interleave, Inverse, Row, Stack, Table

TRANSFORMER_ENGINE: Table = tuple((name, local, RENAME) for name, local in megatron.FUSED_NORMS.items())


def unstacked(n_layer: int) -> Table:
    """The table from tensors of all layers in one to those of each layer."""
    rows: list[Row] = []
    for name in dict.fromkeys((*megatron.LOCAL, *megatron.TRANSFORMER_ENGINE)):
        if "{i}" in name:
            layers = tuple(name.replace("{i}", str(i)) for i in range(n_layer))
            rows.append((name.replace("{i}.", ""), layers, UNSTACK))
    return tuple(rows)


class _Unstack(Inverse):
    """A tensor of all layers becomes one for each."""

    def __str__(self) -> str:
        return "take out of the stack of layers"


class _Split(Inverse):
    """A tensor is split into the parts that it was made from."""

    def __str__(self) -> str:
        return f"split: {self.rule}"


UNSTACK = _Unstack(Stack(0))
QKV = _Split(Interleave())
GATE_UP = _Split(Concat(0))
QKV_ROWS = Chain((QKV, Concat(0, ("q_size", "kv_size", "kv_size"))))
QKV_COLUMNS = Chain((*QKV_ROWS.rules, TRANSPOSE))


def _parts(kind: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{{i}}.self_attn.{part}_proj.{kind}" for part in "qkv")


LLAMA: Table = (
    ("embedding.word_embeddings.weight", "model.embed_tokens.weight", RENAME),
    ("decoder.layers.{i}.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight", RENAME),
    ("decoder.layers.{i}.self_attention.linear_qkv.weight", _parts("weight"), QKV),
    ("decoder.layers.{i}.self_attention.linear_qkv.bias", _parts("bias"), QKV),
    ("decoder.layers.{i}.self_attention.q_layernorm.weight", "model.layers.{i}.self_attn.q_norm.weight", RENAME),
    ("decoder.layers.{i}.self_attention.k_layernorm.weight", "model.layers.{i}.self_attn.k_norm.weight", RENAME),
    ("decoder.layers.{i}.self_attention.linear_proj.weight", "model.layers.{i}.self_attn.o_proj.weight", RENAME),
    ("decoder.layers.{i}.self_attention.linear_proj.bias", "model.layers.{i}.self_attn.o_proj.bias", RENAME),
    ("decoder.layers.{i}.pre_mlp_layernorm.weight", "model.layers.{i}.post_attention_layernorm.weight", RENAME),
    (
        "decoder.layers.{i}.mlp.linear_fc1.weight",
        ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        GATE_UP,
    ),
    (
        "decoder.layers.{i}.mlp.linear_fc1.bias",
        ("model.layers.{i}.mlp.gate_proj.bias", "model.layers.{i}.mlp.up_proj.bias"),
        GATE_UP,
    ),
    ("decoder.layers.{i}.mlp.linear_fc2.weight", "model.layers.{i}.mlp.down_proj.weight", RENAME),
    ("decoder.layers.{i}.mlp.linear_fc2.bias", "model.layers.{i}.mlp.down_proj.bias", RENAME),
    ("decoder.final_layernorm.weight", "model.norm.weight", RENAME),
    ("output_layer.weight", "lm_head.weight", RENAME),
)
"""Llama, Qwen2 and Qwen3. Both rotate the halves of a head, so that no row of q and k changes its place in it."""

GPT2: Table = (
    ("embedding.word_embeddings.weight", "transformer.wte.weight", RENAME),
    ("embedding.position_embeddings.weight", "transformer.wpe.weight", RENAME),
    ("decoder.layers.{i}.input_layernorm.weight", "transformer.h.{i}.ln_1.weight", RENAME),
    ("decoder.layers.{i}.input_layernorm.bias", "transformer.h.{i}.ln_1.bias", RENAME),
    ("decoder.layers.{i}.self_attention.linear_qkv.weight", "transformer.h.{i}.attn.c_attn.weight", QKV_COLUMNS),
    ("decoder.layers.{i}.self_attention.linear_qkv.bias", "transformer.h.{i}.attn.c_attn.bias", QKV_ROWS),
    ("decoder.layers.{i}.self_attention.linear_proj.weight", "transformer.h.{i}.attn.c_proj.weight", TRANSPOSE),
    ("decoder.layers.{i}.self_attention.linear_proj.bias", "transformer.h.{i}.attn.c_proj.bias", RENAME),
    ("decoder.layers.{i}.pre_mlp_layernorm.weight", "transformer.h.{i}.ln_2.weight", RENAME),
    ("decoder.layers.{i}.pre_mlp_layernorm.bias", "transformer.h.{i}.ln_2.bias", RENAME),
    ("decoder.layers.{i}.mlp.linear_fc1.weight", "transformer.h.{i}.mlp.c_fc.weight", TRANSPOSE),
    ("decoder.layers.{i}.mlp.linear_fc1.bias", "transformer.h.{i}.mlp.c_fc.bias", RENAME),
    ("decoder.layers.{i}.mlp.linear_fc2.weight", "transformer.h.{i}.mlp.c_proj.weight", TRANSPOSE),
    ("decoder.layers.{i}.mlp.linear_fc2.bias", "transformer.h.{i}.mlp.c_proj.bias", RENAME),
    ("decoder.final_layernorm.weight", "transformer.ln_f.weight", RENAME),
    ("decoder.final_layernorm.bias", "transformer.ln_f.bias", RENAME),
    ("output_layer.weight", "lm_head.weight", RENAME),
)
"""GPT-2: q | k | v on top of each other, and Conv1D weights [in, out]."""
