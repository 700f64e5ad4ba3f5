"""The lecture-style GPT, where each attention head has layers of its own: what its tensors are in ours.

Names as in the single-file checkpoints of our own past (docs/formats.md): Andrej Karpathy's lecture "Let's build GPT",
whose feed-forward part is called `ffwd`, and `fwd` in some later files.
"""

from __future__ import annotations

from .rules import RENAME, Concat, Table


def _heads(part: str) -> tuple[str, ...]:
    return tuple(f"blocks.{{i}}.sa.heads.{{j}}.{word}.{part}" for word in ("query", "key", "value"))


LECTURE: Table = (
    ("token_embedding_table.weight", "token_embedding_table.weight", RENAME),
    ("position_embedding_table.weight", "position_embedding_table.weight", RENAME),
    (_heads("weight"), "blocks.{i}.sa.qkv.weight", Concat(0)),
    (_heads("bias"), "blocks.{i}.sa.qkv.bias", Concat(0)),
    ("blocks.{i}.sa.proj.weight", "blocks.{i}.sa.proj.weight", RENAME),
    ("blocks.{i}.sa.proj.bias", "blocks.{i}.sa.proj.bias", RENAME),
    ("blocks.{i}.ffwd.net.0.weight", "blocks.{i}.fwd.net.0.weight", RENAME),
    ("blocks.{i}.ffwd.net.0.bias", "blocks.{i}.fwd.net.0.bias", RENAME),
    ("blocks.{i}.ffwd.net.2.weight", "blocks.{i}.fwd.net.2.weight", RENAME),
    ("blocks.{i}.ffwd.net.2.bias", "blocks.{i}.fwd.net.2.bias", RENAME),
    ("blocks.{i}.fwd.net.0.weight", "blocks.{i}.fwd.net.0.weight", RENAME),
    ("blocks.{i}.fwd.net.0.bias", "blocks.{i}.fwd.net.0.bias", RENAME),
    ("blocks.{i}.fwd.net.2.weight", "blocks.{i}.fwd.net.2.weight", RENAME),
    ("blocks.{i}.fwd.net.2.bias", "blocks.{i}.fwd.net.2.bias", RENAME),
    ("blocks.{i}.ln1.weight", "blocks.{i}.ln1.weight", RENAME),
    ("blocks.{i}.ln1.bias", "blocks.{i}.ln1.bias", RENAME),
    ("blocks.{i}.ln2.weight", "blocks.{i}.ln2.weight", RENAME),
    ("blocks.{i}.ln2.bias", "blocks.{i}.ln2.bias", RENAME),
    ("ln_f.weight", "ln_f.weight", RENAME),
    ("ln_f.bias", "ln_f.bias", RENAME),
    ("lm_head.weight", "lm_head.weight", RENAME),
    ("lm_head.bias", "lm_head.bias", RENAME),
)
"""The rows of qkv are q | k | v, each of them head by head; the feed-forward part is `ffwd` or `fwd`."""

DROPPED: dict[str, str] = {
    "blocks.{i}.sa.heads.{j}.tril": "the causal mask, which our attention has in its kernel",
}
"""Buffers that are in the file and that our model computes."""
