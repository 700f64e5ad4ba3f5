"""Open a checkpoint of any program for conversion: its tensors as views, its config, and the files beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.contradictions import contradictions
from ..bundle.training_state import TrainingState
from ..console.words import listed, listed_names
from ..containers.plain import plain
from ..containers.spec import TensorSpec
from ..containers.steps import number_of
from ..containers.tensors.views import stored
from ..errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from ..families.architecture import Architecture
from ..families.choices import Choice
from ..families.identify import FAMILIES, UNKNOWN, Identity
from ..families.megatron_iteration import is_iteration
from ..families.parts import OPTIMIZER, aside
from ..inspection.inspect import Inspection, identity_of, inspect_path
from ..inspection.marks import choices, marks_of
from .aside import CONFIG_ENTRY
from .moments import SORTED, moments_of
from .pairs import megatron_source
from .pairs.modded import BATCHED
from .plan import Options, Source
from .run import Run, missing, run_of
from .sharded import REASONS, is_sharded, open_sharded

FAMILY = {
    name: family for family in reversed(FAMILIES) for name in (family.name, *(style.name for style in family.styles))
}
"""Families by name, and by the names of their styles; of several with one name the first, which conversions write."""
FAMILY[BATCHED] = FAMILY["modded_medium"]

_NO_LOSS = 1e9
"""nanoGPT's best loss before the first evaluation."""


_SHOWN = {"learning_rate": "lr", "weight_decay": "weight_decay"}
"""Settings of a run that an optimizer state shows, and their names in its groups."""


def open_model(path: Path, held: ExitStack, *, needs_family: bool = True, options: Options | None = None) -> Source:
    """Open the checkpoint at a path; its files stay open until `held` is closed.

    Without `needs_family`, tensors of any names are accepted unchanged.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointError when it cannot be read or names more than data;
        CheckpointMismatch when its tensors are not a complete model of a known program.
    """
    sharded = options is not None and is_sharded(path)
    found = held.enter_context(open_sharded(path, options) if sharded and options else inspect_path(path))
    if found.damage:
        raise CheckpointDamaged(found.damage[0])
    if found.bundle is not None and options is not None and options.more.get("save_ema"):
        _take_average(found, found.bundle)
    megatron_source.refuse_classic(found.container)
    if found.partial:
        raise CheckpointMismatch(f"{path}: {found.partial}")
    if found.container.foreign and not is_iteration(found.container):
        raise CheckpointError(
            f"{path}: its pickle names {', '.join(found.container.foreign[:3])}. Nothing was executed, and nothing is "
            "converted; inspect_model.py shows its tensors and plain values."
        )
    given = options.choices if options is not None else {}
    config = _config(found)
    identity = identity_of(found.weights, config, found.container)
    if needs_family and "n_head" in given:
        config, identity = _with_heads(found, config, identity, given["n_head"])
    if identity.family == UNKNOWN or identity.unplaced or identity.missing:
        if needs_family:
            raise _unfit(path, identity)
        return _bare(found, path, config, identity, None if sharded else options)
    said = []
    if identity.conflicts:
        said = megatron_source.conflicts_said(identity, identity_of(found.weights, None, found.container))
    if identity.conflicts and needs_family and not said:
        raise CheckpointMismatch(
            f"{path}: {listed(identity.conflicts, 3)}. Correct the config, or name another source."
        )
    found.identity, found.config = identity, config
    made = choices(found, given)
    if needs_family:
        _refuse_contradicted(path, made, given, marks_of(found).place)
    model = _model(found, path, identity, config, made)
    model.notes += said
    if needs_family:
        megatron_source.refuse_mixed(model)
    else:
        model.notes += _contradictions(found, identity)
    megatron_source.drop_extra_states(model, found.key)
    return model


def _with_heads(
    found: Inspection, config: dict[str, Any], identity: Identity, heads: int
) -> tuple[dict[str, Any], Identity]:
    """The config and the identity of a model with a number of heads that a person specified.

    Raises: CheckpointMismatch when the tensors or the config have another number, or cannot have this one.
    """
    shape = identity.architecture
    if shape is None:
        return config, identity
    is_exported = identity.family.startswith("megatron_")  # its config is what the export was told
    if shape.n_head is not None and not (is_exported and "n_head" in shape.from_config):
        if shape.n_head == heads:
            return config, identity
        whose = "its config" if "n_head" in shape.from_config else "its tensors"
        raise CheckpointMismatch(f"{found.path}: --n_head is {heads}, but {whose} has {shape.n_head}. Leave it out.")
    fields = {"num_attention_heads" if is_exported else "n_head": heads}
    width = next((s.shape[-1] for n, s in found.weights.items() if n.endswith(".linear_proj.weight")), shape.n_embd)
    if not width or width % heads:
        raise CheckpointMismatch(f"{found.path}: --n_head is {heads}, which does not divide the width {width}.")
    if is_exported:
        fields["kv_channels"] = width // heads
    config = {**config, **fields}
    return config, identity_of(found.weights, config, found.container)


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


def _unfit(path: Path, identity: Identity) -> CheckpointMismatch:
    if identity.family == UNKNOWN:
        reason = identity.reason
    else:
        faults = [f"{name} is missing" for name in identity.missing]
        faults += [f"{name} has no place" for name in identity.unplaced]
        reason = f"{identity.program}, but {listed(faults, 5)}"
    return CheckpointMismatch(f"{path}: {reason}. --to safetensors and --to pt take tensors of any names.")


