"""--average: several checkpoints of one model, as a source whose tensors are their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from ..bundle.training_state import TrainingState
from ..config.gpt import EDITABLE
from ..console.words import listed, on_one_side
from ..containers.pickles.inert import as_text
from ..containers.tensors.averaged import AveragedTensors
from ..containers.tensors.reading import FLOATS, same_elements
from ..containers.tensors.views import View
from ..errors import CheckpointMismatch
from .plan import Source

_LIKE = ("data", "training", "schedule", "seed", "architecture")
"""Entries of training states that are kept where all sources have the same; others are of one step."""

_FREE = {*EDITABLE, "format_version", "_name_or_path", "transformers_version", "torch_dtype", "dtype"}
"""Entries of a config that change nothing of what is computed from the same tensors."""


def averaged(models: Sequence[Source], held: ExitStack) -> Source:
    """Combine models into one, each of whose tensors is the mean; only headers and whole numbers are read for it.

    What belongs to one step (moments, losses) is left out, and that is said.

    Raises: CheckpointMismatch naming two files and the tensor or setting in which they differ.
    """
    first = models[0]
    for other in models[1:]:
        _refuse_unlike(first, other)
    made = AveragedTensors(first.container, held)

    def mean(views: list[View]) -> View:
        is_averaged = views[0].blocks and views[0].dtype in FLOATS
        return made.put(views[0].names[0], views) if is_averaged else views[0]

    for sides in ([model.tensors for model in models], [model.sources for model in models]):
        sides[0].update({name: mean([side[name] for side in sides]) for name in sides[0]})
    how = f"mean of {len(models)}"
    first.rules = {name: how for name, view in first.tensors.items() if view.dtype in FLOATS} | first.rules
    paths = [model.path for model in models]
    notes = dict.fromkeys(note for model in models for note in model.notes)
    first.notes = [f"the average of {len(models)} checkpoints: {', '.join(map(str, paths))}", *notes]
    if any(model.moments is not None for model in models):
        first.notes.append("their optimizer states are left out: moments are of one step")
    steps = sorted({model.step for model in models if model.step is not None})
    if len(steps) > 1:
        first.notes.append(f"step {steps[-1]} is the last of theirs ({listed(list(map(str, steps)), separator=', ')})")
    first.state = _alike([model.state for model in models])
    first.container, first.averaged, first.step = made, paths, steps[-1] if steps else None
    first.moments = first.run = None
    return first


def _alike(states: Sequence[TrainingState]) -> TrainingState:
    """What all training states have of the entries that are not of one step."""
    first = states[0]
    alike = [name for name in _LIKE if name in first and all(state.get(name) == first[name] for state in states)]
    return TrainingState.from_dict({name: first[name] for name in alike})


def _refuse_unlike(first: Source, other: Source) -> None:
    """Refuse a model of another shape, or with other settings, than the first one."""
    what = f"{first.path} and {other.path}"
    if first.family != other.family:
        raise CheckpointMismatch(f"{what}: {first.program} and {other.program}, expected one model.")
    one, two = first.tensors, other.tensors
    faults = on_one_side([name for name in one if name not in two], [name for name in two if name not in one])
    faults += [
        f"{name} is {two[name].shape}, expected {view.shape}"
        for name, view in one.items()
        if name in two and two[name].shape != view.shape
    ]
    if faults:
        raise CheckpointMismatch(f"{what}: the second does not fit the first: {listed(faults, 3)}.")
    for name, view in first.tensors.items():
        theirs = other.tensors[name]
        if view.dtype != theirs.dtype:
            raise CheckpointMismatch(f"{what}: {name} is {view.dtype} and {theirs.dtype}, expected one dtype.")
        if view.dtype not in FLOATS and not same_elements(view, theirs):
            raise CheckpointMismatch(
                f"{what}: {name} ({view.dtype}) has other values. Only {', '.join(FLOATS)} are averaged; other tensors "
                "have to be equal."
            )
    settings = [{choice.label: choice.value for choice in model.choices} for model in (first, other)]
    for a, b in (settings, _configs(first, other)):
        if unlike := [name for name in {**a, **b} if a.get(name) != b.get(name)]:
            name = unlike[0]
            said = f"{as_text(name)} is {as_text(a.get(name), 60)} and {as_text(b.get(name), 60)}"
            raise CheckpointMismatch(f"{what}: {said}, expected one value.")
    if first.tokenizer != other.tokenizer:
        raise CheckpointMismatch(f"{what}: their tokenizers differ, expected one vocabulary.")


def _configs(*models: Source) -> list[Mapping[str, Any]]:
    """Their configs, without what changes nothing that is computed."""
    return [{name: value for name, value in model.config.items() if name not in _FREE} for model in models]
