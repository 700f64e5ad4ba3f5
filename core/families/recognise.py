"""Recognise a family by the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterable

from . import gpt, lecture
from .fused import Plan, make_plan, plain_names

FUSED, LECTURE = "fused", "lecture"


def recognise(names: Iterable[str]) -> Plan:
    """Plan how the tensors of a GPT of any of our generations become those of the model.

    Raises: CheckpointMismatch when two names mean one tensor.
    """
    names = list(names)
    if any(".sa.heads." in name for name in plain_names(names)):
        return make_plan(LECTURE, lecture.TENSORS, lecture.DROPPED, names)
    return make_plan(FUSED, {name: name for name in gpt.TENSORS}, gpt.DROPPED, names)
