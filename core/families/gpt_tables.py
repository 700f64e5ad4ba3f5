"""What the programs of GPT-2's shape call our tensors: a row for each, read both ways by core/families/rules.py."""

from __future__ import annotations

from . import hf_gpt2, lecture
from .rules import RENAME, TRANSPOSE, Concat, Row, Table

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

HF_GPT2: Table = tuple(
    (theirs, ours, TRANSPOSE if theirs in hf_gpt2.TRANSPOSED else rule) for theirs, ours, rule in NANOGPT
)
"""Hugging Face GPT-2: nanoGPT's names, and Conv1D weights [in, out]."""


def _heads(part: str) -> tuple[str, ...]:
    return tuple(f"blocks.{{i}}.sa.heads.{{j}}.{word}.{part}" for word in ("query", "key", "value"))


_PLAIN: tuple[Row, ...] = tuple(
    (theirs, ours, RENAME) for theirs, ours in lecture.TENSORS.items() if "{j}" not in theirs
)

LECTURE: Table = (
    (_heads("weight"), "blocks.{i}.sa.qkv.weight", Concat(0)),
    (_heads("bias"), "blocks.{i}.sa.qkv.bias", Concat(0)),
    *_PLAIN,
)
"""Lecture style: the rows of qkv are q | k | v, each of them head by head; the feed-forward part is `ffwd` or `fwd`."""
