"""Plan the migration of single-file checkpoints: a folder's newest becomes its bundle, the others kept steps.

The plan is made from headers alone; core/conversion/migration/migrate.py executes it.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...bundle.bundle import OPTIMIZER, Bundle, history, open_bundle
from ...bundle.choice import LEGACY_FILES, has_bundle, is_seen
from ...bundle.commit import MODEL, ModelFolder, step_folder
from ...bundle.contradictions import check_fit
from ...bundle.evolution import notes
from ...bundle.legacy import PARTS, TOKENIZER_KEY, open_legacy
from ...bundle.training_state import FIELDS, TrainingState
from ...containers.checksum import crc32_file
from ...containers.container import open_file
from ...containers.pickles.foreign import attributes
from ...containers.pickles.inert import Call, as_text
from ...containers.plain import plain
from ...errors import CheckpointError, CheckpointMismatch, CheckpointNotFound

BUNDLE, KEPT, MIGRATED, COMPARED, SEEN, FAILED = "bundle", "kept step", "already migrated", "compared", "seen", "failed"
"""Actions for a file: it becomes the newest step, or an older one; or nothing, since it was migrated before, its step
exists from elsewhere (the two are compared), the bundle has already taken it into account, or it cannot be migrated."""


@dataclass
class Outcome:
    """One single-file checkpoint, with the planned or actual outcome."""

    path: Path
    size: int = 0
    mtime_ns: int = 0
    generation: str = "unknown"  # family and container
    step: int | None = None
    has_optimizer: bool = False
    action: str = FAILED
    target: Path | None = None  # the folder of the step it becomes, or is compared with
    result: str = ""  # the finding, when nothing is made
    size_after: int | None = None
    notes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # entries that stay in the file only
    error: str | None = None
    may_be_deleted: bool = False

    @property
    def is_made(self) -> bool:
        """Whether a step is made from the file."""
        return self.action in (BUNDLE, KEPT)

    @property
    def became(self) -> str:
        """The outcome in a few words."""
        if self.target is None:
            return "not migrated" if self.action == FAILED else f"nothing: {self.result}"
        place = "the bundle" if self.target == self.path.parent else self.target.name
        if self.is_made:
            return place
        if self.action == MIGRATED:
            return f"already migrated: {place}"
        return f"nothing: {self.result or 'to be compared with'} {place} (step {self.step})"

    def fail(self, error: CheckpointError) -> None:
        """Record why the file cannot be migrated."""
        self.action, self.error = FAILED, str(error)
        self.target, self.size_after, self.may_be_deleted = None, None, False

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Name, size and checksum, as a training state records the file that it was made from."""
        with open_file(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            return {"name": self.path.name, "size": size, "crc32": f"{crc32_file(file.fileno(), size):08x}"}

    def is_unchanged(self) -> bool:
        """Whether the file is unchanged since it was inspected."""
        stat = self.path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)

    def is_source_of(self, state: TrainingState) -> bool:
        """Whether a training state records that its step was made from this very file."""
        record = state.migrated_from
        if not isinstance(record, dict) or (record.get("name"), record.get("size")) != (self.path.name, self.size):
            return False
        return bool(record.get("crc32") == self.fingerprint["crc32"])


@dataclass
class Candidates:
    """Single-file checkpoints by folder, and a sentence for each place that could not be read."""

    folders: dict[Path, list[Path]] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)


def find(places: Iterable[Path]) -> Candidates:
    """Find the single-file checkpoints among files, in folders and in all folders below these; none is changed.

    Raises: CheckpointNotFound when a place is not there.
    """
    found = Candidates()
    for place in places:
        if place.is_file():
            _add(found, place)
        elif place.is_dir():
            for folder in _folders(place, found.passed):
                for path in sorted(folder.glob("*.pt")):
                    if path.is_file() and _is_single(path, found.passed):
                        _add(found, path)
        else:
            raise CheckpointNotFound(
                f"{place}: nothing here. Give the folder of a model, a folder of models, or a .pt file."
            )
    return found


def _add(found: Candidates, path: Path) -> None:
    paths = found.folders.setdefault(path.parent, [])
    if path not in paths:
        paths.append(path)


def _folders(root: Path, passed: list[str]) -> Iterator[Path]:
    """A folder and those below it, including links, but not the kept steps, which are bundles of their own."""
    seen = set()
    failed: list[OSError] = []
    for name, below, _ in os.walk(root, followlinks=True, onerror=failed.append):
        folder = Path(name)
        if (real := folder.resolve()) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(n for n in below if not n.startswith(".") and not re.match(r"(step|aside)_\d{8,}", n))
        yield folder
    passed += [f"{error.filename}: cannot be looked into ({error.strerror})." for error in failed]


def _is_single(path: Path, passed: list[str]) -> bool:
    """Whether a file has the name of a single-file checkpoint, or is one by its header."""
    if path.name in (MODEL, OPTIMIZER):
        return False
    if path.name in LEGACY_FILES:
        return True
    try:
        with open_legacy(path):
            return True
    except CheckpointMismatch:  # a checkpoint of another kind
        return False
    except CheckpointError as error:
        passed.append(str(error))
        return False


