"""Which checkpoint of a folder is used: one answer for training, generation, inspection and migration."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..containers.checksum import crc32_file
from ..errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from .bundle import Bundle, history, open_bundle
from .commit import CONFIG, MODEL, ModelFolder
from .legacy import open_legacy
from .parts import folder_of
from .storage import DISK
from .training_state import STATE, TrainingState, unseal

Say = Callable[[str], None]

LEGACY_FILES = ("latest.pt", "final.pt")
"""Single-file checkpoints, the one with the optimizer first."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint in a folder: the bundle, or a single file."""

    folder: Path
    single: str | None  # None: the bundle
    step: int
    has_optimizer: bool

    @property
    def name(self) -> str:
        """Its name in a sentence."""
        return f"{self.single or 'the bundle'} (step {self.step})"


@dataclass(frozen=True)
class Choice:
    """The checkpoints of a folder, the one to use first."""

    candidates: list[Candidate]
    passed: list[str] = field(default_factory=list)  # files that cannot be read, each in a sentence

    def lines(self) -> list[str]:
        """Report what is passed over, what is used and why; empty where there is only one candidate."""
        reason = self._reason() if self.candidates else None
        return [*(f"WARNING: {line}" for line in self.passed), *([reason] if reason else [])]

    def _reason(self) -> str | None:
        first, *others = self.candidates
        if first.single is None and not others:
            return None
        if not others:
            return f"{first.folder}: using {first.name}; there is no bundle yet"
        optimizer = next((c for c in others if c.has_optimizer and not first.has_optimizer), None)
        hint = f"; only {optimizer.single or 'the bundle'} has an optimizer state" if optimizer else ""
        if first.single is None and any(c.step > first.step for c in others):
            hint = ", all there when the bundle was written"
        return f"{first.folder}: using {first.name}; beside it {', '.join(c.name for c in others)}{hint}"


def choose(folder: Path) -> Choice:
    """Order the checkpoints of a folder: the bundle, unless a single file has a higher step and is new to it.

    A single file is new when the training state of the bundle does not list it, by name, size and checksum, among
    the files that were there when the bundle was written. Of two single files the one with the higher step comes
    first; at equal steps, `latest.pt` does.
    No file is changed, and no tensor is read.
    """
    passed: list[str] = []
    singles = []
    for name in LEGACY_FILES:
        if os.path.lexists(folder / name):
            try:
                with open_legacy(folder / name) as opened:
                    singles.append(Candidate(folder, name, opened.step, opened.has_optimizer))
            except CheckpointError as error:
                passed.append(str(error))
    singles.sort(key=lambda c: -c.step)
    state = _bundle_state(folder)
    if state is None:
        return Choice(singles, passed)
    bundle = Candidate(folder, None, state.step or 0, state.has_optimizer)
    newer = [c for c in singles if c.step > bundle.step and not is_seen(folder / str(c.single), state)]
    return Choice([*newer, bundle, *(c for c in singles if c not in newer)], passed)


def open_choice(folder: Path, say: Say, step: int | None = None, single: str | None = None) -> Bundle | None:
    """Open the checkpoint of a folder that is to be used: a kept step or a single file by name, else the first choice.

    The choice and its reason are reported. None where there is nothing to choose from.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointMismatch, CheckpointError when no file can be read.
    """
    if step is None and single is None:
        choice = choose(folder)
        if choice.passed and not choice.candidates:
            raise CheckpointError(choice.passed[0])
        for line in choice.lines():
            say(line)
        if not choice.candidates:
            return None
        single = choice.candidates[0].single
    return open_legacy(folder / single) if single else open_bundle(folder, step)


def has_bundle(names: Collection[str]) -> bool:
    """Whether the names in a folder are those of a bundle: a config, and weights or shards of them."""
    return CONFIG in names and (MODEL in names or folder_of(MODEL) in names)


def holds_bundle(place: ModelFolder) -> bool:
    """Whether a folder holds a committed bundle, at the top or kept."""
    top, pending = (set(place.storage.names(folder)) for folder in (place.path, place.committed))
    return has_bundle(top | pending) or bool(place.kept_steps())


def _bundle_state(folder: Path) -> TrainingState | None:
    """The training state of the bundle, empty where it has none; None where there is no bundle."""
    place = ModelFolder(folder)
    names = {*place.storage.names(folder), *place.storage.names(place.committed)}
    kept = history(folder)
    if not has_bundle(names) and not kept:
        return None
    try:
        return unseal(place.read(STATE), str(folder / STATE))
    except FileNotFoundError:
        return TrainingState()
    except (CheckpointDamaged, CheckpointMismatch):
        return kept[-1].state if kept else TrainingState()  # where a walk back from the damaged state would end


def is_seen(path: Path, state: TrainingState) -> bool:
    """Whether a training state lists this very file."""
    listed = [entry for entry in state.legacy or [] if entry["name"] == path.name]
    return any(entry["size"] == path.stat().st_size and entry["crc32"] == _crc32(path) for entry in listed)


def seen_files(folder: Path, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List the single files of a folder for a training state; one that is `known` and unchanged is not read again."""
    listed = []
    for name in LEGACY_FILES:
        path = folder / name
        if not path.is_file():
            continue
        stat = path.stat()
        entry = {"name": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        same = next((old for old in known if all(old.get(key) == value for key, value in entry.items())), None)
        listed.append({**entry, "crc32": same["crc32"] if same else _crc32(path)})
    return listed


def _crc32(path: Path) -> str:
    with DISK.open(path) as file:
        return f"{crc32_file(file.fileno(), path.stat().st_size):08x}"
