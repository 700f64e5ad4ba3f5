"""Where the step lies that `--step` names: a kept step of ours, or a folder of another program's run."""

from __future__ import annotations

from pathlib import Path

from ..containers.step_parents import NEWEST, one_step
from ..errors import CheckpointNotFound
from .bundle import open_bundle
from .choice import LEGACY_FILES, holds_bundle
from .commit import ModelFolder
from .folder import step_folder


def is_ours(folder: Path) -> bool:
    """Whether a folder is one of our models, whose kept steps have numbers of their own."""
    return holds_bundle(ModelFolder(folder)) or any((folder / name).is_file() for name in LEGACY_FILES)


def step_place(path: Path, step: int | str) -> Path:
    """The folder of a step below a path: the path itself where that is the newest of our models.

    Raises: CheckpointNotFound when there is no such step, or the path is a file.
    """
    if not path.is_dir():
        raise CheckpointNotFound(f"{path}: not a folder, so there are no steps to choose from with --step.")
    if not is_ours(path):
        return one_step(path, step)
    if step == NEWEST:
        return path
    with open_bundle(path, int(step)) as bundle:  # refuses a step that is not there
        kept = path / step_folder(int(step))
        return kept if bundle.folder == kept else path
