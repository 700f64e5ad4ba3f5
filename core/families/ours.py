"""Our own GPT of both generations, as families."""

from __future__ import annotations

from dataclasses import replace

from . import gpt, lecture
from .family import Family, Sides
from .fused import FUSED, LECTURE

FUSED_SWITCHES = {"qkv_bias" if switch == "bias" else switch: names for switch, names in gpt.SWITCHES.items()}
HEAD_SIDES: Sides = ("head_size", "n_embd")
MASK: Sides = ("block_size", "block_size")


OURS = Family(
    name=FUSED,
    program="our GPT",
    tensors=gpt.TENSORS,
    signature=("blocks.{i}.sa.qkv.weight",),
    embedding="token_embedding_table.weight",
    head="lm_head.weight",
    positions="position_embedding_table.weight",
    switches={**gpt.PARTS, **FUSED_SWITCHES, "head": ("lm_head.weight",)},
    buffers={name: (MASK, reason) for name, reason in gpt.DROPPED.items()},
    claims=dict(zip(gpt.SWITCHES, FUSED_SWITCHES, strict=True)),
)


def _lecture_family(feed_forward: str) -> Family:
    other = {"ffwd": ".fwd.", "fwd": ".ffwd."}[feed_forward]
    rows = {name: sides for name, sides in gpt.sides_of(lecture.LECTURE).items() if other not in name}
    tensors = {name: HEAD_SIDES[: len(sides)] if "{j}" in name else sides for name, sides in rows.items()}
    switches = {
        **FUSED_SWITCHES,
        "qkv_bias": tuple(name for name in tensors if "{j}" in name and name.endswith(".bias")),
        "mlp_bias": tuple(name for name in tensors if ".net." in name and name.endswith(".bias")),
        "head": ("lm_head.weight",),
    }
    return replace(
        OURS,
        name=LECTURE,
        program="our GPT, lecture style",
        tensors=tensors,
        signature=tuple(name for name in tensors if "{j}" in name and name.endswith(".weight")),
        switches={switch: tuple(name for name in names if name in tensors) for switch, names in switches.items()},
        buffers={name: (MASK, reason) for name, reason in lecture.DROPPED.items()},
        activation="ReLU",
        claims={"bias": "qkv_bias", "head_bias": "head_bias"},
    )


FAMILIES = (OURS, _lecture_family("ffwd"), _lecture_family("fwd"))
