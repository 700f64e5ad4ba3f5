"""What opens below a folder that is no checkpoint itself: a run of a trainer, a cache of the hub, a folder of runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..containers.open import SINGLE
from ..errors import CheckpointError
from .inspect import Facts, inspect_path

_DEEP = 4  # folders within each other: models--a--b/snapshots/<id> of the hub has three
_MOST_FOLDERS = 1000
_MOST = 200  # checkpoints that are listed


def checkpoints_below(root: Path) -> list[Facts]:
    """The facts of every checkpoint below a folder, by its path from there; within one of them none is looked for.

    None below a folder that holds files which may each be one: those are named instead.
    """
    found: list[Facts] = []
    if any(path.name.endswith(SINGLE) and path.is_file() for path in root.iterdir()):
        return found
    pending, looked = [(root, 0)], 0
    while pending and looked < _MOST_FOLDERS and len(found) < _MOST:
        folder, depth = pending.pop(0)
        looked += 1
        facts = foreign_facts(folder, str(folder.relative_to(root))) if depth else None
        if facts is not None:
            found.append(facts)
        elif depth < _DEEP:
            pending += [(inner, depth + 1) for inner in _folders(folder)]
    return found


def foreign_facts(folder: Path, name: str) -> Facts | None:
    """The line of a checkpoint of any program in a list; None for a folder that does not open."""
    try:
        with inspect_path(folder) as found:
            program = found.identity.program or "an unknown program"
            return {"name": name, "program": program, "step": found.step, "bytes": found.size}
    except (CheckpointError, OSError):
        return None


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, by name; links are not followed, and hidden ones are nobody's checkpoints."""
    try:
        with os.scandir(folder) as entries:
            names = [one.name for one in entries if one.is_dir(follow_symlinks=False) and not one.name.startswith(".")]
    except OSError:
        return []
    return [folder / name for name in sorted(names, key=_with_numbers)]


def _with_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts checkpoint-1000 behind checkpoint-500."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
