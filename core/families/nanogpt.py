"""nanoGPT: a GPT-2 with Linear weights [out, in].

Names as in karpathy/nanoGPT, model.py; the buffer `attn.bias` as in its versions before flash attention.
"""

from __future__ import annotations

from . import gpt
from .family import Family, Sides
from .rules import RENAME, Table, layer

NANOGPT: Table = (
    ("transformer.wte.weight", "token_embedding_table.weight", RENAME),
    ("transformer.wpe.weight", "position_embedding_table.weight", RENAME),
    *layer("transformer.h.{i}.ln_1", "blocks.{i}.ln1"),
    *layer("transformer.h.{i}.attn.c_attn", "blocks.{i}.sa.qkv"),
    *layer("transformer.h.{i}.attn.c_proj", "blocks.{i}.sa.proj"),
    *layer("transformer.h.{i}.ln_2", "blocks.{i}.ln2"),
    *layer("transformer.h.{i}.mlp.c_fc", "blocks.{i}.fwd.net.0"),
    *layer("transformer.h.{i}.mlp.c_proj", "blocks.{i}.fwd.net.2"),
    *layer("transformer.ln_f", "ln_f"),
    ("lm_head.weight", "lm_head.weight", RENAME),
)
"""nanoGPT: Linear weights [out, in] as ours, q | k | v on top of each other as ours."""

TENSORS: dict[str, Sides] = gpt.sides_of(NANOGPT)

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
