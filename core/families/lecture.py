"""The lecture-style GPT, where each attention head has layers of its own: what its tensors are in ours.

Names as in the single-file checkpoints of our own past (docs/formats.md): Andrej Karpathy's lecture "Let's build GPT",
whose feed-forward part is called `ffwd`, and `fwd` in some later files.
"""

from __future__ import annotations

from . import gpt
from .rules import RENAME, Concat, Table


def _heads(part: str) -> tuple[str, ...]:
    return tuple(f"blocks.{{i}}.sa.heads.{{j}}.{word}.{part}" for word in ("query", "key", "value"))


def _rows(ours: str) -> Table:
    if ".sa.qkv." in ours:
        return ((_heads(ours.rpartition(".")[2]), ours, Concat(0)),)
    names = (ours.replace(".fwd.", ".ffwd."), ours) if ".fwd." in ours else (ours,)
    return tuple((theirs, ours, RENAME) for theirs in names)


LECTURE: Table = tuple(row for ours in gpt.PLAIN for row in _rows(ours))
"""The rows of qkv are q | k | v, each of them head by head; the feed-forward part is `ffwd` or `fwd`."""

DROPPED: dict[str, str] = {
    "blocks.{i}.sa.heads.{j}.tril": "the causal mask, which our attention has in its kernel",
}
"""Buffers that are in the file and that our model computes."""
