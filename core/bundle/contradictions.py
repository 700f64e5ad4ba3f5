"""Whether config, tokenizer, weights and optimizer state belong to one model: decided from headers alone."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ..config.gpt import GPTConfig
from ..config.modded import CLASSES
from ..console.words import listed
from ..containers.torch_files.storages import TorchArchive
from ..errors import CheckpointDamaged, CheckpointMismatch
from ..families import gpt
from ..families.family import plain_names
from .bundle import OPTIMIZER, TOKENIZER, Bundle
from .commit import CONFIG, MODEL
from .evolution import QKV, Evidence, evolve
from .optimizer_state import rearrange, states_by_name
from .parts import once
from .verify import tensors_digest
from .vocabularies import VOCABULARIES

MOST_PADDING = 128
"""The largest number to whose multiples vocabularies are padded."""

GPT2_IDS = 50257

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""The dtypes that weights may have."""


def check_fit(bundle: Bundle, with_optimizer: bool = True, records: bool = False) -> GPTConfig:
    """Compare a GPT's config, tokenizer and the headers of its weights and optimizer state; return the config.

    Raises: CheckpointMismatch listing every contradiction with the field and value that would fit, CheckpointError
    when a file names anything but data; with `records`, values that nothing uses are let through.
    """
    bundle.weights.source.refuse_foreign(records)
    if bundle.optimizer is not None and with_optimizer:
        try:
            bundle.optimizer.source.refuse_foreign(records)
        except CheckpointDamaged:  # reported when it is loaded; a model computes without it
            with_optimizer = False
    if bundle.config is None:
        model_class, how = bundle.config_values["model_class"], "Build that model yourself and fill it with "
        how += "CheckpointManager.load(model)."
        if model_class in CLASSES:
            how = f"Train it with --arch flex_{bundle.config_values.get('variant')}."
        raise CheckpointMismatch(f"{bundle.path(CONFIG)}: model_class is {model_class!r}, expected GPT. {how}")
    faults = contradictions(bundle, with_optimizer)
    if faults:
        raise CheckpointMismatch(f"{listed(faults)}.")
    return bundle.config


def contradictions(bundle: Bundle, with_optimizer: bool = True) -> list[str]:
    """List where the parts of a GPT's checkpoint contradict each other, each sentence with the file it is about."""
    config = bundle.config
    assert config is not None
    shapes = bundle.evidence.shapes
    weights = gpt.contradictions(config, shapes) + _other_heads(bundle, config) + _other_types(bundle)
    if weights:
        other = "its weights" if bundle.single else bundle.weights.source.path.name
        weights[0] = f"{bundle.path(CONFIG)} does not fit {other}: {weights[0]}"
    faults = list(weights)
    if not weights:
        faults += _edits(bundle, config)
    if bundle.tokenizer is not None and (fault := tokenizer_fault(bundle.tokenizer, config.vocab_size)):
        faults.append(f"{bundle.path(TOKENIZER)}: {fault} in {bundle.path(CONFIG)}. It does not fit this model")
    known = _shown_by(bundle.evidence) if weights else config
    if bundle.optimizer is not None and with_optimizer and known is not None:
        try:
            rearrange_optimizer(bundle, bundle.optimizer.content, _joined_shape, known)
        except CheckpointMismatch as error:
            faults.append(f"{bundle.path(OPTIMIZER)}: {str(error).removesuffix('.')}")
    return faults


def _edits(bundle: Bundle, config: GPTConfig) -> list[str]:
    """Fields that decide the mathematics and differ from what was saved: equal shapes would compute something else.

    Where the weights were replaced since, the config may belong to the new ones.
    """
    recorded, found = bundle.state.architecture, config.architecture()
    header, saved = bundle.weights.source.header, bundle.state.files.get(MODEL, {})
    is_zip = isinstance(header, TorchArchive) and header.container == "zip"
    same = not is_zip or saved.get("tensors") == tensors_digest(header)
    if not isinstance(recorded, dict) or not same:
        return []
    return [
        f"{bundle.path(CONFIG)}: {name} is {found[name]}, step {bundle.step} was saved with {then}. Set it to {then}"
        for name, then in {**config.neutral, **recorded}.items()
        if name in found and found[name] != then
    ]


