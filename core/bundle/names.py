"""The names of models: their folders below a checkpoint root, and the files in these."""

from __future__ import annotations

import os
from pathlib import Path

from ..console.anchored import anchored
from ..console.words import listed_names
from ..errors import CheckpointNotFound, InputError

MODEL_FILES = ("config.json", "model.pt", "latest.pt", "final.pt", ".committed")
"""A folder that has one of these is a model's folder."""

_STEP = "step_"
"""The prefix of the names of kept steps."""


def model_folder(root: str | Path, name: str) -> Path:
    """The folder of a model of this name below a checkpoint root, wherever the process goes later.

    Raises: InputError when the name is a path.
    """
    if not name or name in (".", "..") or Path(name).name != name or "\\" in name or not _is_possible(name):
        raise InputError(f"model name {name!r}: expected the name of one folder, without a path.")
    return anchored(root) / name


def _is_possible(name: str) -> bool:
    """Whether a file system can hold a name: no NUL, and no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def file_in(folder: Path, name: str) -> Path:
    """Name a file in the folder of a model.

    Raises: InputError when the name leads out of the folder.
    """
    plain = Path(os.path.normpath(name))  # a link in the folder may lead where its owner likes
    if plain == Path():
        raise InputError(f"{name!r}: expected the name of a file in {folder}.")
    if plain.is_absolute() or plain.parts[0] == "..":
        raise InputError(f"{name!r} leads out of {folder}; a file of the model stays in its folder.")
    return folder / name


def is_model(folder: Path) -> bool:
    """Whether a folder may be a model's folder; one that cannot be listed counts, and fails when it is opened."""
    try:
        return any(path.name in MODEL_FILES or path.name.startswith(_STEP) for path in folder.iterdir())
    except OSError:
        return True


def model_names(root: Path) -> list[str]:
    """List the models below a checkpoint root, by name."""
    try:
        folders = sorted(p for p in root.iterdir() if p.is_dir())
    except OSError:
        return []
    return [p.name for p in folders if is_model(p)]


def missing_model(folder: Path) -> CheckpointNotFound:
    """The error for the folder of a model that is not there: the models beside it, and the one that may be meant."""
    from difflib import get_close_matches  # only when a name is wrong

    names = model_names(folder.parent)
    near = get_close_matches(folder.name, names, n=1)
    meant = f"; did you mean {near[0]}?" if near else "."
    beside = f" Models in {folder.parent}: {listed_names(names, 20)}." if names else ""
    return CheckpointNotFound(f"{folder}: no such folder{meant}{beside}")
