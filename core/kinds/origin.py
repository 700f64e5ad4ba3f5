"""The checkpoint of another program that --init_from_checkpoint names: opened for training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..bundle.tokenizer_state import describe, same_vocabulary
from ..config.gpt import EDITABLE, GPTConfig
from ..conversion.plan import Options
from ..data.tokenizer import Tokenizer
from ..errors import CheckpointMismatch
from ..loading.modded import is_modded, load_flex_checkpoint
from ..loading.opened import open_gpt
from ..loading.optimizer import configure_optimizer
from ..model import GPT
from ..networks.device import resolve_device
from .kind import Origin, Request, Say, refuse_other_fields

POSITIONS = "position_embedding_table.weight"


def open_origin(path: Path, arch: str | None, options: Options | None = None, verify: bool = True) -> Origin:
    """Read the checkpoint that a new run starts from: of modded-nanogpt, or of any program that our GPT computes.

    Raises: CheckpointMismatch when it is of another kind than --arch; CheckpointNotFound, CheckpointDamaged, and as
        `open_gpt`.
    """
    if is_modded(path):
        model, _, content = load_flex_checkpoint(path)
        made = Origin(model, content, path)
    else:
        opened = open_gpt(path, options, device="cpu", tokenizer=False, training=True, verify=verify)
        notes = [f"of {opened.program}", *opened.notes]
        made = Origin(opened.model, opened.optimizer, path, opened.tokenizer, notes)
    if arch not in (None, made.arch):
        raise CheckpointMismatch(
            f"{path}: its tensors are those of --arch {made.arch}, this run has --arch {arch}. Another architecture "
            "computes something else from them; use the file's, or leave --arch out."
        )
    return made


def from_origin(origin: Origin, given: Mapping[str, Any], tokenizer: Tokenizer, say: Say) -> GPT:
    """Make a GPT at step 0 with the weights of an origin; of its positions the first `block_size`, where that is less.

    Raises: CheckpointMismatch when a given field, or the tokenizer, is not that of the weights.
    """
    assert isinstance(origin.model, GPT)
    theirs = origin.model.config
    cut = 0 < given.get("block_size", 0) < theirs.block_size
    free = (*EDITABLE, "block_size") if cut else EDITABLE
    refuse_other_fields(origin.path, theirs.architecture(), given, free)
    _refuse_tokenizer(origin, tokenizer)
    wishes = {name: given[name] for name in free if name in given}
    config = GPTConfig.from_dict({**theirs.to_dict(), **wishes}, str(origin.path))
    weights = origin.model.state_dict()
    if cut:
        say(f"block_size: the first {config.block_size} of the {theirs.block_size} positions of {origin.path}")
        if POSITIONS in weights:
            weights[POSITIONS] = weights[POSITIONS][: config.block_size].clone()
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)
    model.retie()
    model.tokenizer = tokenizer
    return model.to(resolve_device(config.device, str(origin.path))).train()


def _refuse_tokenizer(origin: Origin, tokenizer: Tokenizer) -> None:
    """Raise CheckpointMismatch for a tokenizer that is not the origin's; of one that is not known, the size decides."""
    mine = describe(tokenizer.state())
    if origin.tokenizer is not None:
        if not same_vocabulary(origin.tokenizer, tokenizer.state()):
            raise CheckpointMismatch(
                f"{origin.path}: the model was trained with {describe(origin.tokenizer)}; this run has {mine}. Leave "
                "--tokenization out, and train on text, or on tokens of its own tokenizer."
            )
        return
    rows, ids = origin.model.config.vocab_size, tokenizer.vocab_size
    if ids > rows or (ids < rows and tokenizer.kind in ("char", "symbols")):
        raise CheckpointMismatch(
            f"{origin.path}: no tokenizer with it; the model has {rows} ids, this run's tokenizer {ids} ({mine}). Name "
            "its tokenizer with --tokenization, or the text or dataset that it was trained on."
        )


def optimizer_of_origin(origin: Origin, model: GPT, request: Request, say: Say) -> torch.optim.AdamW:
    """Make AdamW with the moments of an origin, and report whether there are any that fit."""
    fresh = "its moments start from zero"
    if origin.content is None:
        say(f"optimizer state: none in {origin.path}; {fresh}")
    else:
        state = _first_positions(origin.content, model.config.block_size)
        try:
            made = configure_optimizer(model, request.learning_rate, request.weight_decay, state, say)
        except CheckpointMismatch as error:
            say(f"optimizer state: not used, {str(error).removeprefix('optimizer state: ')} So {fresh}.")
        else:
            say(f"optimizer state: used, for {len(state['state'])} parameters")
            return made
    return configure_optimizer(model, request.learning_rate, request.weight_decay)


def _first_positions(state: dict[str, Any], positions: int) -> dict[str, Any]:
    """The state of an optimizer, of the table of positions only that of the first ones."""
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    if POSITIONS not in names:
        return state
    number = names.index(POSITIONS)
    entry = state["state"].get(number, {})
    cut = {key: value[:positions] if getattr(value, "ndim", 0) == 2 else value for key, value in entry.items()}
    return {**state, "state": {**state["state"], number: cut} if entry else state["state"]}