def _other_heads(bundle: Bundle, config: GPTConfig) -> list[str]:
    """Compare n_head with the heads that have tensors of their own; another number would compute something else."""
    heads = bundle.evidence.heads
    if heads in (None, config.n_head):
        return []
    rows = {shape[:1] for name, shape in bundle.evidence.shapes.items() if name.endswith(QKV)}
    remedy = f". Set n_head to {heads}" if rows == {(3 * config.n_embd,)} else ": it was saved incompletely"
    return [f"n_head is {config.n_head}, but the tensors have {heads} heads{remedy}"]


def _other_types(bundle: Bundle) -> list[str]:
    """Weights of a dtype that the model cannot compute in: integers, or 8 bits that need a scale."""
    used = {part for parts in bundle.evidence.plan.sources.values() for part in parts}
    wrong = {name: t.dtype for name, t in bundle.weights.tensors.items() if name in used and t.dtype not in DTYPES}
    return [f"{name} is {dtype}, expected {', '.join(DTYPES)}" for name, dtype in wrong.items()]


def tokenizer_fault(tokenizer: Mapping[str, Any], vocab_size: int) -> str | None:
    """Say why a tokenizer.json cannot be that of a model with so many rows; None where it can."""
    kind, chars = tokenizer.get("token_kind"), tokenizer.get("chars")
    if kind == "char" and isinstance(chars, list) and not fits_characters(len(chars), vocab_size):
        return f"{len(chars)} characters, but vocab_size is {vocab_size}"
    if kind == "symbols":
        size = tokenizer.get("vocab_size")
        fits = not isinstance(size, int) or fits_characters(size, vocab_size)
        return None if fits else f"{size} symbols, but vocab_size is {vocab_size}"
    if kind == "tiktoken" and (known := VOCABULARIES.get(str(tokenizer.get("vocabulary")))) and vocab_size < known.size:
        return f"{known.whose}'s {known.size} ids, but vocab_size is {vocab_size}"
    if kind == "gpt2" and vocab_size < GPT2_IDS:
        return f"gpt2 has {GPT2_IDS} ids, but vocab_size is {vocab_size}"
    return None


def fits_characters(characters: int, vocab_size: int) -> bool:
    """Whether a vocabulary has one row for each character, apart from padding to a multiple of 8 to 128."""
    return characters == vocab_size or (vocab_size % 8 == 0 and 0 < vocab_size - characters < MOST_PADDING)


def _shown_by(evidence: Evidence) -> GPTConfig | None:
    """The model that the tensors show without their config; None when they are not a complete model."""
    with contextlib.suppress(CheckpointMismatch):
        config = evolve({"n_head": 1}, evidence, "")
        return None if gpt.contradictions(config, evidence.shapes) else config
    return None


def rearrange_optimizer(bundle: Bundle, state: Any, join: Any, config: GPTConfig) -> dict[str, Any]:
    """Give the optimizer states of a bundle the parameters of the model; see `optimizer_state.rearrange`.

    Raises: CheckpointMismatch.
    """
    plan, shapes = bundle.evidence.plan, bundle.evidence.shapes
    tensors = bundle.weights.tensors
    order = {name: shape for name, shape in once(tensors).items() if name not in plan.dropped}
    tied = {"lm_head.weight"} if config.tied_head else set()
    names = plain_names(order)
    if config.tied_head and {"lm_head.weight", "token_embedding_table.weight"} <= names.keys():
        del order[names["lm_head.weight"]]  # one parameter, which was saved twice
    ours = [name for name in gpt.shapes(config) if name in shapes and name not in tied]
    states = {name: rearrange(one, plan, order, ours, join) for name, one in states_by_name(state).items()}
    return states if states.keys() != {""} else states[""]


def _joined_shape(parts: list[Any]) -> Any:
    first = parts[0].shape
    return SimpleNamespace(shape=(sum(part.shape[0] for part in parts), *first[1:]))
