"""Bundles of GPTFlexAttention and GPTBatched: from an open bundle to a live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..bundle.bundle import TOKENIZER, Bundle
from ..bundle.commit import CONFIG
from ..bundle.tokenizer_state import describe
from ..config.modded import CLASSES, SpeedrunConfig
from ..console.words import differences, listed
from ..data.tokenizer import Tokenizer, tokenizer_from_state
from ..errors import CheckpointMismatch
from ..families.family import plain_names
from ..networks.batched import GPTBatched
from ..networks.device import resolve_device
from ..networks.flex import GPTFlexAttention
from ..networks.modded import SpeedrunGPT
from .tensors import read_part

MODELS: dict[str, type[GPTFlexAttention] | type[GPTBatched]] = dict(
    zip(CLASSES, (GPTFlexAttention, GPTBatched), strict=True)
)
"""The class that each `model_class` of a config.json means."""


def load_speedrun(
    bundle: Bundle,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    writable: bool = False,
    bpe_file: Path | None = None,
) -> GPTFlexAttention | GPTBatched:
    """Build the model of a bundle, its tokenizer and step set, in eval mode.

    The mapped tensors take the place of its own; `writable` copies them out of the file, as training needs.

    Raises: CheckpointMismatch when config, tokenizer and weights contradict each other, before anything is allocated.
    """
    where = str(bundle.path(CONFIG))
    kind = MODELS[bundle.config_values["model_class"]]
    config = SpeedrunConfig.from_dict(bundle.config_values, where)
    with torch.device("meta"):
        model = kind.of_config(config)
    refuse_other_shapes(bundle, model)
    tokenizer = _tokenizer(bundle, config, bpe_file)
    target = resolve_device(device or config.device, where)
    tensors = read_part(bundle.weights)
    if writable:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    model.to(device=target, dtype=dtype)
    model.requires_grad_(True)
    model.step, model.tokenizer = bundle.step, tokenizer
    return model.eval()


def fill_speedrun(bundle: Bundle, model: SpeedrunGPT) -> None:
    """Copy the weights of a bundle into a live model.

    Raises: CheckpointMismatch when names or shapes do not fit; the model is unchanged then.
    """
    refuse_other_shapes(bundle, model)
    model.load_state_dict(read_part(bundle.weights))


def refuse_other_shapes(bundle: Bundle, model: SpeedrunGPT) -> None:
    """Raise CheckpointMismatch when the header of a bundle's weights is not that of a model; nothing is allocated."""
    bundle.weights.source.refuse_foreign()
    shapes = bundle.weights.shapes
    found = {plain: shapes[name] for plain, name in plain_names(shapes).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tail = found.get("scalars", (0,))
    if len(tail) == 1 and tail > expected.get("scalars", tail):
        expected["scalars"] = tail  # padded for several ranks
    if faults := differences(expected, found):
        raise CheckpointMismatch(
            f"{bundle.path(CONFIG)} does not fit {bundle.weights.source.path.name}: {listed(faults)}."
        )


def _tokenizer(bundle: Bundle, config: SpeedrunConfig, bpe_file: Path | None) -> Tokenizer | None:
    if bundle.tokenizer is None:
        return None
    made = tokenizer_from_state(bundle.tokenizer, bpe_file, str(bundle.path(TOKENIZER)))
    refuse_large_tokenizer(made, config, str(bundle.path(TOKENIZER)))
    return made


def refuse_large_tokenizer(tokenizer: Tokenizer, config: SpeedrunConfig, where: str) -> None:
    """Raise CheckpointMismatch when a tokenizer has ids that a model lacks."""
    rows: Any = min(config.vocab_size, config.head_rows)
    if tokenizer.vocab_size > rows:
        raise CheckpointMismatch(
            f"{where}: {describe(tokenizer.state())}, but the model has {rows} rows. It is of another model."
        )
