"""The history of a model from its folder: each step, kept or aside, its health, and the reason why it is kept."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle, KeptStep, history, open_bundle
from ..bundle.folder import CONFIG, MODEL, FolderReader
from ..bundle.retention import RULES, Retention, optimizer_paths
from ..bundle.training_state import STATE, TrainingState, unseal
from ..bundle.verify import verify
from ..console.commands import typed
from ..console.words import columns, printable, size_text, size_word
from ..errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from .inspect import Facts

TOP, KEPT, ASIDE = "top", "kept", "aside"

WHOLE, INTACT, REPLACED, DAMAGED, NO_BUNDLE = "whole", "intact", "replaced", "damaged", "no bundle"
"""Health: headers and sizes fit; all checksums match; whole, but not the file that was saved; damaged; only parts."""


@dataclass
class Entry(KeptStep):
    """One step of the history."""

    place: str
    bytes: int = 0
    health: str = WHOLE
    faults: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    graph: str = "o"  # its row in the drawing of branches

    @property
    def why(self) -> str | None:
        """Why it is aside; None if it is not, or was moved there by another program."""
        found = re.fullmatch(r"aside_\d{8,}_([a-z]+)_[0-9a-f]+", self.path.name)
        return found[1] if found and self.place == ASIDE else None

    @property
    def branch(self) -> dict[str, Any]:
        """Where its branch forked from another; empty for the first branch."""
        found = self.state.branch
        return found if isinstance(found, dict) else {}


@dataclass
class Past:
    """The steps of a model, each after its predecessor; those aside come after the step where they forked."""

    path: Path
    entries: list[Entry]
    retention: Retention
    recorded: bool  # whether the training state records the rules

    @property
    def newest(self) -> TrainingState:
        """The training state at the top."""
        return next((entry.state for entry in self.entries if entry.place == TOP), TrainingState())

    def would_go(self, given: Mapping[str, Any]) -> list[Path]:
        """The folders of kept steps that these rules would remove, and the optimizer states."""
        kept = [entry for entry in self.entries if entry.place == KEPT]
        rules = self.retention.given(**given)
        states = (path for step in rules.thinned(self.newest, kept) for path in optimizer_paths(step))
        return [*(step.path for step in rules.going(self.newest, kept)), *states]


def past_of(folder: Path, *, checksums: bool = False, progress: Callable[[int], object] = lambda size: None) -> Past:
    """Inspect every step of a model; with `checksums` all bytes are read, and `progress` receives their number.

    Raises: CheckpointNotFound when there is no step at the top, kept or aside.
    """
    place, kept = FolderReader(folder), history(folder)
    entries = [Entry(step.step, step.path, step.state, KEPT) for step in kept]
    newest = TrainingState()
    if {MODEL, STATE} & {*place.storage.names(folder), *place.storage.names(place.committed)}:
        newest = _state(place)
        entries.append(Entry(newest.step or 0, folder, newest, TOP))
    retention = Retention.of(newest)
    all_rules = [*retention.rules(newest, kept), retention.rules_of_newest(newest, kept)]
    for entry, rules in zip(entries, all_rules, strict=False):  # there may be no step at the top
        entry.rules = rules
    for path in place.asides():
        found = re.match(r"aside_(\d{8,})", path.name)
        entries.append(Entry(int(found[1]) if found else 0, path, _state(FolderReader(path)), ASIDE))
    if not entries:
        raise CheckpointNotFound(f"{folder}: no step of a bundle is here, so there is no history to show.")
    for entry in entries:
        _look(entry, checksums)
        progress(entry.bytes)
    entries = [entry for entry in entries if entry.path.is_dir()]  # a concurrent writer may have removed some
    return Past(folder, list(_drawn(entries)), retention, newest.retention is not None)


def _state(place: FolderReader) -> TrainingState:
    with contextlib.suppress(OSError, CheckpointError):
        return unseal(place.read(STATE), str(place.path / STATE))
    return TrainingState()


def _look(entry: Entry, checksums: bool) -> None:
    """Determine its size and its health."""
    try:
        with open_bundle(entry.path) as bundle:
            entry.bytes = sum(bundle.sizes.values())
            changed = verify(bundle) if checksums else list(_other_sizes(bundle))
            entry.health = REPLACED if changed else INTACT if checksums else WHOLE
            entry.faults = changed
    except CheckpointError as error:
        missing = isinstance(error, CheckpointNotFound)
        entry.health, entry.faults = (NO_BUNDLE, []) if missing and entry.place == ASIDE else (DAMAGED, [str(error)])
        if entry.place != TOP:
            with contextlib.suppress(OSError):
                entry.bytes = sum(path.stat().st_size for path in entry.path.iterdir() if path.is_file())


def _other_sizes(bundle: Bundle) -> Iterator[str]:
    """Report files whose size is not the recorded one. Raises: CheckpointDamaged when one is cut off."""
    for part in (bundle.weights, bundle.optimizer):
        if part is not None:
            try:
                _ = part.source.header
            except CheckpointError as error:
                raise CheckpointDamaged(str(error)) from error
    for name, entry in bundle.state.files.items():
        size = bundle.sizes.get(name)
        if size is not None and size != entry["size"] and name != CONFIG:  # which a person may edit
            yield f"{bundle.path(name)}: {size} bytes; recorded {entry['size']}. It was replaced."


def _drawn(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Order the steps for a drawing of their branches, the present one in the first column, and record each row."""
    present = sorted((e for e in entries if e.place != ASIDE), key=lambda e: (e.order, e.place == TOP))
    aside = sorted((e for e in entries if e.place == ASIDE), key=lambda e: e.order)
    after: dict[int, list[Entry]] = {}
    for entry in aside:
        before = _before(entry, entries) or next((e for e in reversed(present) if e.order < entry.order), None)
        if before is not None:
            after.setdefault(id(before), []).append(entry)
    done = set()

    def row(entry: Entry, lead: str, rest: str) -> Iterator[Entry]:
        if id(entry) in done:
            return
        done.add(id(entry))
        entry.graph = f"{lead}{'*' if entry.place == TOP else 'o'}"
        yield entry
        forks = after.get(id(entry), [])
        goes_on = forks[-1:] if entry.place == ASIDE else []
        bar, corner = ("|", "|-") if goes_on or entry is not present[-1] else (" ", "`-")
        for fork in forks[: len(forks) - len(goes_on)]:
            yield from row(fork, f"{rest}{corner}", f"{rest}{bar} ")
        for straight in goes_on:
            yield from row(straight, rest, rest)

    for entry in present:
        yield from row(entry, "", "")
    for entry in aside:  # those whose predecessor is not here
        yield from row(entry, "  ", "  ")