def look(path: Path) -> Outcome:
    """Read the header of a file, and check that its parts are of one model; a fault is recorded, not raised."""
    outcome = Outcome(path)
    try:
        outcome.size = path.stat().st_size
        with open_legacy(path) as source:
            stat = os.fstat(source.files[path.name].fileno())
            outcome.size, outcome.mtime_ns = stat.st_size, stat.st_mtime_ns
            outcome.step, outcome.has_optimizer = source.step, source.has_optimizer
            outcome.generation = f"{source.evidence.plan.family}, {source.weights.source.header.container}"
            values, outcome.left = extras(source)
            outcome.notes = notes(str(path), check_fit(source, records=True), {**source.state, **values})
            if outcome.left:
                outcome.notes.append(
                    f"{path}: in this file alone, as JSON has no such values: {', '.join(outcome.left)}"
                )
    except CheckpointError as error:
        outcome.fail(error)
    except OSError as error:
        outcome.fail(CheckpointNotFound(f"{path}: cannot be read ({error.strerror})."))
    return outcome


def extras(source: Bundle) -> tuple[dict[str, Any], list[str]]:
    """Further entries of a single-file checkpoint: those for a training state, and the names of the others."""
    kept: dict[str, Any] = {}
    left = []
    content = source.weights.source.header.content
    for name, value in content.items():
        if name in PARTS or name == "step":
            continue
        record = attributes(value) if isinstance(value, Call) else None
        value = value if record is None else record
        if isinstance(name, str) and name not in FIELDS and _is_json(value):
            kept[name] = plain(value)
        else:
            left.append(name if isinstance(name, str) else as_text(name, 60))
    if not _is_json(content.get(TOKENIZER_KEY)):
        left.append(TOKENIZER_KEY)
    if kept.get("checkpoint_dtype") is not None and "model_dtype" in kept:
        kept.setdefault("model_dtype_at_save", kept["model_dtype"])
    return kept, left


def _is_json(value: Any) -> bool:
    """Whether JSON can hold a value unchanged, except that a tuple becomes a list."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))


def in_order(paths: Iterable[Path]) -> list[Outcome]:
    """Inspect a folder's files, the newest step first; of equal steps, those with an optimizer, then latest.pt."""
    place = {name: k for k, name in enumerate(LEGACY_FILES)}

    def key(outcome: Outcome) -> tuple[int, bool, int, str]:
        name = outcome.path.name
        return -(outcome.step or 0), not outcome.has_optimizer, place.get(name, len(place)), name

    return sorted(map(look, paths), key=key)


@dataclass
class Steps:
    """The steps in a model's folder: the location and training state of each."""

    folder: Path
    newest: int | None
    state: TrainingState  # of the bundle
    has_bundle: bool
    places: dict[int, Path]
    states: dict[Path, TrainingState]

    @classmethod
    def read(cls, folder: Path) -> Steps:
        """Read which steps a folder has.

        Raises: CheckpointDamaged, CheckpointMismatch when its bundle cannot be opened.
        """
        kept = history(folder)
        places, states = {k.step: k.path for k in kept}, {k.path: k.state for k in kept}
        place = ModelFolder(folder)
        if not has_bundle({*place.storage.names(folder), *place.storage.names(place.committed)}):
            return cls(folder, max(places, default=None), TrainingState(), False, places, states)
        with open_bundle(folder) as bundle:
            step, state = bundle.step, bundle.state
        return cls(folder, step, state, True, {**places, step: folder}, {**states, folder: state})

    def decide(self, outcome: Outcome) -> None:
        """Decide the outcome of a file whose step is known."""
        assert outcome.step is not None
        made = next((place for place, state in self.states.items() if outcome.is_source_of(state)), None)
        if made is not None:
            outcome.action, outcome.target = MIGRATED, made
        elif outcome.step in self.places:
            outcome.action, outcome.target = COMPARED, self.places[outcome.step]
        elif self.newest is not None and outcome.step < self.newest:
            outcome.action, outcome.target = KEPT, self.folder / step_folder(outcome.step)
        elif is_seen(outcome.path, self.state):
            outcome.action, outcome.result = SEEN, f"known to the bundle at step {self.newest}; left as it is"
        else:
            outcome.action, outcome.target = BUNDLE, self.folder
            if not outcome.has_optimizer:
                outcome.notes.append(f"{outcome.path}: no optimizer state; training on starts its moments from zero")

    def suppose(self, outcome: Outcome) -> None:
        """Treat a decision as executed, as a plan does."""
        if outcome.action not in (BUNDLE, KEPT) or outcome.step is None or outcome.target is None:
            return
        if outcome.action == BUNDLE:
            if self.newest is not None and self.has_bundle:
                self.places[self.newest] = self.folder / step_folder(self.newest)
            self.newest, self.has_bundle = outcome.step, True
        self.places[outcome.step] = outcome.target


def plan(folder: Path, paths: Iterable[Path]) -> list[Outcome]:
    """Decide the outcome of all files of a folder; nothing is changed, and no tensor is read."""
    outcomes = in_order(paths)
    try:
        steps = Steps.read(folder)
    except CheckpointError as error:
        for outcome in outcomes:
            outcome.fail(error)
        return outcomes
    for outcome in outcomes:
        if outcome.error is None:
            steps.decide(outcome)
            steps.suppose(outcome)
    return outcomes


def work(outcome: Outcome) -> int:
    """Estimate how many bytes are read, written and compared for a file."""
    return outcome.size * {BUNDLE: 3, KEPT: 3, COMPARED: 2, MIGRATED: 1}.get(outcome.action, 0)
