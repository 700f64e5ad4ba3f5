"""Before a result is published: whether its readers would take it for the model that was converted."""

from __future__ import annotations

from pathlib import Path

from ..console.words import listed
from ..errors import CheckpointError, CheckpointMismatch
from ..families.choices import FLAGS
from ..inspection.inspect import Inspection, inspect_path
from ..inspection.marks import choices
from .plan import Plan

_WITH_MEANING = ("bundle", "hf", "nanogpt", "megatron", "litgpt")
"""Formats that record what a model computes; the others hold tensors of any names."""


def check_meaning(plan: Plan, place: Path) -> None:
    """Read the headers of a result as its readers do, and compare what it says it computes with the plan.

    Raises: CheckpointMismatch with each choice, tensor or part that they would take for another.
    """
    if plan.format not in _WITH_MEANING:
        return
    try:
        with inspect_path(place) as found:
            faults = found.contradictions if found.bundle is not None else []
            faults = faults or [*found.identity.conflicts, *found.lacks, *_other_choices(plan, found)]
    except CheckpointError as error:
        faults = [str(error)]
    if faults:
        told = [fault.replace(str(place), str(plan.target)).removesuffix(".") for fault in faults]
        raise CheckpointMismatch(
            f"{plan.target}: the result would not be read as the model it was made from: {listed(told, 5)}. "
            "Nothing was published."
        )


def _other_choices(plan: Plan, found: Inspection) -> list[str]:
    """Choices that the result shows otherwise than the source did."""
    read = {choice.name: choice for choice in choices(found)}
    return [
        f"{choice.label} is {read[choice.name].value} in it ({read[choice.name].origin}), and was {choice}"
        for choice in plan.model.choices
        if choice.name in FLAGS and choice.name in read and read[choice.name].value != choice.value
    ]
