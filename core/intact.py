"""Find the newest step whose every byte is what was written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from core.bundle import OPTIMIZER, Bundle, history, open_bundle, verify
from core.choice import Candidate, choose
from core.commit import CONFIG, MODEL, ModelFolder
from core.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointNotFound
from core.legacy import open_legacy
from core.training_state import STATE

Say = Callable[[str], None]

NOTHING_ELSE = "There is no other checkpoint here, and nothing was changed. To start anew, use another --model_name."


def say_on_stderr(line: str) -> None:
    """Print a line where a progress bar may be, and leave the bar whole."""
    tqdm.write(line, file=sys.stderr)


def open_verified(folder: Path, say: Say = say_on_stderr) -> Bundle:
    """Open the newest step of a model and check every byte of it; what was replaced since is said.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointMismatch.
    """
    bundle = open_bundle(folder)
    try:
        for line in verify(bundle):
            say(f"WARNING: {line}")
    except BaseException:
        bundle.close()
        raise
    return bundle


def open_candidate(candidate: Candidate, say: Say = say_on_stderr) -> Bundle:
    """Open a checkpoint of a folder, and check every byte of it.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointMismatch.
    """
    if candidate.single is None:
        return open_verified(candidate.folder, say)
    bundle = open_legacy(candidate.folder / candidate.single)
    try:
        verify(bundle)
    except BaseException:
        bundle.close()
        raise
    return bundle


def open_chosen(folder: Path, say: Say = say_on_stderr) -> Bundle:
    """Open the checkpoint of a folder that is to be used, bundle or single file, and check every byte of it.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointMismatch.
    """
    choice = choose(folder)
    choice.refuse_none()
    for line in choice.lines():
        say(line)
    if not choice.candidates:
        return open_verified(folder, say)  # which says what is not there
    return open_candidate(choice.candidates[0], say)


def open_newest_intact(place: ModelFolder, say: Say) -> Bundle | None:
    """Open the checkpoint to train on, walking back from what is damaged; None where there is none at all.

    The caller holds the lock.

    Raises: CheckpointDamaged when checkpoints exist and none is intact, CheckpointMismatch for weights without config;
    nothing is changed then.
    """
    choice = choose(place.path)
    for line in choice.lines():
        say(line)
    for i, candidate in enumerate(choice.candidates):
        try:
            return _open_or_walk_back(place, candidate, say)
        except (CheckpointDamaged, CheckpointNotFound) as damage:
            if i + 1 == len(choice.candidates):
                if "nothing was changed" in str(damage):
                    raise
                raise type(damage)(f"{damage} {NOTHING_ELSE}") from damage
            say(f"WARNING: {damage}")
            say(f"WARNING: trying {choice.candidates[i + 1].name} instead; nothing was deleted")
    if choice.passed:
        raise CheckpointError(f"{choice.passed[0]} {NOTHING_ELSE}")
    left = [name for name in (MODEL, OPTIMIZER, STATE) if (place.path / name).exists()]
    if left:
        gone = " and ".join(name for name in (MODEL, CONFIG) if not (place.path / name).exists())
        raise CheckpointMismatch(
            f"{place.path / left[0]}: is here without {gone}, so this is what is left of a checkpoint. Put {gone} "
            "back, or train under another --model_name; nothing was changed."
        )
    return None


def _open_or_walk_back(place: ModelFolder, candidate: Candidate, say: Say) -> Bundle:
    try:
        return open_candidate(candidate, say)
    except (CheckpointDamaged, CheckpointNotFound) as damage:
        if candidate.single is not None:
            raise
        return walk_back(place, damage, say)


def walk_back(place: ModelFolder, damage: CheckpointError, say: Say) -> Bundle:
    """Rename a damaged newest step aside, make the newest intact one the top again, say both, and open it.

    Raises: CheckpointDamaged when no kept step is intact; nothing is changed then.
    """
    passed: list[Path] = []
    for kept in reversed(history(place.path)):
        try:
            with open_bundle(kept.path) as bundle:
                verify(bundle)
        except CheckpointError as error:
            passed.append(kept.path)
            say(f"WARNING: {error}")
            continue
        aside = [place.set_aside(damaged) for damaged in (place.path, *passed)]
        place.restore(kept.path)
        say(f"WARNING: {damage}")
        say(
            f"WARNING: going on from step {kept.step}, the newest intact one. What is damaged was not deleted: "
            f"{', '.join(str(path) for path in aside)}"
        )
        return open_verified(place.path, say)
    raise CheckpointDamaged(
        f"{damage} No intact older step is kept in {place.path}, and nothing was changed. "
        "To start anew, use another --model_name."
    )


def newest_intact(folder: Path, besides: int | None) -> str:
    """Say which kept step is the newest intact one, besides one that is known to be damaged."""
    for kept in reversed(history(folder)):
        if kept.step == besides:
            continue
        with contextlib.suppress(CheckpointError), open_bundle(kept.path) as bundle:
            verify(bundle)
            return f"Newest intact step: {kept.step} ({kept.path.name})."
    return "No intact older step is kept."
