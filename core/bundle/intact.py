"""Find the newest step of which every byte is as it was written."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..console.words import is_shown, printable
from ..errors import CheckpointDamaged, CheckpointError, CheckpointNotFound, NoneIntact
from .bundle import ALL_PARTS, FOR_INFERENCE, OPTIMIZER, Bundle, KeptStep, history, open_bundle
from .choice import Candidate, Say, choose, open_choice
from .commit import CONFIG, MODEL, ModelFolder
from .damage import Mixed, behind, config_goes, edited, refuse_mixture, refuse_without_state
from .folder import MODEL_SHARDS, MORE
from .foreign import foreign_checkpoint
from .legacy import open_legacy
from .training_state import STATE
from .verify import verify

Repair = Callable[[ModelFolder, CheckpointError, Say], Bundle]
"""Makes an intact step the newest one, in the place of the damaged one, and opens it."""

ANEW = "To start from scratch, use another --model_name, or --allow_fresh, which moves everything here aside."
NOTHING_ELSE = f"There is no other checkpoint here, and nothing was changed. {ANEW}"

ReadThrough = Callable[[Bundle], object]
"""Reads a step with a file that was replaced, as a load will; it raises a CheckpointError where it cannot."""


def read_headers(bundle: Bundle) -> None:
    """Read what the files of a step describe, without torch. Raises: CheckpointError."""
    for part in bundle.torch_parts.values():
        part.source.refuse_foreign()


def say_on_stderr(line: str) -> None:
    """Print a line without disturbing a progress bar, unless --quiet leaves it out."""
    if is_shown(line):
        tqdm.write(printable(line), file=sys.stderr)


def verified(bundle: Bundle, say: Say, used: tuple[str, ...] = ALL_PARTS, check: bool = True) -> Bundle:
    """Check every byte of the parts of an open bundle that are used; a damaged bundle is closed.

    Files that were replaced since the save are reported. Without `check`, only what opening checks is checked: that
    headers are whole and fit the lengths of the files.

    Raises: CheckpointDamaged, CheckpointMismatch.
    """
    try:
        for line in verify(bundle, used) if check else ():
            say(f"WARNING: {line}")
    except BaseException:
        bundle.close()
        raise
    return bundle


def trusted(
    bundle: Bundle,
    place: ModelFolder,
    say: Say,
    read: ReadThrough = read_headers,
    *,
    check: bool = True,
    mixed: bool = False,
    to_train: bool = False,
) -> Bundle:
    """Check an open bundle as `verified` does, to train on it; where a file was replaced, also that it is whole.

    With `to_train` the bytes of the model and its optimizer stay in memory as they are checked.

    Whole is: with a training state, read by `read` and, unless it may be `mixed`, of one save.

    Raises: CheckpointError; the bundle is closed then.
    """
    try:
        kept = history(place.path)
        refuse_without_state(bundle, kept)
        if lines := verify(bundle, to_train=to_train) if check else []:
            if not mixed:
                refuse_mixture(bundle, place)
            read(bundle)
        lines += edited(bundle, kept)
    except BaseException:
        bundle.close()
        raise
    for line in lines:
        say(f"WARNING: {line}")
    return bundle


def open_chosen(
    folder: Path,
    say: Say = say_on_stderr,
    *,
    step: int | None = None,
    single: str | None = None,
    used: tuple[str, ...] = FOR_INFERENCE,
    check: bool = True,
) -> Bundle:
    """Open the checkpoint of a folder that is to be used, as `open_choice` does, and check the parts that are used.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointMismatch, also where its frozen tensors are not in it.
    """
    chosen = open_choice(folder, say, step, single)
    if chosen is None and (found := foreign_checkpoint(folder)):
        raise CheckpointNotFound(found)
    chosen = chosen or open_bundle(folder)  # without one, this reports what is missing
    try:
        chosen.refuse_partial()
    except CheckpointError:
        chosen.close()
        raise
    return verified(chosen, say, used, check)


class NeedsRepair(Exception):
    """The newest step cannot be used as it is, so that the folder has to be changed, or the damage reported."""


def open_unrepaired(
    place: ModelFolder, say: Say, read: ReadThrough = read_headers, *, check: bool = True, to_train: bool = False
) -> Bundle | None:
    """Open the checkpoint to train on where it is intact, without the lock; None where there is none at all.

    `to_train` is as in `trusted`.

    Raises: NeedsRepair where `open_newest_intact` has more to do; nothing is said then. Nothing is ever changed.
    """

    def refuse(place: ModelFolder, damage: CheckpointError, say: Say) -> Bundle:
        raise NeedsRepair(str(damage)) from damage

    said: list[str] = []
    try:
        bundle = open_newest_intact(place, said.append, read, check=check, repair=refuse, to_train=to_train)
    except NoneIntact as damage:
        raise NeedsRepair(str(damage)) from damage
    for line in said:
        say(line)
    return bundle


def open_newest_intact(
    place: ModelFolder,
    say: Say,
    read: ReadThrough = read_headers,
    *,
    check: bool = True,
    repair: Repair | None = None,
    to_train: bool = False,
) -> Bundle | None:
    """Open the checkpoint to train on, walking back from what is damaged; None where there is none at all.

    The caller holds the lock. Without `check` only what cannot be opened counts as damaged. A step that can be opened,
    with a file that is not as it was saved, is used only when `read` reads it. `repair` makes an intact step the newest
    one, as `walk_back` does; `to_train` is as in `trusted`.

    Raises: NoneIntact when checkpoints, or parts of some, are here and none can be used; nothing is changed then.
    """
    choice = choose(place.path)
    for line in choice.lines():
        say(line)
    for i, candidate in enumerate(choice.candidates):
        try:
            return _open_or_repair(place, candidate, say, read, check, repair, to_train)
        except (CheckpointDamaged, CheckpointNotFound) as damage:
            if i + 1 == len(choice.candidates):
                if isinstance(damage, NoneIntact):
                    raise
                raise NoneIntact(f"{damage} {_nothing_else(place, damage)}") from damage
            say(f"WARNING: {damage}")
            say(f"WARNING: trying {choice.candidates[i + 1].name} instead; nothing was deleted")
    if choice.passed:
        raise NoneIntact(f"{choice.passed[0]} {NOTHING_ELSE}")
    left = [name for name in (MODEL, MODEL_SHARDS, OPTIMIZER, *MORE, STATE) if (place.path / name).exists()]
    if left:
        gone = " and ".join(name for name in (MODEL, CONFIG) if not (place.path / name).exists())
        raise NoneIntact(
            f"{place.path / left[0]}: is here without {gone}, so this is what is left of a checkpoint. Put {gone} "
            f"back; nothing was changed. {ANEW}"
        )
    asides = [path for path in place.asides() if "_cleared_" not in path.name]  # not those of a fresh start
    if asides:
        raise NoneIntact(
            f"{place.path}: no checkpoint here except what was set aside: {', '.join(path.name for path in asides)}. "
            f"To continue from one, rename it to step_NNNNNNNN, with the number in its name. {ANEW}"
        )
    return None


def _nothing_else(place: ModelFolder, damage: CheckpointError) -> str:
    """What there is besides what cannot be used: a kept step, where the top cannot be moved out of its way."""
    kept, cause = history(place.path), damage.__cause__
    if not kept or not isinstance(cause, OSError) or cause.filename is None:
        return NOTHING_ELSE
    odd = shlex.quote(str(cause.filename))
    return (
        f"Step {kept[-1].step} is kept in {kept[-1].path.name}, and nothing was changed. To continue from it: "
        f"mv {odd} {odd}.odd, then start again."
    )


def _open_or_repair(
    place: ModelFolder,
    candidate: Candidate,
    say: Say,
    read: ReadThrough,
    check: bool,
    repair: Repair | None,
    to_train: bool,
) -> Bundle:
    if candidate.single is not None:
        return verified(open_legacy(candidate.folder / candidate.single), say, check=check)
    try:
        return trusted(open_bundle(candidate.folder), place, say, read, check=check, to_train=to_train)
    except CheckpointError as error:
        if (damage := behind(place, error)) is None:
            raise
        try:
            return repair(place, damage, say) if repair else walk_back(place, damage, say, read)
        except NoneIntact:
            if isinstance(damage, Mixed):  # and every file is whole
                return trusted(open_bundle(candidate.folder), place, say, read, check=check, mixed=True)
            if damage is not error:
                raise error from error.__cause__  # what it names, a person can correct
            raise


def walk_back(place: ModelFolder, damage: CheckpointError, say: Say, read: ReadThrough = read_headers) -> Bundle:
    """Make the newest intact kept step the top again, rename what is damaged aside, report it, and open the step.

    Raises: NoneIntact when no kept step is intact; nothing is changed then.
    """
    kept, passed, faults = _newest_intact_kept(place, damage, read)
    aside = place.go_back(kept.path, "damaged", passed, config_goes=config_goes(place))
    where = f" What is damaged was not deleted: {', '.join(map(str, aside))}." if aside else ""
    say(f"WARNING: {' '.join(faults)} Continuing from step {kept.step}, the newest intact one.{where}")
    return verified(open_bundle(place.path), say)


def look_back(place: ModelFolder, damage: CheckpointError, say: Say, read: ReadThrough = read_headers) -> Bundle:
    """Open the newest intact kept step where the folder cannot be changed; report it.

    Raises: NoneIntact when no kept step is intact.
    """
    if isinstance(damage, NoneIntact):
        raise damage
    kept, _, faults = _newest_intact_kept(place, damage, read)
    say(
        f"WARNING: {' '.join(faults)} Using step {kept.step}, the newest intact one. {place.path} cannot be changed "
        "here, and stays as it is."
    )
    return verified(open_bundle(kept.path), say)


def _newest_intact_kept(
    place: ModelFolder, damage: CheckpointError, read: ReadThrough
) -> tuple[KeptStep, list[Path], list[str]]:
    """Find the newest intact kept step; returns it with the damaged ones that are newer, and all damage in words.

    Raises: NoneIntact.
    """
    passed, faults = [], [str(damage)]
    for kept in reversed(history(place.path)):
        if fault := weights_only(kept):
            passed.append(kept.path)
            faults.append(fault)
            continue
        try:
            trusted(open_bundle(kept.path), place, lambda line: None, read).close()
        except CheckpointError as error:
            passed.append(kept.path)
            faults.append(str(error))
            continue
        return kept, passed, faults
    raise NoneIntact(
        f"{' '.join(faults)} No intact older step is kept in {place.path}, and nothing was changed. {ANEW}"
    )


def weights_only(kept: KeptStep) -> str | None:
    """A sentence where the optimizer state of a kept step was removed, so that no run goes on from it as it was."""
    if kept.state.optimizer_removed is None:
        return None
    return f"{kept.path}: holds weights only, since its optimizer state was removed ({kept.state.optimizer_removed})."


def newest_intact(folder: Path, besides: int | None) -> str:
    """Report the newest intact kept step, other than one that is known to be damaged."""
    for kept in reversed(history(folder)):
        if kept.step == besides:
            continue
        with contextlib.suppress(CheckpointError), open_bundle(kept.path) as bundle:
            verify(bundle)
            return f"Newest intact step: {kept.step} ({kept.path.name})."
    return "No intact older step is kept."
