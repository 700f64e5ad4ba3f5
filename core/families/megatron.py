"""Megatron: exported models with the names of the local or the Transformer Engine layers, and stacked ones.

Names as in NVIDIA/Megatron-LM, megatron/core/models/gpt/ and megatron/core/transformer/. A checkpoint of the format
`torch_dist` has all layers of a tensor in one, with the layer as its first side. qkv is interleaved: for each query
group its queries, its key and its value.
"""

from __future__ import annotations

from .family import Family, Sides, Style, linear, norm

COMMON: dict[str, Sides] = {
    "embedding.word_embeddings.weight": ("vocab_size", "n_embd"),
    "embedding.position_embeddings.weight": ("block_size", "n_embd"),
    **linear("decoder.layers.{i}.self_attention.linear_qkv", "q_size + 2 kv_size", "n_embd"),
    "decoder.layers.{i}.self_attention.q_layernorm.weight": ("head_size",),
    "decoder.layers.{i}.self_attention.k_layernorm.weight": ("head_size",),
    **linear("decoder.layers.{i}.self_attention.linear_proj", "n_embd", "q_size"),
    **linear("decoder.layers.{i}.mlp.linear_fc1", "fc1_rows", "n_embd"),
    **linear("decoder.layers.{i}.mlp.linear_fc2", "n_embd", "n_ffn"),
    **norm("decoder.final_layernorm"),
    "output_layer.weight": ("vocab_size", "n_embd"),
}
"""`fc1_rows` is n_ffn, or twice that where it is gated: [gate; up]."""

LOCAL: dict[str, Sides] = {
    **COMMON,
    **norm("decoder.layers.{i}.input_layernorm"),
    **norm("decoder.layers.{i}.pre_mlp_layernorm"),
}

FUSED_NORMS = {
    "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.{i}.input_layernorm.weight",
    "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_bias": "decoder.layers.{i}.input_layernorm.bias",
    "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight": "decoder.layers.{i}.pre_mlp_layernorm.weight",
    "decoder.layers.{i}.mlp.linear_fc1.layer_norm_bias": "decoder.layers.{i}.pre_mlp_layernorm.bias",
}
"""Transformer Engine has the norm in the layer that follows it: its name and the local one; others are the same."""

TRANSFORMER_ENGINE: dict[str, Sides] = {**COMMON, **{name: LOCAL[local] for name, local in FUSED_NORMS.items()}}

SWITCHES: dict[str, tuple[str, ...]] = {
    "positions": ("embedding.position_embeddings.weight",),
    "qkv_bias": ("decoder.layers.{i}.self_attention.linear_qkv.bias",),
    "proj_bias": ("decoder.layers.{i}.self_attention.linear_proj.bias",),
    "qk_norm": (
        "decoder.layers.{i}.self_attention.q_layernorm.weight",
        "decoder.layers.{i}.self_attention.k_layernorm.weight",
    ),
    "mlp_bias": ("decoder.layers.{i}.mlp.linear_fc1.bias", "decoder.layers.{i}.mlp.linear_fc2.bias"),
    "norm_bias": tuple(name for name in {**LOCAL, **TRANSFORMER_ENGINE} if "norm" in name and name.endswith("bias")),
    "head": ("output_layer.weight",),
}

STYLES: tuple[tuple[str, str, dict[str, bool]], ...] = (
    ("qwen3", "Qwen3 style", {"qk_norm": True, "norm_bias": False}),
    ("qwen2", "Qwen2 style", {"qkv_bias": True, "proj_bias": False, "norm_bias": False, "gated": True}),
    ("llama", "Llama style", {"qkv_bias": False, "proj_bias": False, "norm_bias": False, "gated": True}),
    ("llama", "Llama style with biases", {"qkv_bias": True, "proj_bias": True, "norm_bias": False, "gated": True}),
    ("gpt2", "GPT-2 style", {"norm_bias": True, "gated": False}),
    ("mixed", "no known style", {}),
)


def stacked(tensors: dict[str, Sides]) -> dict[str, Sides]:
    """The table of the same tensors with all layers in one."""
    return {
        name.replace("{i}.", ""): ("n_layer", *sides) if "{i}" in name else sides for name, sides in tensors.items()
    }


def _family(program: str, tensors: dict[str, Sides]) -> Family:
    layered = any("{i}" in name for name in tensors)
    switches = {
        switch: tuple(name for row in rows if (name := row if layered else row.replace("{i}.", "")) in tensors)
        for switch, rows in SWITCHES.items()
    }
    return Family(
        name="megatron",
        program=program,
        tensors=tensors,
        signature=(next(name for name in tensors if name.endswith("linear_qkv.weight")),),
        embedding="embedding.word_embeddings.weight",
        head="output_layer.weight",
        positions="embedding.position_embeddings.weight",
        switches=switches,
        buffers={"*._extra_state": (None, "what Transformer Engine keeps for FP8")},
        styles=tuple(Style(f"megatron_{key}", f"{program}, {words}", needs) for key, words, needs in STYLES),
        rotary=True,
        norm_without_bias="RMSNorm",
        gated="SwiGLU",
        pads=True,
        claims={"add_qkv_bias": "qkv_bias", "qk_layernorm": "qk_norm", "swiglu": "gated"},
    )


FAMILIES = (
    _family("Megatron export with local names", LOCAL),
    _family("Megatron export with Transformer Engine names", TRANSFORMER_ENGINE),
    _family("Megatron torch_dist, local names", stacked(LOCAL)),
    _family("Megatron torch_dist, Transformer Engine names", stacked(TRANSFORMER_ENGINE)),
)
