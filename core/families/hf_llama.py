"""Hugging Face's decoders with Llama's names: Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2 and OLMo 2.

Names as in huggingface/transformers, src/transformers/models/; the inverse frequencies of the rotary embedding as in
versions before 4.32. Llama, Mistral and Gemma have the same tensors: their config says which it is.
"""

from __future__ import annotations

from .family import Family, Sides, Style, linear
from .rules import RENAME, Concat, Table, layer

LAYER = "model.layers.{i}."
ATTENTION = f"{LAYER}self_attn."

TENSORS: dict[str, Sides] = {
    "model.embed_tokens.weight": ("vocab_size", "n_embd"),
    **linear(f"{ATTENTION}q_proj", "q_size", "n_embd"),
    **linear(f"{ATTENTION}k_proj", "kv_size", "n_embd"),
    **linear(f"{ATTENTION}v_proj", "kv_size", "n_embd"),
    **linear(f"{ATTENTION}o_proj", "n_embd", "q_size"),
    f"{ATTENTION}q_norm.weight": ("head_size",),
    f"{ATTENTION}k_norm.weight": ("head_size",),
    **linear(f"{LAYER}mlp.gate_proj", "n_ffn", "n_embd"),
    **linear(f"{LAYER}mlp.up_proj", "n_ffn", "n_embd"),
    **linear(f"{LAYER}mlp.down_proj", "n_embd", "n_ffn"),
    f"{LAYER}input_layernorm.weight": ("n_embd",),
    f"{LAYER}post_attention_layernorm.weight": ("n_embd",),
    "model.norm.weight": ("n_embd",),
    "lm_head.weight": ("vocab_size", "n_embd"),
}
"""In the order of the modules, which is that of an optimizer's parameters."""

QK_NORM = (f"{ATTENTION}q_norm.weight", f"{ATTENTION}k_norm.weight")
MORE_NORMS = (f"{LAYER}pre_feedforward_layernorm.weight", f"{LAYER}post_feedforward_layernorm.weight")


def _without(names: tuple[str, ...], more: dict[str, Sides]) -> dict[str, Sides]:
    return {name: sides for name, sides in TENSORS.items() if name not in names} | more


GEMMA2 = _without(QK_NORM, dict.fromkeys(MORE_NORMS, ("n_embd",)))
OLMO2 = _without(
    (f"{LAYER}input_layernorm.weight",),
    {QK_NORM[0]: ("q_size",), QK_NORM[1]: ("kv_size",), MORE_NORMS[1]: ("n_embd",)},
)

SWITCHES: dict[str, tuple[str, ...]] = {
    "qkv_bias": tuple(f"{ATTENTION}{part}_proj.bias" for part in "qkv"),
    "proj_bias": (f"{ATTENTION}o_proj.bias",),
    "qk_norm": QK_NORM,
    "mlp_bias": tuple(f"{LAYER}mlp.{part}_proj.bias" for part in ("gate", "up", "down")),
    "head": ("lm_head.weight",),
}

FREQUENCIES = (("head_size / 2",), "the frequencies of the rotary embedding")

NORM_OF_GEMMA = "RMSNorm with 1 + weight"

_PLAIN = {"qk_norm": False, "qkv_bias": False, "proj_bias": False, "mlp_bias": False}

STYLES = (
    Style("hf_qwen3", "Hugging Face Qwen3", {"qk_norm": True}),
    Style("hf_mistral", "Hugging Face Mistral", _PLAIN, "mistral"),
    Style("hf_gemma", "Hugging Face Gemma", {"qk_norm": False, "mlp_bias": False}, "gemma", NORM_OF_GEMMA),
    Style("hf_qwen2", "Hugging Face Qwen2", {"qkv_bias": True, "proj_bias": False}),
    Style("hf_llama", "Hugging Face Llama", {}),
)


def _family(
    name: str, program: str, tensors: dict[str, Sides], styles: tuple[Style, ...] = (), norm: str = "RMSNorm"
) -> Family:
    return Family(
        name=name,
        program=program,
        tensors=tensors,
        signature=(f"{ATTENTION}q_proj.weight",),
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
        switches={
            switch: kept for switch, names in SWITCHES.items() if (kept := tuple(n for n in names if n in tensors))
        },
        buffers={f"{ATTENTION}rotary_emb.inv_freq": FREQUENCIES, "model.rotary_emb.inv_freq": FREQUENCIES},
        base="model.",
        styles=styles,
        rotary=True,
        norm=norm,
        activation="SwiGLU",
        gated="SwiGLU",
        claims={"attention_bias": "qkv_bias", "mlp_bias": "mlp_bias"},
    )


FAMILIES = (
    _family("hf_llama", "Hugging Face Llama", TENSORS, STYLES),
    _family("hf_gemma2", "Hugging Face Gemma 2", GEMMA2, norm=NORM_OF_GEMMA),
    _family("hf_olmo2", "Hugging Face OLMo 2", OLMO2),
)


QKV = Concat(0, ("q_size", "kv_size", "kv_size"))


def _table(**norms: str) -> Table:
    """Make a table to our names; `norms` are those of a layer, theirs by ours."""
    return (
        ("model.embed_tokens.weight", "token_embedding_table.weight", RENAME),
        *(row for ours, theirs in norms.items() for row in layer(LAYER + theirs, f"blocks.{{i}}.{ours}")),
        *layer(tuple(f"{ATTENTION}{part}_proj" for part in "qkv"), "blocks.{i}.sa.qkv", QKV, QKV),
        *layer(f"{ATTENTION}o_proj", "blocks.{i}.sa.proj"),
        *layer(f"{LAYER}mlp.gate_proj", "blocks.{i}.fwd.gate"),
        *layer(f"{LAYER}mlp.up_proj", "blocks.{i}.fwd.net.0"),
        *layer(f"{LAYER}mlp.down_proj", "blocks.{i}.fwd.net.2"),
        ("model.norm.weight", "ln_f.weight", RENAME),
        ("lm_head.weight", "lm_head.weight", RENAME),
    )


_LLAMA = _table(ln1="input_layernorm", ln2="post_attention_layernorm")
_QWEN3 = ((QK_NORM[0], "blocks.{i}.sa.q_norm.weight", RENAME), (QK_NORM[1], "blocks.{i}.sa.k_norm.weight", RENAME))
_WIDE = tuple((theirs, ours.replace("_norm", "_norm_wide"), rule) for theirs, ours, rule in _QWEN3)

TABLES: dict[str, Table] = {
    **dict.fromkeys(("hf_llama", "hf_mistral", "hf_qwen2", "hf_gemma"), _LLAMA),
    "hf_qwen3": (*_LLAMA, *_QWEN3),
    "hf_gemma2": _table(
        ln1="input_layernorm",
        ln1_post="post_attention_layernorm",
        ln2="pre_feedforward_layernorm",
        ln2_post="post_feedforward_layernorm",
    ),
    "hf_olmo2": (*_table(ln1_post="post_attention_layernorm", ln2_post="post_feedforward_layernorm"), *_WIDE),
}
"""The tensors of each as ours; what is `post_attention_layernorm` differs among them."""
