"""nanoGPT: a GPT-2 with Linear weights [out, in].

Names as in karpathy/nanoGPT, model.py; the buffer `attn.bias` as in its versions before flash attention.
"""

from __future__ import annotations

from .family import Family, Sides
from .rules import RENAME, Table

NANOGPT: Table = (
    ("transformer.wte.weight", "token_embedding_table.weight", RENAME),
    ("transformer.wpe.weight", "position_embedding_table.weight", RENAME),
    ("transformer.h.{i}.ln_1.weight", "blocks.{i}.ln1.weight", RENAME),
    ("transformer.h.{i}.ln_1.bias", "blocks.{i}.ln1.bias", RENAME),
    ("transformer.h.{i}.attn.c_attn.weight", "blocks.{i}.sa.qkv.weight", RENAME),
    ("transformer.h.{i}.attn.c_attn.bias", "blocks.{i}.sa.qkv.bias", RENAME),
    ("transformer.h.{i}.attn.c_proj.weight", "blocks.{i}.sa.proj.weight", RENAME),
    ("transformer.h.{i}.attn.c_proj.bias", "blocks.{i}.sa.proj.bias", RENAME),
    ("transformer.h.{i}.ln_2.weight", "blocks.{i}.ln2.weight", RENAME),
    ("transformer.h.{i}.ln_2.bias", "blocks.{i}.ln2.bias", RENAME),
    ("transformer.h.{i}.mlp.c_fc.weight", "blocks.{i}.fwd.net.0.weight", RENAME),
    ("transformer.h.{i}.mlp.c_fc.bias", "blocks.{i}.fwd.net.0.bias", RENAME),
    ("transformer.h.{i}.mlp.c_proj.weight", "blocks.{i}.fwd.net.2.weight", RENAME),
    ("transformer.h.{i}.mlp.c_proj.bias", "blocks.{i}.fwd.net.2.bias", RENAME),
    ("transformer.ln_f.weight", "ln_f.weight", RENAME),
    ("transformer.ln_f.bias", "ln_f.bias", RENAME),
    ("lm_head.weight", "lm_head.weight", RENAME),
)
"""nanoGPT: Linear weights [out, in] as ours, q | k | v on top of each other as ours."""

TENSORS: dict[str, Sides] = {
    "transformer.wte.weight": ("vocab_size", "n_embd"),
    "transformer.wpe.weight": ("block_size", "n_embd"),
    "transformer.h.{i}.ln_1.weight": ("n_embd",),
    "transformer.h.{i}.ln_1.bias": ("n_embd",),
    "transformer.h.{i}.attn.c_attn.weight": ("3 n_embd", "n_embd"),
    "transformer.h.{i}.attn.c_attn.bias": ("3 n_embd",),
    "transformer.h.{i}.attn.c_proj.weight": ("n_embd", "n_embd"),
    "transformer.h.{i}.attn.c_proj.bias": ("n_embd",),
    "transformer.h.{i}.ln_2.weight": ("n_embd",),
    "transformer.h.{i}.ln_2.bias": ("n_embd",),
    "transformer.h.{i}.mlp.c_fc.weight": ("4 n_embd", "n_embd"),
    "transformer.h.{i}.mlp.c_fc.bias": ("4 n_embd",),
    "transformer.h.{i}.mlp.c_proj.weight": ("n_embd", "4 n_embd"),
    "transformer.h.{i}.mlp.c_proj.bias": ("n_embd",),
    "transformer.ln_f.weight": ("n_embd",),
    "transformer.ln_f.bias": ("n_embd",),
    "lm_head.weight": ("vocab_size", "n_embd"),
}

BIASES: dict[str, tuple[str, ...]] = {
    "qkv_bias": ("transformer.h.{i}.attn.c_attn.bias",),
    "proj_bias": ("transformer.h.{i}.attn.c_proj.bias",),
    "mlp_bias": ("transformer.h.{i}.mlp.c_fc.bias", "transformer.h.{i}.mlp.c_proj.bias"),
    "norm_bias": ("transformer.h.{i}.ln_1.bias", "transformer.h.{i}.ln_2.bias", "transformer.ln_f.bias"),
}

FAMILIES = (
    Family(
        name="nanogpt",
        program="nanoGPT",
        tensors=TENSORS,
        signature=("transformer.h.{i}.attn.c_attn.weight",),
        embedding="transformer.wte.weight",
        head="lm_head.weight",
        positions="transformer.wpe.weight",
        switches={**BIASES, "head": ("lm_head.weight",)},
        buffers={"transformer.h.{i}.attn.bias": (("1", "1", "block_size", "block_size"), "the causal mask")},
        claims={"bias": "qkv_bias"},
    ),
)
