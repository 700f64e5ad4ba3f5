"""Changes to a model's past, on request only: go back to a step, start from scratch, remove what was set aside."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..console.commands import typed
from ..console.words import size_text
from ..errors import CheckpointError, CheckpointMismatch, CheckpointNotFound, NoneIntact
from . import intact
from .bundle import ALL_PARTS, Bundle, KeptStep, history, open_bundle
from .choice import LEGACY_FILES, seen_files
from .commit import ModelFolder
from .folder import LOG, MORE, aside_folder, top_state
from .retention import Retention, drop_optimizer, optimizer_paths
from .verify import verify


def go_back(
    place: ModelFolder,
    step: int,
    say: intact.Say,
    read: intact.ReadThrough = intact.read_headers,
    *,
    check: bool = True,
) -> None:
    """Make a kept step the newest one again, by one commit; later steps are set aside. The caller holds the lock.

    Raises: CheckpointNotFound when the step is not kept, CheckpointMismatch when its optimizer state was removed,
        CheckpointDamaged when it is damaged; nothing is changed then.
    """
    kept = {older.step: older for older in history(place.path)}
    top = top_state(place)
    if top.step == step:
        return
    if step not in kept:
        aside = next((path for path in place.asides() if path.name.startswith(f"aside_{step:08d}_")), None)
        hint = f"Rename {aside.name} to step_{step:08d} to have it back. " if aside else ""
        raise CheckpointNotFound(f"{place.path}: step {step} is not kept. {hint}{place.kept_said(step)}")
    intact.trusted(open_bundle(place.path, step), place, say, read, check=check).close()
    if fault := intact.weights_only(kept[step]):
        whole = [str(older.step) for older in kept.values() if older.state.optimizer_file]
        raise CheckpointMismatch(
            f"{fault} Steps with one: {', '.join(whole) or 'none'}. Its weights alone start a new run: "
            f"{typed('convert_checkpoints.py')} {kept[step].path} DST --to bundle. Nothing was changed."
        )
    later = [older.path for older in kept.values() if older.order > kept[step].order]
    ids = [older.state.commit_id for older in kept.values()]
    # A single file with a higher step that this step does not list would be chosen instead of it.
    legacy = seen_files(place.path, top.legacy or [])
    gone = place.go_back(
        kept[step].path,
        "abandoned",
        later,
        top_stays=top.commit_id is not None and top.commit_id in ids,
        facts={"legacy": legacy} if legacy else None,
    )
    say(
        f"{place.path}: back to step {step}, from which training continues. Later steps are set aside until "
        f"--prune: {', '.join(path.name for path in gone)}"
    )


def open_or_clear(
    place: ModelFolder, say: intact.Say, read: intact.ReadThrough = intact.read_headers, *, check: bool = True
) -> Bundle | None:
    """Open the checkpoint to train on; where there are some and none is intact, set all of them aside, return None."""
    try:
        return intact.open_newest_intact(place, say, read, check=check)
    except NoneIntact as error:
        say(f"WARNING: {error}")
        clear(place, say)
        return None


def clear(place: ModelFolder, say: intact.Say) -> None:
    """Set aside every checkpoint of a folder in which none can be used; report where. The caller holds the lock."""
    aside = []
    for older in history(place.path):
        aside.append(place.path / aside_folder(older.step, "cleared"))
        place.storage.rename(older.path, aside[-1])
    names = place.storage.names(place.path)
    aside += place.clear_top([name for name in (*LEGACY_FILES, *MORE, LOG) if name in names])
    where = ", ".join(path.name for path in aside)
    found = f" What was here is in {where}." if aside else ""
    say(f"WARNING: {place.path}: starting from scratch (--allow_fresh).{found}")


def prune(place: ModelFolder, say: intact.Say, dry_run: bool = False, **given: Any) -> int:
    """Remove and report what was set aside, and return the bytes freed; with a rule given, kept steps as well.

    Those are removed that the rules of the run, with the ones given, do not keep, and so are optimizer states; the
    last step that can be loaded stays, with its optimizer. A file that also has another name, such as one of a kept
    step, frees nothing. A `dry_run` reports what would be removed. The caller holds the lock.
    """
    going: list[KeptStep] = []
    thinned: list[KeptStep] = []
    newest, kept = top_state(place), history(place.path)
    rules = Retention.of(newest).given(**given)
    is_ruled = any(value is not None for value in given.values())
    if is_ruled:
        going = _besides_the_last(place, rules.going(newest, kept), kept, say, "stays")
        whole = [step for step in kept if step not in going and step.state.has_optimizer]
        thinned = _besides_the_last(place, rules.thinned(newest, kept), whole, say, "keeps its optimizer state")
    folders = [*place.asides(), *(older.path for older in going)]
    inside = {path: _files_in(path) for path in (*folders, *itertools.chain(*map(optimizer_paths, thinned)))}
    gone = list(inside) if dry_run else _removed(place, folders, thinned, rules)
    files = [file for folder in gone for file in inside[folder]]
    names = Counter(file.st_ino for file in files)
    freed = {file.st_ino: file.st_size for file in files if names[file.st_ino] == file.st_nlink}
    for folder in gone:
        size = size_text(sum(file.st_size for file in inside[folder]))
        say(f"{'would remove' if dry_run else 'removed'} {folder} ({size})")
    place.removal.report(say)
    if not inside:
        say(f"{place.path}: {_why_nothing(kept, is_ruled)}")
    elif gone and not freed:
        say(f"{place.path}: every file of these has another name, such as in a kept step, so no bytes are freed")
    return sum(freed.values())


def _removed(place: ModelFolder, folders: list[Path], thinned: list[KeptStep], rules: Retention) -> list[Path]:
    """Remove folders, and the optimizer states of steps; return what is gone."""
    gone = list(place.removal.remove(folders))
    for older in thinned:
        states = optimizer_paths(older)
        gone += states if drop_optimizer(place, older, rules) else []
    return gone


def _why_nothing(kept: list[KeptStep], is_ruled: bool) -> str:
    """Say why there is nothing to remove."""
    one = "1 kept step" if len(kept) == 1 else f"{len(kept)} kept steps"
    if not kept:
        return "nothing lies aside, and no older step is kept"
    if is_ruled:
        return f"nothing lies aside, and the rules keep {'the' if len(kept) == 1 else 'all'} {one}"
    size = size_text(sum(step.size for step in kept))
    return f"nothing lies aside; of the {one} ({size}), --keep N removes those that no rule keeps"


def _files_in(path: Path) -> list[os.stat_result]:
    """The facts of a file, or of those in a folder."""
    return [file.stat() for file in (path, *path.rglob("*")) if file.is_file()]


def _besides_the_last(
    place: ModelFolder, going: list[KeptStep], kept: list[KeptStep], say: intact.Say, verb: str
) -> list[KeptStep]:
    """Those of the steps to remove without which a step that can be loaded still stays; each is read to find out.

    A save need not ask: the step that it has just committed was read.
    """
    stays = [step.step for step in reversed(kept) if step not in going]
    if not going or any(_is_loadable(place, step) for step in (None, *stays)):
        return going
    spared = next((older for older in reversed(going) if _is_loadable(place, older.step)), None)
    if spared is None:
        return going
    say(f"WARNING: {spared.path} {verb}: it is the last step that can be loaded")
    return [older for older in going if older is not spared]


def _is_loadable(place: ModelFolder, step: int | None) -> bool:
    """Whether every byte of a step, or of the newest one, is as it was written, and can be given back."""
    with suppress(CheckpointError, OSError), open_bundle(place.path, step) as bundle:
        verify(bundle, ALL_PARTS)
        for part in bundle.torch_parts.values():
            part.source.refuse_foreign()
        return True
    return False
