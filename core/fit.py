"""Whether config, tokenizer, weights and optimizer state are of one model: told from headers, before any memory."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from core.bundle import OPTIMIZER, TOKENIZER, Bundle
from core.commit import CONFIG
from core.config import GPTConfig
from core.differences import listed
from core.errors import CheckpointMismatch
from core.families import gpt
from core.families.plan import Shape
from core.optimizer_state import rearrange
from core.part import once

MOST_PADDING = 128
"""Vocabularies are padded to a multiple of this at most."""

GPT2_IDS = 50257


def check_fit(bundle: Bundle) -> GPTConfig:
    """Compare a GPT's config, tokenizer and the headers of its weights and optimizer state; return the config.

    Raises: CheckpointMismatch listing every contradiction with the field and value that would fit, CheckpointError
    when a file names anything but data.
    """
    for part in (bundle.weights, bundle.optimizer):
        if part is not None:
            part.source.refuse_foreign()
    if bundle.config is None:
        raise CheckpointMismatch(
            f"{bundle.path(CONFIG)}: model_class is {bundle.config_values['model_class']!r}, expected GPT. "
            "Build that model yourself and fill it with CheckpointManager.load(model)."
        )
    faults = contradictions(bundle)
    if faults:
        raise CheckpointMismatch(f"{listed(faults)}.")
    return bundle.config


def contradictions(bundle: Bundle) -> list[str]:
    """Say where the parts of a GPT's checkpoint do not fit each other, each sentence with the file it is about."""
    config = bundle.config
    assert config is not None
    shapes = bundle.evidence.shapes
    weights = gpt.contradictions(config, shapes)
    faults = [f"{bundle.path(CONFIG)} does not fit {bundle.weights.source.path.name}: {weights[0]}"] if weights else []
    faults += weights[1:]
    if bundle.tokenizer is not None and (fault := _tokenizer_fault(bundle.tokenizer, config.vocab_size)):
        faults.append(
            f"{bundle.path(TOKENIZER)}: {fault} in {bundle.path(CONFIG)}. It is the tokenizer of another model"
        )
    if bundle.optimizer is not None and not weights:
        try:
            rearrange_optimizer(bundle, bundle.optimizer.content, shapes, _joined_shape)
        except CheckpointMismatch as error:
            faults.append(f"{bundle.path(OPTIMIZER)}: {str(error).removesuffix('.')}")
    return faults


def _tokenizer_fault(tokenizer: Mapping[str, Any], vocab_size: int) -> str | None:
    chars = tokenizer.get("chars")
    if isinstance(chars, list) and not len(chars) <= vocab_size < len(chars) + MOST_PADDING:
        return f"{len(chars)} characters, but vocab_size is {vocab_size}"
    if tokenizer.get("token_kind") == "gpt2" and vocab_size < GPT2_IDS:
        return f"gpt2 has {GPT2_IDS} ids, but vocab_size is {vocab_size}"
    return None


def rearrange_optimizer(bundle: Bundle, state: Any, shapes: Mapping[str, Shape], join: Any) -> dict[str, Any]:
    """Give an optimizer state of a bundle the parameters of the model; see `core.optimizer_state.rearrange`.

    Raises: CheckpointMismatch.
    """
    plan = bundle.evidence.plan
    tensors = bundle.weights.tensors
    order = {name: shape for name, shape in once(tensors).items() if name not in plan.dropped}
    assert bundle.config is not None
    tied = {"lm_head.weight"} if bundle.config.tied_head else set()
    ours = [name for name in gpt.shapes(bundle.config) if name in shapes and name not in tied]
    return rearrange(state, plan, order, ours, join)


def _joined_shape(parts: list[Any]) -> Any:
    first = parts[0].shape
    return SimpleNamespace(shape=(sum(part.shape[0] for part in parts), *first[1:]))
