"""modded-nanogpt: the layouts of its versions, and that of our GPTBatched, which is medium's."""

from __future__ import annotations

from typing import Any

from ...config.modded import ModdedConfig
from ...families.modded import TO_MEDIUM, completed
from ..plan import Options, Pair, Source

BATCHED = "batched"
"""Our GPTBatched: its tensors are laid out as medium's, and its config names the variant."""


def to_batched(model: Source, options: Options) -> dict[str, Any]:
    """Make the config of a GPTBatched; padded scalars are cropped, and tensors that no layer reads are filled in."""
    variant = model.family.removeprefix("modded_")
    for name, (view, rule) in completed(model.tensors, variant, model.sizes["n_layer"]).items():
        model.replace(name, view, rule)
    model.moments = None  # its two optimizers are not ours: train.py reads them from the file itself
    given = model.config if model.config.get("variant") == variant else {}
    sizes = {name: model.sizes[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size", "head_rows")}
    config = ModdedConfig.from_dict({**given, "variant": variant, **sizes}, str(model.path))
    return config.to_dict("GPTBatched")


PAIRS = tuple(Pair(f"modded_{name}", BATCHED, table, to_ours=to_batched) for name, table in TO_MEDIUM.items())