def _config(found: Inspection) -> dict[str, Any]:
    """The config of the model as its program wrote it."""
    if found.bundle is not None:
        made = found.bundle.config
        return found.bundle.config_values if made is None else made.to_dict()
    content = found.container.content if isinstance(found.container.content, Mapping) else {}
    entry = CONFIG_ENTRY.get(found.identity.family, "")
    if isinstance(content.get(entry), dict):
        return {str(key): plain(value) for key, value in content[entry].items()}
    return dict(found.config or {})


def _contradictions(found: Inspection, identity: Identity) -> list[str]:
    """What inspect_model.py reports as contradictions, for targets that take tensors of any model."""
    if found.bundle is not None and found.bundle.config is not None:
        return [f"contradiction: {fault}" for fault in contradictions(found.bundle)]
    return [f"contradiction: {fault}" for fault in (*identity.conflicts, *found.lacks)]


def _bare(found: Inspection, path: Path, config: dict[str, Any], identity: Identity, options: Options | None) -> Source:
    """Make a source of an unknown model, with its tensors unchanged; an optimizer goes along if `options` ask for it.

    Without `options` whatever stands beside the model is left to `take_parts`.

    Raises: CheckpointMismatch for a model of a known family that lacks tensors. Where more are missing than there are,
    it is no model but a selection of tensors under a family's names, which is kept.
    """
    if identity.family != UNKNOWN and 0 < len(identity.missing) < len(identity.places):
        raise CheckpointMismatch(
            f"{path}: {identity.program}, but it lacks {len(identity.missing)} of its tensors: "
            f"{listed_names(identity.missing, 5)}. Name a checkpoint that has them all."
        )
    tensors = {name: stored(found.container, spec) for name, spec in found.weights.items()}
    model = Source(path, found.container, UNKNOWN, tensors, config, {}, step=found.step, program="an unknown program")
    model.sources = dict(tensors)
    model.notes += [*found.chosen, *_contradictions(found, identity)]
    used = {spec.name for spec in found.weights.values()}
    others = [name for name in found.container.tensors if name not in used]
    kinds = aside(found.container.tensors, found.container.content)
    for name in others if options is not None and not is_iteration(found.container) else ():
        view = stored(found.container, found.container.tensors[name])
        if options and options.include_optimizer and kinds.get(name) is OPTIMIZER:
            model.along[name] = view
        else:
            model.dropped[name] = REASONS.get(kinds.get(name, ()), "not a weight of the model")
            model.sources.setdefault(name, view)
    return model


def _model(found: Inspection, path: Path, identity: Identity, config: dict[str, Any], made: list[Choice]) -> Source:
    assert identity.architecture is not None
    tensors = {}
    dropped = {}
    for name, spec in found.weights.items():
        if name in identity.buffers:
            dropped[spec.name] = identity.buffers[name]
        elif name in identity.places:
            tensors[identity.places[name]] = stored(found.container, spec)
        else:  # beside a whole model there is only that
            dropped[spec.name] = "of an optimizer"
    bundle = found.bundle
    model = Source(
        path=path,
        container=found.container,
        family=_family_of(identity, config),
        tensors=tensors,
        config=config,
        sizes=_sizes(identity.architecture),
        tokenizer=found.tokenizer,
        step=found.step,
        state=bundle.state if bundle is not None else TrainingState(),
        sources=dict(tensors),
        family_of_source=_family_of(identity, config),
        dropped=dropped,
        program=identity.program,
        choices=made,
    )
    model.notes += found.chosen
    if bundle is not None:
        model.state = model.state.having(**_rounded(bundle))
    elif identity.family == "nanogpt":
        model.state = model.state.having(**_best(found))
    if isinstance(found.optimizer, list) and found.optimizer:
        model.notes.append(f"its {len(found.optimizer)} optimizer states are left out: only one can be included")
    elif found.optimizer:
        model.moments = moments_of(found, identity, model, FAMILY[model.family])
    if bundle is None:
        model.run = _run_of(found, model)
    return model


def _run_of(found: Inspection, model: Source) -> Run | None:
    """How the run of another program trained, as far as its file shows it; None where it has nothing of a run."""
    content = found.container.content if isinstance(found.container.content, Mapping) else {}
    config = content.get("config")
    group = model.moments.groups[0] if model.moments is not None and model.moments.groups else {}
    if model.family == "nanogpt" and isinstance(config, Mapping) and {"learning_rate", "decay_lr"} & config.keys():
        values = {str(name): plain(value) for name, value in config.items()}
        is_old = model.moments is not None and model.moments.order == SORTED
        has_moments = model.moments is not None
        return run_of(values, found.step or 0, group.get("lr"), has_moments=has_moments, is_old=is_old)
    if model.moments is None:
        return None
    shown = {ours: group[theirs] for ours, theirs in _SHOWN.items() if isinstance(group.get(theirs), float)}
    run = Run({name: value for name, value in shown.items() if math.isfinite(value) and value >= 0})
    run.notes = missing(run)
    return run


def _family_of(identity: Identity, config: Mapping[str, Any]) -> str:
    """The family; for a GPTBatched it follows from the config, because its tensors have medium's layout."""
    return BATCHED if config.get("model_class") == "GPTBatched" else identity.family


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
