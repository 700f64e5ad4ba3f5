"""Open a checkpoint of any program for conversion: its tensors as views, its config, and the files beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.optimizer_state import groups_of, names_in_order
from ..bundle.parts import once
from ..bundle.training_state import TrainingState
from ..console.words import listed
from ..containers.pickles.inert import Call, as_text
from ..containers.plain import plain
from ..containers.spec import TensorSpec
from ..containers.tensors.views import View, stored
from ..errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from ..families.architecture import Architecture
from ..families.identify import FAMILIES, UNKNOWN, Identity
from ..families.megatron_iteration import is_iteration
from ..inspection.inspect import Inspection, identity_of, inspect_path
from .pairs import megatron_source
from .pairs.modded import BATCHED
from .plan import Moments, Options, Source
from .sharded import is_sharded, open_sharded

FAMILY = {
    name: family for family in reversed(FAMILIES) for name in (family.name, *(style.name for style in family.styles))
}
"""Families by name, and by the names of their styles; of several with one name the first, which conversions write."""
FAMILY[BATCHED] = FAMILY["modded_medium"]

_NO_LOSS = 1e9
"""nanoGPT's best loss before the first evaluation."""

CONFIG_ENTRY = {"nanogpt": "model_args"}
"""The entry of a file that holds the model's config, even if other entries look like one."""


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
    megatron_source.take_heads(found, options or Options())
    if found.container.foreign and not is_iteration(found.container):
        raise CheckpointError(
            f"{path}: its pickle names {', '.join(found.container.foreign[:3])}. Nothing was executed, and nothing is "
            "converted; inspect_model.py shows its tensors and plain values."
        )
    config = _config(found)
    identity = identity_of(found.weights, config)
    if identity.family == UNKNOWN or identity.unplaced or identity.missing:
        if needs_family:
            raise _unfit(path, identity)
        return _bare(found, path, config)
    said = megatron_source.conflicts_said(identity, identity_of(found.weights, None)) if identity.conflicts else []
    if identity.conflicts and needs_family and not said:
        raise CheckpointMismatch(
            f"{path}: {listed(identity.conflicts, 3)}. Correct the config, or name another source."
        )
    model = _model(found, path, identity, config)
    model.notes += said
    if needs_family:
        megatron_source.refuse_mixed(model)
    megatron_source.drop_extra_states(model, found.key)
    return model


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


def _bare(found: Inspection, path: Path, config: dict[str, Any]) -> Source:
    """Make a source of an unknown model, with its tensors unchanged."""
    tensors = {name: stored(found.container, spec) for name, spec in found.weights.items()}
    model = Source(path, found.container, UNKNOWN, tensors, config, {}, step=found.step, program="an unknown program")
    model.sources = dict(tensors)
    return model


def _model(found: Inspection, path: Path, identity: Identity, config: dict[str, Any]) -> Source:
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
    )
    model.notes += found.chosen
    if bundle is not None:
        model.state = model.state.having(**_rounded(bundle))
    elif identity.family == "nanogpt":
        model.state = model.state.having(**_best(found))
    if isinstance(found.optimizer, list) and found.optimizer:
        model.notes.append(f"its {len(found.optimizer)} optimizer states are left out: only one can be included")
    elif found.optimizer:
        model.moments = _moments(found, identity, model)
    return model


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
        value = number(stored(found.container, value))
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


def _moments(found: Inspection, identity: Identity, model: Source) -> Moments | None:
    """The optimizer state by names of parameters; None, with a note, if it is of an unknown kind."""
    order = once({name: spec for name, spec in found.weights.items() if name not in identity.buffers})
    try:
        groups = groups_of(found.optimizer)
        names = iter(names_in_order(groups, order))
    except CheckpointMismatch as error:
        model.notes.append(f"its optimizer state is left out: {error}")
        return None
    made = Moments([], {}, {})
    for group in groups:
        mine = []
        for number in group["params"]:
            raw = next(names)
            name = identity.places.get(raw) or identity.places.get(_unwrapped(raw, identity.places), raw)
            mine.append(name)
            _take_entry(made, model, found, name, found.optimizer["state"].get(number, {}))
        rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        made.groups.append({**rest, "names": mine})
    return made


def _unwrapped(name: str, places: Mapping[str, str]) -> str:
    """The name in the file that ends with a recorded name."""
    return next((raw for raw in places if raw.endswith(f".{name}")), name)


def _take_entry(made: Moments, model: Source, found: Inspection, name: str, entry: Any) -> None:
    shape = model.tensors[name].shape if name in model.tensors else None
    for key, value in entry.items():
        if isinstance(value, TensorSpec):
            view = stored(found.container, value)
            if value.shape == shape and shape != ():
                made.views.setdefault(key, {})[name] = view
            else:
                made.others.setdefault(name, {})[key] = view
        elif isinstance(value, Call):
            raise CheckpointMismatch(f"{found.path}: its optimizer state has {as_text(value, 60)} for {name}.")
        else:
            made.others.setdefault(name, {})[key] = value


def number(view: View) -> float:
    """Read the only number of a tensor, and compare its checksum here: the proof covers only tensors of the target.

    Raises: CheckpointDamaged.
    """
    from ..containers.tensors.dtypes import decode
    from ..containers.tensors.reading import Gatherer
    from .proof import checks_of, compare_checksum

    for found in checks_of([view]):
        compare_checksum(*found)
    with Gatherer() as gatherer:
        return float(decode(b"".join(piece.tobytes() for piece in gatherer.pieces(view)), view.dtype)[0])
