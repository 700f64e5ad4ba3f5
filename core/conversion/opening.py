"""Open a checkpoint of any program for conversion: its tensors as views, its config, and the files beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..bundle.also import also_kinds
from ..bundle.bundle import Bundle
from ..bundle.training_state import TrainingState
from ..console.commands import typed
from ..console.words import listed, listed_names, on_one_side
from ..containers.pickles.foreign import attributes
from ..containers.plain import plain
from ..containers.spec import TensorSpec
from ..containers.steps import number_of
from ..containers.tensors.views import stored
from ..errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from ..families.architecture import Architecture
from ..families.choices import Choice
from ..families.identify import FAMILIES, UNKNOWN, Identity
from ..families.megatron_iteration import is_iteration
from ..inspection.inspect import Inspection, identity_of, inspect_path
from ..inspection.marks import choices, config_of, marks_of
from .moments import SORTED, moments_of
from .pairs import megatron_source
from .pairs.modded import BATCHED
from .plan import Options, Source
from .records import records_left_out, refuse_modules
from .run import OF_NANOGPT, Run, in_nanogpts_words, missing, run_of
from .sharded import is_sharded, open_sharded

FAMILY = {
    name: family for family in reversed(FAMILIES) for name in (family.name, *(style.name for style in family.styles))
}
"""Families by name, and by the names of their styles; of several with one name the first, which conversions write."""
FAMILY[BATCHED] = FAMILY["modded_medium"]

_NO_LOSS = 1e9
"""nanoGPT's best loss before the first evaluation."""

_SHOWN = {"learning_rate": "lr", "weight_decay": "weight_decay"}
"""Settings of a run that an optimizer state shows, and their names in its groups."""


def open_model(path: Path, held: ExitStack, options: Options, *, needs_family: bool) -> Source:
    """Open the checkpoint at a path; its files stay open until `held` is closed.

    Without `needs_family`, tensors of any names are accepted unchanged.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointError when it cannot be read or names more than data;
        CheckpointMismatch when its tensors are not a complete model of a known program.
    """
    found = held.enter_context(open_sharded(path, options) if is_sharded(path) else inspect_path(path))
    _refuse_unreadable(path, found)
    if found.bundle is not None and needs_family:
        found.bundle.refuse_partial()
    if found.bundle is not None and options.more.get("save_ema"):
        _take_average(found, found.bundle)
    left_out = [] if is_iteration(found.container) else records_left_out(found)
    found.config = _config(found)
    found.identity = identity_of(found.weights, found.config, found.container)
    if needs_family and "n_head" in options.choices:
        _set_heads(found, options.choices["n_head"])
    identity = found.identity
    if identity.family == UNKNOWN or identity.unplaced or identity.missing:
        refuse_modules(found)
        if needs_family:
            raise _unfit(path, identity)
        bare = _bare(path, found)
        bare.notes += left_out
        return bare
    overridden = _overridden(path, found, needs_family)
    made = choices(found, options.choices)
    if needs_family:
        _refuse_contradicted(path, made, options.choices, marks_of(found).place)
    model = _model(path, found, made)
    model.notes += [*overridden, *left_out, *_also_left(found)]
    if needs_family:
        megatron_source.refuse_mixed(model)
    else:
        model.notes += [f"contradiction: {fault}" for fault in found.contradictions]
    megatron_source.drop_extra_states(model, found.key)
    return model


def _refuse_unreadable(path: Path, found: Inspection) -> None:
    """Refuse a checkpoint that is damaged, is only a part of a model, or has a pickle that names more than data."""
    if found.damage:
        raise CheckpointDamaged(found.damage[0])
    megatron_source.refuse_classic(found.container)
    if found.partial:
        raise CheckpointMismatch(f"{path}: {found.partial}")
    acting = [call for call in found.container.foreign if not getattr(call, "is_record", False)]
    if acting and not is_iteration(found.container):
        raise CheckpointError(
            f"{path}: its pickle names {', '.join(acting[:3])}. Nothing was executed, and nothing is "
            f"converted; {typed('inspect_model.py')} shows its tensors and plain values."
        )


