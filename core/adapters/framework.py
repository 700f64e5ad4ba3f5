"""What the adapters have in common: their frameworks, which may be missing, and steps of another trainer."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle.bundle import ALSO, Bundle
from ..bundle.storage import DISK
from ..console.commands import typed
from ..errors import CheckpointMismatch, InputError
from ..networks.marked import ObjectState, RankStates, unmarked

SAVED_BY = "saved_by"
"""The entry of a step's `extra` in which an adapter says who it is."""


def framework(name: str) -> Any:
    """Import a package that nothing but its adapter needs.

    Raises: InputError with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"The adapter for {name} needs it ({error}): pip install {name.partition('.')[0]}") from error


def refuse_others(bundle: Bundle, name: str, instead: str) -> None:
    """Refuse a step that another trainer saved: how far this one had come is not in it.

    Raises: CheckpointMismatch saying who saved the step, and what to do.
    """
    extra = bundle.state.extra
    said = extra.get(SAVED_BY) if isinstance(extra, Mapping) else None
    if said != name:
        by = str(said)[:80] if said else typed("train.py or fit") if bundle.state.training else "a loop of one's own"
        raise CheckpointMismatch(
            f"{bundle.folder}: step {bundle.step} was saved by {by}, expected one of {name}: how far that had come is "
            f"not in it. Choose another name, or {instead}. Nothing was changed."
        )


def of_rank(marked: Any, rank: int) -> Any:
    """A state of also.pt as it was on a rank; the last one's, where there were fewer."""
    state = unmarked(marked, ALSO)
    if isinstance(state, RankStates):
        state = state.states[min(rank, len(state.states) - 1)]
    return state.state if isinstance(state, ObjectState) else state


def put_file(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    if not DISK.link(source, target):
        shutil.copyfile(source, target)