def _before(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The predecessor of a step, if it is still here: the one before it on its branch, or the fork of that branch."""
    run, branch = entry.state.run, entry.branch.get("id")
    before = [
        e for e in entries if e.order < entry.order and (e.state.run, e.branch.get("id")) == (run, branch) and run
    ]
    if before:
        return max(before, key=lambda e: e.order)
    left = entry.branch.get("commit_id")
    return next((e for e in entries if left and e.state.commit_id == left), None)


def past_facts(past: Past, checksums: bool, given: Mapping[str, Any]) -> Facts:
    """The history as JSON values; with rules given, by name, also what they would remove."""
    asked = {name: value for name, value in given.items() if value is not None}
    return {
        "location": str(past.path),
        "run": past.newest.run,
        "rules": {**asdict(past.retention), "recorded": past.recorded},
        "steps": [_entry_facts(entry) for entry in past.entries],
        "checked": "checksums" if checksums else "headers",
        "flags": _flags(asked),
        "would_remove": [str(path) for path in past.would_go(asked)] if asked else None,
    }


def _flags(rules: Mapping[str, Any]) -> str:
    """Rules as the flags of train.py."""
    rules = {name: size_word(value) if name == "keep_within" else value for name, value in rules.items()}
    said = {n: v if isinstance(v, (int, str)) else ",".join(map(str, v)) or "none" for n, v in rules.items()}
    return " ".join(f"--{name} {value}" for name, value in said.items())


def _entry_facts(entry: Entry) -> Facts:
    state = entry.state
    return {
        "step": entry.step,
        "val_loss": state.val_loss,
        "bytes": entry.bytes,
        "saved_at": state.saved_at,
        "health": entry.health,
        "faults": entry.faults,
        "place": entry.place,
        "why": entry.why,
        "rules": entry.rules,
        "optimizer_removed": state.optimizer_removed,
        "path": str(entry.path),
        "commit_id": state.commit_id,
        "parent": state.parent,
        "commit_number": state.commit_number,
        "run": state.run,
        "branch": entry.branch.get("id"),
        "branch_left": entry.branch.get("commit_id"),
        "graph": entry.graph,
    }


def past_faults(facts: Facts) -> list[str]:
    """The faults of steps that are not aside, a sentence each."""
    bad = [step for step in facts["steps"] if step["place"] != ASIDE and step["health"] == DAMAGED]
    return [fault for step in bad for fault in step["faults"]]


def past_lines(facts: Facts) -> Iterable[str]:
    """Write the history as a table, with a summary."""
    yield "=== HISTORY ==="
    yield f"Location: {printable(facts['location'])}"
    rules = facts["rules"]
    default = asdict(Retention())
    said = {n: rules[n] for n in RULES if n == "keep" or (rules[n] != default[n] and n != "best_by")}
    ranked = f", best by {printable(rules['best_by'])}" if rules["best_by"] != default["best_by"] else ""
    unknown = "" if rules["recorded"] else " (the default: none are recorded)"
    yield f"rules: {_flags(said).replace(' --', ', --')}{ranked}{unknown}"
    yield ""
    heading = ("", "step", "val loss", "size", "saved at", "health", "kept by, or where")
    yield from columns([heading, *(_row(step) for step in facts["steps"])])
    notes = list(_notes(facts))
    yield from ["", *notes] if notes else []


def _notes(facts: Facts) -> Iterable[str]:
    for step in facts["steps"]:
        yield from (f"{step['health']}: {printable(fault)}" for fault in step["faults"] if step["health"] != DAMAGED)
    if facts["checked"] == "headers":
        yield "health: sizes and headers; --verify compares every byte with its checksum"
    aside = [step for step in facts["steps"] if step["place"] == ASIDE]
    if aside:
        size = size_text(sum(step["bytes"] for step in aside))
        yield f"aside: {len(aside)} ({size}), never read; {typed('train.py')} --prune removes them"
    if facts["would_remove"] is not None:
        yield _preview(facts)


def _row(step: Facts) -> tuple[str, ...]:
    loss = f"{step['val_loss']:.4f}" if isinstance(step["val_loss"], (int, float)) else "-"
    saved = str(step["saved_at"] or "-")[:19].replace("T", " ")
    reason = ", ".join(step["rules"]) or ("nothing: removed at the next save" if step["place"] == KEPT else "")
    reason += " (weights only)" if step["optimizer_removed"] else ""
    reason = step["path"].rpartition("/")[2] if step["place"] == ASIDE else reason
    row = (step["graph"], str(step["step"]), loss, size_text(step["bytes"]), saved, step["health"], reason)
    return tuple(printable(cell) for cell in row)


def _preview(facts: Facts) -> str:
    going = [step for step in facts["steps"] if step["path"] in facts["would_remove"]]
    thinned = [step for step in facts["steps"] if any(_inside(path, step) for path in facts["would_remove"])]
    if not going and not thinned:
        return f"{facts['flags']}: would remove no step"
    size = size_text(sum(step["bytes"] for step in going))
    parts = [f"{_numbers(going)} ({size})"] if going else []
    parts += [f"the optimizer state of {_numbers(thinned)}"] if thinned else []
    return f"{facts['flags']}: would remove {' and '.join(parts)}; {typed('train.py')} --prune {facts['flags']} does"


def _inside(path: str, step: Facts) -> bool:
    return step["place"] == KEPT and path.rpartition("/")[0] == step["path"]


def _numbers(steps: Sequence[Facts]) -> str:
    return ", ".join(str(step["step"]) for step in steps)