def _set_heads(found: Inspection, heads: int) -> None:
    """Give a model the number of heads that a person specified.

    Raises: CheckpointMismatch when the tensors or the config have another number, or cannot have this one.
    """
    shape = found.identity.architecture
    if shape is None:
        return
    is_exported = found.identity.family.startswith("megatron_")  # its config is what the export was told
    if shape.n_head is not None and not (is_exported and "n_head" in shape.from_config):
        if shape.n_head != heads:
            whose = "its config has" if "n_head" in shape.from_config else "its tensors have"
            raise CheckpointMismatch(f"{found.path}: --n_head is {heads}, but {whose} {shape.n_head}. Leave it out.")
        return
    width = next((s.shape[-1] for n, s in found.weights.items() if n.endswith(".linear_proj.weight")), shape.n_embd)
    if not width or width % heads:
        raise CheckpointMismatch(f"{found.path}: --n_head is {heads}, which does not divide the width {width}.")
    fields = {"num_attention_heads": heads, "kv_channels": width // heads} if is_exported else {"n_head": heads}
    found.config = {**(found.config or {}), **fields}
    found.identity = identity_of(found.weights, found.config, found.container)


def _overridden(path: Path, found: Inspection, needs_family: bool) -> list[str]:
    """What the config says otherwise than the tensors, where the tensors win.

    Raises: CheckpointMismatch when none of them does, and a model of a known program is needed.
    """
    conflicts = found.identity.conflicts
    if not conflicts:
        return []
    said = megatron_source.conflicts_said(found.identity, identity_of(found.weights, None, found.container))
    if needs_family and not said:
        raise CheckpointMismatch(f"{path}: {listed(conflicts, 3)}. Correct the config, or name another source.")
    return said


def _refuse_contradicted(path: Path, made: list[Choice], given: Mapping[str, Any], place: str) -> None:
    """Refuse flags that a config contradicts, and those of choices that the model does not have."""
    for choice in made:
        if choice.name in given and choice.value != given[choice.name]:
            raise CheckpointMismatch(
                f"{path}: --{choice.name} is {given[choice.name]}, but {place or 'its config'} has {choice.value}. "
                "Leave it out."
            )
    if lost := [name for name in given if name not in {choice.name for choice in made}]:
        raise CheckpointMismatch(f"{path}: --{lost[0]} has no effect on a model of this family. Leave it out.")


def _take_average(found: Inspection, bundle: Bundle) -> None:
    """Replace the weights of a bundle by their average; the moments belong to the weights, and are left out.

    Raises: CheckpointNotFound when it has none.
    """
    found.bundle = bundle.averaged()
    found.weights, found.key, found.optimizer = found.bundle.weights.tensors, "ema.", None
    found.chosen = [*found.chosen, "the average of the weights (ema.pt); the weights and their optimizer are left out"]


def _also_left(found: Inspection) -> list[str]:
    """What is said of the other objects whose states a step has, and of frozen tensors that it does not have."""
    if found.bundle is not None and (frozen := found.bundle.state.frozen):
        return [f"WARNING: only what was trained is here; {len(frozen)} frozen tensors of its base are not"]
    kinds = also_kinds(found.bundle) if found.bundle is not None else {}
    names = ", ".join(kinds)
    return [f"also.pt is left out ({names}): it belongs to the loop that saved it"] if kinds else []


def _unfit(path: Path, identity: Identity) -> CheckpointMismatch:
    if identity.family == UNKNOWN:
        reason = identity.reason
    else:
        reason = f"{identity.program}, but {'; '.join(on_one_side(identity.missing, identity.unplaced))}"
    return CheckpointMismatch(f"{path}: {reason}. --to safetensors and --to pt take tensors of any names.")


def _config(found: Inspection) -> dict[str, Any]:
    """The config of the model as its program wrote it."""
    if found.bundle is not None and not found.bundle.state.frozen:
        made = found.bundle.config
        return found.bundle.config_values if made is None else made.to_dict()
    return config_of(found)[1]


def _bare(path: Path, found: Inspection) -> Source:
    """Make a source of an unknown model, with its tensors unchanged; what stands beside it is left to `take_parts`.

    Raises: CheckpointMismatch for a model of a known family that lacks tensors. Where more are missing than there are,
    it is no model but a selection of tensors under a family's names, which is kept.
    """
    identity = found.identity
    if identity.family != UNKNOWN and 0 < len(identity.missing) < len(identity.places):
        raise CheckpointMismatch(
            f"{path}: {identity.program}, but it lacks {len(identity.missing)} of its tensors: "
            f"{listed_names(identity.missing, 5)}. Name a checkpoint that has them all."
        )
    tensors = {name: stored(found.container, spec) for name, spec in found.weights.items()}
    return Source(
        path=path,
        container=found.container,
        family=UNKNOWN,
        tensors=tensors,
        config=found.config or {},
        sizes={},
        step=found.step,
        sources=dict(tensors),
        program="an unknown program",
        notes=[*found.chosen, *(f"contradiction: {fault}" for fault in found.contradictions), *_also_left(found)],
    )


def _model(path: Path, found: Inspection, made: list[Choice]) -> Source:
    """Make a source of a model of a known family, with its optimizer state and what is recorded of its run."""
    identity, config, bundle = found.identity, found.config or {}, found.bundle
    assert identity.architecture is not None
    tensors, dropped = {}, {}
    for name, spec in found.weights.items():
        if name in identity.places:
            tensors[identity.places[name]] = stored(found.container, spec)
        else:  # beside a whole model there are only buffers and an optimizer
            dropped[spec.name] = identity.buffers.get(name, "of an optimizer")
    # a GPTBatched is known by its config, because its tensors have medium's layout
    family = BATCHED if config.get("model_class") == "GPTBatched" else identity.family
    model = Source(
        path=path,
        container=found.container,
        family=family,
        tensors=tensors,
        config=config,
        sizes=_sizes(identity.architecture),
        biases=identity.architecture.biases,
        tokenizer=found.tokenizer,
        step=found.step,
        state=bundle.state.having(**_rounded(bundle)) if bundle is not None else TrainingState(),
        sources=dict(tensors),
        family_of_source=family,
        dropped=dropped,
        program=identity.program,
        choices=made,
        notes=list(found.chosen),
    )
    if bundle is None and identity.family in OF_NANOGPT:
        model.state = model.state.having(**_best(found))
    if isinstance(found.optimizer, list) and found.optimizer:
        model.notes.append(f"its {len(found.optimizer)} optimizer states are left out: only one can be included")
    elif found.optimizer:
        model.moments = moments_of(found, identity, model, FAMILY[model.family])
    if bundle is None:
        model.run = _run_of(found, model)
        model.notes += _position(found)
    return model


def _position(found: Inspection) -> list[str]:
    """Where in its data a run of transformers' Trainer was: a bundle has no place for it."""
    content = found.container.content if isinstance(found.container.content, Mapping) else {}
    state = content.get("trainer_state")
    epoch = state.get("epoch") if isinstance(state, Mapping) else None
    if not isinstance(epoch, (int, float)):
        return []
    anew = typed("train.py draws batches of its own")
    return [f"its position in the data is epoch {epoch:g} (trainer_state.json); {anew}"]


def _run_of(found: Inspection, model: Source) -> Run | None:
    """How the run of another program trained, as far as its file shows it; None where it has nothing of a run."""
    content = found.container.content if isinstance(found.container.content, Mapping) else {}
    config = attributes(content.get("config"))
    group = model.moments.groups[0] if model.moments is not None and model.moments.groups else {}
    if model.family in OF_NANOGPT and config is not None and {"learning_rate", "decay_lr"} & config.keys():
        values = {str(name): plain(value) for name, value in config.items()}
        if model.family == "meta_llama":
            values = in_nanogpts_words(values, model.config)
        is_old = model.moments is not None and model.moments.order == SORTED
        has_moments = model.moments is not None
        return run_of(values, found.step or 0, group.get("lr"), has_moments=has_moments, is_old=is_old)
    if model.moments is None:
        return None
    shown = {ours: group[theirs] for ours, theirs in _SHOWN.items() if isinstance(group.get(theirs), float)}
    run = Run({name: value for name, value in shown.items() if math.isfinite(value) and value >= 0})
    run.notes = missing(run)
    return run


def _rounded(bundle: Bundle) -> dict[str, Any]:
    """The dtype to which old writers rounded the weights for the file, as recorded beside them."""
    content = bundle.weights.source.header.content
    beside = content if isinstance(content, dict) and bundle.weights.key else {}
    said = {"checkpoint_dtype": beside.get("checkpoint_dtype"), "model_dtype_at_save": beside.get("model_dtype")}
    return {name: value for name, value in said.items() if isinstance(value, str)}


def _best(found: Inspection) -> dict[str, Any]:
    """nanoGPT's best loss, recorded under the step of the file, since the step of its measurement is unknown."""
    value = found.container.content.get("best_val_loss")
    if isinstance(value, TensorSpec) and value.numel == 1:
        value = number_of(found.container, value)
    if not isinstance(value, float) or not math.isfinite(value) or value >= _NO_LOSS:
        return {}
    return {"val_loss": value, "best": {"step": found.step or 0, "val_loss": value}}


def _sizes(shape: Architecture) -> dict[str, int]:
    """The sizes of a model by the words of the tables."""
    words = ("n_layer", "n_head", "n_kv_head", "head_size", "n_embd", "n_ffn", "vocab_size", "head_rows", "block_size")
    sizes = {word: value for word in words if (value := getattr(shape, word)) is not None}
    if {"n_head", "n_kv_head", "head_size"} <= sizes.keys():
        sizes["q_size"] = sizes["n_head"] * sizes["head_size"]
        sizes["kv_size"] = sizes["n_kv_head"] * sizes["head_size"]
    return sizes
