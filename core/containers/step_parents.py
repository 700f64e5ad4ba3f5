"""Folders that hold one for each step: checkpoint-500 of the Trainer, step-1000, global_step_20 of verl, 0000002."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointNotFound
from .container import listing
from .pickles.inert import names_text

_STEP = re.compile(r"(?:(?:checkpoint|ckpt|step|global_step|iter|iteration)[-_]?)?(\d{1,18})")
_INNER = "actor"
"""Where verl has the model of a step; its critic lies beside it."""

NEWEST = "newest"
"""The step of the highest number."""


def model_within(folder: Path) -> Path:
    """The folder of the model in a step of verl, whose data.pt is the position in its data; else the folder itself."""
    inner = folder / _INNER
    return inner if inner.is_dir() else folder


def steps_below(folder: Path) -> dict[int, Path]:
    """The folders of steps in a folder by their numbers, in order; of two with one number the last by name."""
    found: dict[int, Path] = {}
    for name, size in listing(folder).items():
        if size is None and (match := _STEP.fullmatch(name)) and (folder / name).is_dir():
            found[int(match[1])] = model_within(folder / name)
    return dict(sorted(found.items()))


def step_in_name(folder: Path) -> int | None:
    """The step in the name of a step's folder, as verl records it nowhere else; None for a name of digits alone."""
    named = folder.parent if folder.name == _INNER else folder
    match = _STEP.fullmatch(named.name)
    return int(match[1]) if match and not named.name.isdecimal() else None


def one_step(folder: Path, step: int | str) -> Path:
    """The folder of a step, by its number or as the newest.

    Raises: CheckpointNotFound naming the steps that are there.
    """
    found = steps_below(folder)
    path = found.get(max(found, default=-1) if step == NEWEST else int(step))
    if path is None:
        there = f"it holds {names_text(list(map(str, found)), 8)}" if found else "it holds no folders of steps"
        raise CheckpointNotFound(f"{folder}: no step {step}; {there}.")
    return path


def steps_said(folder: Path) -> str:
    """A sentence about a folder that holds steps and is none itself; "" where it holds none."""
    found = steps_below(folder)
    if not found:
        return ""
    names = names_text(list(map(str, found)), 8)
    return (
        f"{folder}: no checkpoint itself; it holds the step{'s' * (len(found) != 1)} {names}. Add --step N or "
        f"--step {NEWEST}, or name the folder of one: {next(reversed(found.values()))}."
    )
