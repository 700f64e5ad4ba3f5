"""modded-nanogpt: the layouts of its versions, and that of our GPTBatched, which is medium's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...config.modded import ModdedConfig
from ...config.variants import VARIANTS, WITHOUT_ATTENTION
from ...containers.tensors.views import View, add_axis, cut, drop_axis, filled, join
from ...families.modded import EMBEDDINGS, MEDIUM
from ...families.rules import RENAME, Row, Sizes, Table
from ..plan import Model, Options, Pair

BATCHED = "batched"
"""Our GPTBatched: its tensors are laid out as medium's, and its config says the variant."""

HALF, UNUSED_SKIPS = 0.5, "skip weights of the second half"


@dataclass(frozen=True)
class Append:
    """The second of theirs becomes one more of the first's, along the first axis."""

    def __str__(self) -> str:
        return "append along 0"

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Append."""
        return [join([views[0], add_axis(views[1], 0)])]

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Take the last one off."""
        last = views[0].shape[0] - 1
        return [cut(views[0], 0, 0, last), drop_axis(cut(views[0], 0, last, last + 1), 0)]


@dataclass(frozen=True)
class Scalars:
    """A skip weight for each layer, then twice two numbers for each layer, one behind the other."""

    def __str__(self) -> str:
        return "concatenate skip weights, blends and mixes"

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Concatenate."""
        return [join(views)]

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Cut apart."""
        half, parts, at = sizes["n_layer"] // 2, [], 0
        for length in (half, half, *[2] * (2 * sizes["n_layer"])):
            parts.append(cut(views[0], 0, at, at + length))
            at += length
        return parts


def _same(names: Sequence[str]) -> tuple[Row, ...]:
    return tuple((name, name, RENAME) for name in names)


_MATRICES: tuple[Row, ...] = (
    *_same(list(EMBEDDINGS)),
    (("blocks.{i}.attn.qkv_w", "blocks.{i}.attn.c_proj.weight"), "blocks.{i}.attn.qkvo_w", Append()),
    ("blocks.{i}.mlp.c_fc.weight", "blocks.{i}.mlp.fc_w", RENAME),
    ("blocks.{i}.mlp.c_proj.weight", "blocks.{i}.mlp.proj_w", RENAME),
    ("lm_head.weight", "lm_head_w", RENAME),
)

SMALL: Table = (*_MATRICES, *_same(["scalars"]))

SMALL_2025_02: Table = (
    *_MATRICES,
    (
        ("skip_weights", UNUSED_SKIPS, "blocks.{l}.lambdas", "blocks.{l}.attn.lambdas"),
        "scalars",
        Scalars(),
    ),
)

TABLES: dict[str, Table] = {"small": SMALL, "small_2025_02": SMALL_2025_02, "medium": _same(list(MEDIUM))}


def to_batched(model: Model, options: Options) -> dict[str, Any]:
    """Make the config of a GPTBatched; a tail of padded scalars is cut, and what no layer reads is filled in."""
    variant = model.family.removeprefix("modded_")
    layers = model.sizes["n_layer"]
    if "scalars" in model.tensors and (found := model.tensors["scalars"].shape[0]) > 5 * layers:
        cropped = cut(model.tensors["scalars"], 0, 0, 5 * layers)
        model.replace("scalars", cropped, f"crop {found} scalars, padded for several ranks, to {5 * layers}")
    if variant == "small_2025_02":
        dtype = model.tensors["skip_weights"].dtype
        model.replace(UNUSED_SKIPS, filled(dtype, (layers // 2,), 1.0), "ones, which nothing reads")
        without = f"blocks.{WITHOUT_ATTENTION}.attn.lambdas"
        if layers > WITHOUT_ATTENTION and without not in model.tensors:
            model.replace(without, filled(dtype, (2,), HALF), "halves, which nothing reads")
    model.moments = None  # its two optimizers are not ours: train.py reads them from the file itself
    given = model.config if model.config.get("variant") == variant else {}
    sizes = {name: model.sizes[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size", "head_rows")}
    config = ModdedConfig.from_dict({**given, "variant": variant, **sizes}, str(model.path))
    return config.to_dict("GPTBatched")


PAIRS = tuple(Pair(f"modded_{name}", BATCHED, TABLES[name], to_ours=to_batched) for name in VARIANTS)
