"""Write to a model's folder as its only writer, and report what stays true when the file system refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import SaveFailed
from .commit import ModelFolder
from .lock import hold
from .storage import failed_call


@contextlib.contextmanager
def writing(place: ModelFolder) -> Iterator[None]:
    """Hold the writer's lock while the block runs; an interrupted save is finished first.

    Raises: CheckpointLocked when another process writes here; SaveFailed when the folder cannot be made or recovered.
    """
    with lock(place):
        with explained(place.path):
            place.recover()
        yield


def lock(place: ModelFolder) -> contextlib.ExitStack:
    """Make a model's folder and take its writer's lock, which is held until the result is closed.

    Raises: CheckpointLocked when another process writes here; SaveFailed when the folder cannot be made.
    """
    held = contextlib.ExitStack()
    with explained(place.path):
        place.path.mkdir(parents=True, exist_ok=True)
        held.enter_context(hold(place.path))
    return held


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into a SaveFailed that names the place."""
    try:
        yield
    except OSError as error:
        raise SaveFailed(
            f"{error.filename or folder}: {failed_call(error)}. Nothing that was committed is lost."
        ) from error
