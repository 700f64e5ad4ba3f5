"""Write to a model's folder as its only writer, and report what stays true when the file system refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import SaveFailed
from .commit import ModelFolder
from .lock import Say, hold, is_held, is_locked, say_at_once
from .storage import failed_call
from .turn import Turn, take


@contextlib.contextmanager
def writing(place: ModelFolder, say: Say = say_at_once) -> Iterator[None]:
    """Be the only writer while the block runs, in this process and beside others; an interrupted save is finished.

    Blocks of one thread may be nested. A write that another thread has begun is waited for.

    Raises: CheckpointLocked when another process writes here; SaveFailed when the folder cannot be made or recovered.
    """
    with lock(place, say):
        with explained(place.path):
            place.recover()
        place.removal.report(say)
        yield


def lock(place: ModelFolder, say: Say = say_at_once) -> Turn:
    """Make a model's folder and become its only writer until the result is closed, by whichever thread.

    `say` is told when a process that may be dead is waited for.

    Raises: CheckpointLocked when another process writes here; SaveFailed when the folder cannot be made.
    """
    with explained(place.path):
        if not is_held(place.path):  # one that is held and is gone was moved away, and is not begun anew
            place.path.mkdir(parents=True, exist_ok=True)
        return _only_writer(place.path, say)


def lock_if_model(path: Path) -> contextlib.AbstractContextManager[object]:
    """Become the only writer of what lies at a path when that is a model's folder; do nothing otherwise.

    For moving a folder: its trainer would otherwise continue in the folder that takes the name. Raises: as `hold`.
    """
    return _only_writer(path, say_at_once) if is_locked(path) else contextlib.nullcontext()


def _only_writer(folder: Path, say: Say) -> Turn:
    turn = take(folder)
    try:
        turn.enter_context(hold(folder, say))
    except BaseException:
        turn.close()
        raise
    return turn


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into a SaveFailed that names the place."""
    try:
        yield
    except OSError as error:
        raise SaveFailed(
            f"{error.filename or folder}: {failed_call(error)}. Nothing that was committed is lost."
        ) from error
