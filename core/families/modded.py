"""modded-nanogpt: the three versions of KellerJordan/modded-nanogpt that can be told apart; our classifiers of them.

Names as in train_gpt.py of 2025-06 (commit 16e2da07) and of 2025-02 (587b45fb), and in train_gpt_medium.py (06743860).
Block 7 has no attention. The head size is fixed in the program; embedding and head may have different rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..config.variants import HEAD_SIZE, WITHOUT_ATTENTION
from .family import Family, Sides

WITHOUT = {WITHOUT_ATTENTION: "blocks.{i}.attn."}
VALUES = tuple(f"value_embeds.{n}.weight" for n in range(3))

EMBEDDINGS: dict[str, Sides] = {
    "embed.weight": ("vocab_size", "n_embd"),
    "value_embeds.0.weight": ("vocab_size", "n_embd"),
    "value_embeds.1.weight": ("vocab_size", "n_embd"),
    "value_embeds.2.weight": ("vocab_size", "n_embd"),
}

SMALL: dict[str, Sides] = {
    **EMBEDDINGS,
    "blocks.{i}.attn.qkv_w": ("3", "q_size", "n_embd"),
    "blocks.{i}.attn.c_proj.weight": ("n_embd", "q_size"),
    "blocks.{i}.mlp.c_fc.weight": ("4 n_embd", "n_embd"),
    "blocks.{i}.mlp.c_proj.weight": ("n_embd", "4 n_embd"),
    "lm_head.weight": ("head_rows", "n_embd"),
}

SMALL_2025_06: dict[str, Sides] = {**SMALL, "scalars": ("5 n_layer +",)}

SMALL_2025_02: dict[str, Sides] = {
    **SMALL,
    "blocks.{i}.attn.lambdas": ("2",),
    "blocks.{i}.lambdas": ("2",),
    "skip_weights": ("n_layer / 2",),
}

MEDIUM: dict[str, Sides] = {
    **EMBEDDINGS,
    "blocks.{i}.attn.qkvo_w": ("4", "q_size", "n_embd"),
    "blocks.{i}.mlp.fc_w": ("4 n_embd", "n_embd"),
    "blocks.{i}.mlp.proj_w": ("n_embd", "4 n_embd"),
    "lm_head_w": ("head_rows", "n_embd"),
    "scalars": ("5 n_layer",),
}


def _family(name: str, program: str, tensors: dict[str, Sides], signature: str, head: str, before: str = "") -> Family:
    return Family(
        name=name,
        program=program,
        tensors=tensors,
        signature=(signature,),
        embedding=f"{before}embed.weight",
        head=head,
        tables=tuple(before + name for name in VALUES),
        always=("qk_norm",),
        without={i: before + name for i, name in WITHOUT.items()},
        rotary=True,
        norm="RMSNorm without weights",
        activation="ReLU squared",
        head_size=HEAD_SIZE,
    )


_PRETRAINED = "pretrained_model."

CLASSIFIER: dict[str, Sides] = {
    **{_PRETRAINED + name: sides for name, sides in MEDIUM.items()},
    "head.1.weight": ("n_embd / 2", "n_embd"),
    "head.1.bias": ("n_embd / 2",),
    "head.4.weight": ("classes", "n_embd / 2"),
    "head.4.bias": ("classes",),
}
"""core/networks/classification.py: a GPTBatched, whose tensors are laid out as medium's, and a head of two layers."""

FAMILIES = (
    _family(
        "modded_small",
        "modded-nanogpt train_gpt.py, 2025-06",
        SMALL_2025_06,
        "blocks.{i}.attn.qkv_w",
        "lm_head.weight",
    ),
    _family(
        "modded_small_2025_02",
        "modded-nanogpt train_gpt.py, 2025-02",
        SMALL_2025_02,
        "blocks.{i}.attn.qkv_w",
        "lm_head.weight",
    ),
    _family("modded_medium", "modded-nanogpt train_gpt_medium.py", MEDIUM, "blocks.{i}.attn.qkvo_w", "lm_head_w"),
    _family(
        "classifier",
        "GPTClassification, a modded-nanogpt model with a head that puts texts into classes",
        CLASSIFIER,
        _PRETRAINED + "blocks.{i}.attn.qkvo_w",
        _PRETRAINED + "lm_head_w",
        before=_PRETRAINED,
    ),
)

LATER = ("qk_bank", "vo_bank", "attn_bank", "mlp_bank")
"""Names of versions after 2025-06, which are another model each."""

MERGED: dict[str, tuple[str, ...]] = {
    "blocks.{i}.attn.qkvo_w": ("blocks.{i}.attn.qkv_w", "blocks.{i}.attn.c_proj.weight"),
    "blocks.{i}.mlp.fc_w": ("blocks.{i}.mlp.c_fc.weight",),
    "blocks.{i}.mlp.proj_w": ("blocks.{i}.mlp.c_proj.weight",),
    "lm_head_w": ("lm_head.weight",),
}
"""Tensors in the layout of medium, and those of small that they are made of, one behind the other."""

APART = ("skip_weights", "blocks.{i}.lambdas", "blocks.{i}.attn.lambdas")
"""What 2025-02 keeps apart and the others in `scalars`: L / 2 skip weights, then 2 numbers a layer, twice."""


def merged(tensors: Mapping[str, Any], variant: str, n_layer: int, join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """Give the tensors of a model the layout of medium; what it computes stays that of its variant.

    `join` concatenates along the first axis. A layer without attention gets the scalars that attention starts with,
    and the half of the skip weights that a U-net does not have gets ones: neither is read. A tail of padded scalars
    is cut.
    """
    made = dict(tensors)
    if variant != "medium":
        for ours, theirs in MERGED.items():
            for i in range(n_layer) if "{i}" in ours else (0,):
                parts = [made.pop(name.format(i=i), None) for name in theirs]
                if parts[0] is not None:
                    whole = len(parts) == 1
                    made[ours.format(i=i)] = parts[0] if whole else join([p if p.ndim == 3 else p[None] for p in parts])
    if variant == "small_2025_02":
        skips = made.pop(APART[0])
        blends = [made.pop(APART[1].format(i=i)) for i in range(n_layer)]
        mixes = [made.pop(APART[2].format(i=i), None) for i in range(n_layer)]
        mixes = [skips.new_full((2,), 0.5) if mix is None else mix for mix in mixes]
        made["scalars"] = join([skips, skips.new_ones(n_layer - len(skips)), *blends, *mixes])
    made["scalars"] = made["scalars"][: 5 * n_layer]
    return made
