"""Hugging Face Llama, Qwen2 and Qwen3: one table; Qwen2 has biases on q, k and v, Qwen3 a norm on q and k.

Names as in huggingface/transformers, src/transformers/models/{llama,qwen2,qwen3}/; the inverse frequencies of the
rotary embedding as in versions before 4.32.
"""

from __future__ import annotations

from .family import Family, Sides, Style, linear

TENSORS: dict[str, Sides] = {
    "model.embed_tokens.weight": ("vocab_size", "n_embd"),
    "model.layers.{i}.input_layernorm.weight": ("n_embd",),
    **linear("model.layers.{i}.self_attn.q_proj", "q_size", "n_embd"),
    **linear("model.layers.{i}.self_attn.k_proj", "kv_size", "n_embd"),
    **linear("model.layers.{i}.self_attn.v_proj", "kv_size", "n_embd"),
    "model.layers.{i}.self_attn.q_norm.weight": ("head_size",),
    "model.layers.{i}.self_attn.k_norm.weight": ("head_size",),
    **linear("model.layers.{i}.self_attn.o_proj", "n_embd", "q_size"),
    "model.layers.{i}.post_attention_layernorm.weight": ("n_embd",),
    **linear("model.layers.{i}.mlp.gate_proj", "n_ffn", "n_embd"),
    **linear("model.layers.{i}.mlp.up_proj", "n_ffn", "n_embd"),
    **linear("model.layers.{i}.mlp.down_proj", "n_embd", "n_ffn"),
    "model.norm.weight": ("n_embd",),
    "lm_head.weight": ("vocab_size", "n_embd"),
}

SWITCHES: dict[str, tuple[str, ...]] = {
    "qkv_bias": tuple(f"model.layers.{{i}}.self_attn.{part}_proj.bias" for part in "qkv"),
    "proj_bias": ("model.layers.{i}.self_attn.o_proj.bias",),
    "qk_norm": ("model.layers.{i}.self_attn.q_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
    "mlp_bias": tuple(f"model.layers.{{i}}.mlp.{part}_proj.bias" for part in ("gate", "up", "down")),
    "head": ("lm_head.weight",),
}

FREQUENCIES = (("head_size / 2",), "the frequencies of the rotary embedding")

FAMILIES = (
    Family(
        name="hf_llama",
        program="Hugging Face Llama",
        tensors=TENSORS,
        signature=("model.layers.{i}.self_attn.q_proj.weight",),
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
        switches=SWITCHES,
        buffers={
            "model.layers.{i}.self_attn.rotary_emb.inv_freq": FREQUENCIES,
            "model.rotary_emb.inv_freq": FREQUENCIES,
        },
        base="model.",
        styles=(
            Style("hf_qwen3", "Hugging Face Qwen3", {"qk_norm": True}),
            Style("hf_qwen2", "Hugging Face Qwen2", {"qkv_bias": True, "proj_bias": False}),
            Style("hf_llama", "Hugging Face Llama", {}),
        ),
        rotary=True,
        norm="RMSNorm",
        activation="SwiGLU",
        gated="SwiGLU",
        claims={"attention_bias": "qkv_bias", "mlp_bias": "mlp_bias"},
    ),
)
