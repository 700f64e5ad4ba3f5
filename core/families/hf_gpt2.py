"""Hugging Face GPT-2: its Conv1D weights are [in, out]; `transformer.` is absent where GPT2Model was saved by itself.

Names as in huggingface/transformers, src/transformers/models/gpt2/modeling_gpt2.py; the buffers as in its versions
before 4.31.
"""

from __future__ import annotations

from .family import Family, Sides
from .nanogpt import NANOGPT
from .rules import TRANSPOSE, Table

TENSORS: dict[str, Sides] = {
    "transformer.wte.weight": ("vocab_size", "n_embd"),
    "transformer.wpe.weight": ("block_size", "n_embd"),
    "transformer.h.{i}.ln_1.weight": ("n_embd",),
    "transformer.h.{i}.ln_1.bias": ("n_embd",),
    "transformer.h.{i}.attn.c_attn.weight": ("n_embd", "3 n_embd"),
    "transformer.h.{i}.attn.c_attn.bias": ("3 n_embd",),
    "transformer.h.{i}.attn.c_proj.weight": ("n_embd", "n_embd"),
    "transformer.h.{i}.attn.c_proj.bias": ("n_embd",),
    "transformer.h.{i}.ln_2.weight": ("n_embd",),
    "transformer.h.{i}.ln_2.bias": ("n_embd",),
    "transformer.h.{i}.mlp.c_fc.weight": ("n_embd", "n_ffn"),
    "transformer.h.{i}.mlp.c_fc.bias": ("n_ffn",),
    "transformer.h.{i}.mlp.c_proj.weight": ("n_ffn", "n_embd"),
    "transformer.h.{i}.mlp.c_proj.bias": ("n_embd",),
    "transformer.ln_f.weight": ("n_embd",),
    "transformer.ln_f.bias": ("n_embd",),
    "lm_head.weight": ("vocab_size", "n_embd"),
}

TRANSPOSED = (
    "transformer.h.{i}.attn.c_attn.weight",
    "transformer.h.{i}.attn.c_proj.weight",
    "transformer.h.{i}.mlp.c_fc.weight",
    "transformer.h.{i}.mlp.c_proj.weight",
)
"""The Conv1D weights: the transpose of a Linear's."""

HF_GPT2: Table = tuple((theirs, ours, TRANSPOSE if theirs in TRANSPOSED else rule) for theirs, ours, rule in NANOGPT)
"""Hugging Face GPT-2: nanoGPT's names, and Conv1D weights [in, out]."""

FAMILIES = (
    Family(
        name="hf_gpt2",
        program="Hugging Face GPT-2",
        tensors=TENSORS,
        signature=("transformer.h.{i}.attn.c_attn.weight",),
        embedding="transformer.wte.weight",
        head="lm_head.weight",
        positions="transformer.wpe.weight",
        switches={"head": ("lm_head.weight",)},
        always=("qkv_bias", "proj_bias", "mlp_bias", "norm_bias"),
        buffers={
            "transformer.h.{i}.attn.bias": (("1", "1", "block_size", "block_size"), "the causal mask"),
            "transformer.h.{i}.attn.masked_bias": (None, "what masked places are filled with"),
        },
        base="transformer.",
    ),
)
