"""Hugging Face's decoders with layernorms, rotary positions and parallel parts: GPT-NeoX (Pythia) and Phi.

Names as in huggingface/transformers, src/transformers/models/{gpt_neox,phi}/; the buffers as in versions before 4.31.
"""

from __future__ import annotations

from .family import Family, Sides, linear, norm
from .hf_llama import FREQUENCIES, QKV
from .rules import RENAME, Chain, Interleave, Inverse, Table, layer

NEOX_LAYER, PHI_LAYER = "gpt_neox.layers.{i}.", "model.layers.{i}."

NEOX_TENSORS: dict[str, Sides] = {
    "gpt_neox.embed_in.weight": ("vocab_size", "n_embd"),
    **norm(f"{NEOX_LAYER}input_layernorm"),
    **norm(f"{NEOX_LAYER}post_attention_layernorm"),
    **linear(f"{NEOX_LAYER}attention.query_key_value", "3 n_embd", "n_embd"),
    **linear(f"{NEOX_LAYER}attention.dense", "n_embd", "n_embd"),
    **linear(f"{NEOX_LAYER}mlp.dense_h_to_4h", "n_ffn", "n_embd"),
    **linear(f"{NEOX_LAYER}mlp.dense_4h_to_h", "n_embd", "n_ffn"),
    **norm("gpt_neox.final_layer_norm"),
    "embed_out.weight": ("vocab_size", "n_embd"),
}

PHI_TENSORS: dict[str, Sides] = {
    "model.embed_tokens.weight": ("vocab_size", "n_embd"),
    **linear(f"{PHI_LAYER}self_attn.q_proj", "q_size", "n_embd"),
    **linear(f"{PHI_LAYER}self_attn.k_proj", "kv_size", "n_embd"),
    **linear(f"{PHI_LAYER}self_attn.v_proj", "kv_size", "n_embd"),
    **linear(f"{PHI_LAYER}self_attn.dense", "n_embd", "q_size"),
    **linear(f"{PHI_LAYER}mlp.fc1", "n_ffn", "n_embd"),
    **linear(f"{PHI_LAYER}mlp.fc2", "n_embd", "n_ffn"),
    **norm(f"{PHI_LAYER}input_layernorm"),
    **norm("model.final_layernorm"),
    **linear("lm_head", "vocab_size", "n_embd"),
}

FAMILIES = (
    Family(
        name="hf_gpt_neox",
        program="Hugging Face GPT-NeoX",
        tensors=NEOX_TENSORS,
        signature=(f"{NEOX_LAYER}attention.query_key_value.weight",),
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        switches={
            "qkv_bias": (f"{NEOX_LAYER}attention.query_key_value.bias",),
            "proj_bias": (f"{NEOX_LAYER}attention.dense.bias",),
            "head": ("embed_out.weight",),
        },
        always=("mlp_bias", "norm_bias"),
        buffers={
            f"{NEOX_LAYER}attention.bias": (("1", "1", "block_size", "block_size"), "the causal mask"),
            f"{NEOX_LAYER}attention.masked_bias": (None, "what masked places are filled with"),
            f"{NEOX_LAYER}attention.rotary_emb.inv_freq": (None, FREQUENCIES[1]),
            "gpt_neox.rotary_emb.inv_freq": (None, FREQUENCIES[1]),
        },
        base="gpt_neox.",
        rotary=True,
        claims={"attention_bias": "qkv_bias"},
    ),
    Family(
        name="hf_phi",
        program="Hugging Face Phi",
        tensors=PHI_TENSORS,
        signature=(f"{PHI_LAYER}self_attn.dense.weight",),
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
        switches={"head": ("lm_head.weight", "lm_head.bias")},
        always=("qkv_bias", "proj_bias", "mlp_bias", "norm_bias", "head_bias"),
        buffers={f"{PHI_LAYER}self_attn.rotary_emb.inv_freq": (None, FREQUENCIES[1])},
        base="model.",
        rotary=True,
    ),
)

_BY_HEAD = Chain((Inverse(Interleave("n_head"), "split head by head"), QKV))

TABLES: dict[str, Table] = {
    "hf_gpt_neox": (
        ("gpt_neox.embed_in.weight", "token_embedding_table.weight", RENAME),
        *layer(f"{NEOX_LAYER}input_layernorm", "blocks.{i}.ln1"),
        *layer(f"{NEOX_LAYER}attention.query_key_value", "blocks.{i}.sa.qkv", _BY_HEAD, _BY_HEAD),
        *layer(f"{NEOX_LAYER}attention.dense", "blocks.{i}.sa.proj"),
        *layer(f"{NEOX_LAYER}post_attention_layernorm", "blocks.{i}.ln2"),
        *layer(f"{NEOX_LAYER}mlp.dense_h_to_4h", "blocks.{i}.fwd.net.0"),
        *layer(f"{NEOX_LAYER}mlp.dense_4h_to_h", "blocks.{i}.fwd.net.2"),
        *layer("gpt_neox.final_layer_norm", "ln_f"),
        ("embed_out.weight", "lm_head.weight", RENAME),
    ),
    "hf_phi": (
        ("model.embed_tokens.weight", "token_embedding_table.weight", RENAME),
        *layer(f"{PHI_LAYER}input_layernorm", "blocks.{i}.ln1"),
        *layer(tuple(f"{PHI_LAYER}self_attn.{part}_proj" for part in "qkv"), "blocks.{i}.sa.qkv", QKV, QKV),
        *layer(f"{PHI_LAYER}self_attn.dense", "blocks.{i}.sa.proj"),
        *layer(f"{PHI_LAYER}mlp.fc1", "blocks.{i}.fwd.net.0"),
        *layer(f"{PHI_LAYER}mlp.fc2", "blocks.{i}.fwd.net.2"),
        *layer("model.final_layernorm", "ln_f"),
        *layer("lm_head", "lm_head"),
    ),
}
"""The tensors of each as ours. GPT-NeoX has the q, k and v of a head one after another."""
