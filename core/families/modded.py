"""modded-nanogpt: the three versions of KellerJordan/modded-nanogpt that can be distinguished; our classifiers of them.

Names as in train_gpt.py of 2025-06 (commit 16e2da07) and of 2025-02 (587b45fb), and in train_gpt_medium.py (06743860).
Block 7 has no attention. The head size is fixed in the program; embedding and head may have different rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..config.variants import HEAD_SIZE, WITHOUT_ATTENTION
from ..containers.tensors.views import View, concatenate, filled, slice_axis, split, squeeze, unsqueeze
from .family import Family, Sides, linear
from .rules import RENAME, Concat, Row, Sizes, Table

WITHOUT = {WITHOUT_ATTENTION: "blocks.{i}.attn."}
VALUES = tuple(f"value_embeds.{n}.weight" for n in range(3))

EMBEDDINGS: dict[str, Sides] = {
    "embed.weight": ("vocab_size", "n_embd"),
    **dict.fromkeys(VALUES, ("vocab_size", "n_embd")),
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


def _family(name: str, program: str, tensors: dict[str, Sides], before: str = "") -> Family:
    return Family(
        name=name,
        program=program,
        tensors=tensors,
        signature=(next(name for name in tensors if ".attn.qkv" in name),),
        embedding=f"{before}embed.weight",
        head=next(name for name in tensors if "lm_head" in name),
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
    **linear("head.1", "n_embd / 2", "n_embd"),
    **linear("head.4", "classes", "n_embd / 2"),
}
"""core/networks/classification.py: a GPTBatched, whose tensors are laid out as medium's, and a head of two layers."""

FAMILIES = (
    _family("modded_small", "modded-nanogpt train_gpt.py, 2025-06", SMALL_2025_06),
    _family("modded_small_2025_02", "modded-nanogpt train_gpt.py, 2025-02", SMALL_2025_02),
    _family("modded_medium", "modded-nanogpt train_gpt_medium.py", MEDIUM),
    _family(
        "classifier",
        "GPTClassification, a modded-nanogpt model with a head that puts texts into classes",
        CLASSIFIER,
        before=_PRETRAINED,
    ),
)

LATER = ("qk_bank", "vo_bank", "attn_bank", "mlp_bank")
"""Names of versions after 2025-06, which are another model each."""


@dataclass(frozen=True)
class Append:
    """Append their second tensor to the first, along the first axis."""

    def __str__(self) -> str:
        return "append along 0"

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Append."""
        return [concatenate([views[0], unsqueeze(views[1], 0)])]

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Split off the last one."""
        first, last = split(views[0], 0, [views[0].shape[0] - 1, 1])
        return [first, squeeze(last, 0)]


class Scalars(Concat):
    """Concatenate a skip weight for each layer, then twice two numbers for each layer."""

    def __str__(self) -> str:
        return "concatenate skip weights, blends and mixes"

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Split."""
        half = sizes["n_layer"] // 2
        return split(views[0], 0, [half, half, *[2] * (2 * sizes["n_layer"])])


def _same(names: Iterable[str]) -> tuple[Row, ...]:
    return tuple((name, name, RENAME) for name in names)


_MATRICES: tuple[Row, ...] = (
    *_same(EMBEDDINGS),
    (("blocks.{i}.attn.qkv_w", "blocks.{i}.attn.c_proj.weight"), "blocks.{i}.attn.qkvo_w", Append()),
    ("blocks.{i}.mlp.c_fc.weight", "blocks.{i}.mlp.fc_w", RENAME),
    ("blocks.{i}.mlp.c_proj.weight", "blocks.{i}.mlp.proj_w", RENAME),
    ("lm_head.weight", "lm_head_w", RENAME),
)
_SKIPS, _UNUSED_SKIPS = "skip_weights", "skip weights of the second half"
_APART = (_SKIPS, _UNUSED_SKIPS, "blocks.{l}.lambdas", "blocks.{l}.attn.lambdas")

TO_MEDIUM: dict[str, Table] = {
    "small": (*_MATRICES, *_same(["scalars"])),
    "small_2025_02": (*_MATRICES, (_APART, "scalars", Scalars())),
    "medium": _same(MEDIUM),
}
"""From the layout of each variant to that of medium, which our GPTBatched has; what it computes stays the variant's."""


def completed(tensors: Mapping[str, View], variant: str, n_layer: int) -> dict[str, tuple[View, str]]:
    """Make the tensors that a table of TO_MEDIUM needs and a model lacks, each with a description in words.

    A tail of padded scalars is cut. The half of the skip weights that a U-net does not have gets ones, and a layer
    without attention the scalars that attention starts with: neither is read.
    """
    made = {}
    if "scalars" in tensors and (found := tensors["scalars"].shape[0]) > 5 * n_layer:
        cropped = slice_axis(tensors["scalars"], 0, 0, 5 * n_layer)
        made["scalars"] = (cropped, f"crop {found} scalars, padded for several ranks, to {5 * n_layer}")
    if variant == "small_2025_02":
        dtype = tensors[_SKIPS].dtype
        made[_UNUSED_SKIPS] = (filled(dtype, (n_layer // 2,), 1.0), "ones, which nothing reads")
        without = f"blocks.{WITHOUT_ATTENTION}.attn.lambdas"
        if n_layer > WITHOUT_ATTENTION and without not in tensors:
            made[without] = (filled(dtype, (2,), 0.5), "halves, which nothing reads")
    return made
