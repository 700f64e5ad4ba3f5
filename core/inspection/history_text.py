"""The past of a model for people and for programs: a row for each step, with its branch, health and why it is there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..console.words import columns, printable, size_text
from .history import ASIDE, DAMAGED, KEPT, Entry, Past

Facts = dict[str, Any]


def past_facts(past: Past, checksums: bool, keep: int | None, keep_every: int | None) -> Facts:
    """The past as values that JSON has; with a number given, also what it would remove."""
    asked = keep is not None or keep_every is not None
    return {
        "location": str(past.path),
        "run": past.newest.get("run"),
        "rules": {
            "keep": past.retention.keep,
            "keep_every": past.retention.keep_every,
            "resumed_from": past.retention.resumed_from,
            "recorded": past.recorded,
        },
        "steps": [_entry_facts(entry) for entry in past.entries],
        "checked": "checksums" if checksums else "headers",
        "flags": " ".join(
            f"--{name} {value}" for name, value in (("keep", keep), ("keep_every", keep_every)) if value is not None
        ),
        "would_remove": [str(entry.path) for entry in past.going(keep, keep_every)] if asked else None,
    }


def _entry_facts(entry: Entry) -> Facts:
    state = entry.state
    return {
        "step": entry.step,
        "val_loss": state.get("val_loss"),
        "bytes": entry.bytes,
        "saved_at": state.get("saved_at"),
        "health": entry.health,
        "faults": entry.faults,
        "place": entry.place,
        "why": entry.why,
        "rules": entry.rules,
        "path": str(entry.path),
        "commit_id": state.get("commit_id"),
        "parent": state.get("parent"),
        "commit_number": state.get("commit_number"),
        "run": state.get("run"),
        "branch": entry.branch.get("id"),
        "branch_left": entry.branch.get("commit_id"),
        "graph": entry.graph,
    }


def past_faults(facts: Facts) -> list[str]:
    """What is wrong with steps that are not aside, a sentence each."""
    bad = [step for step in facts["steps"] if step["place"] != ASIDE and step["health"] == DAMAGED]
    return [fault for step in bad for fault in step["faults"]]


def past_lines(facts: Facts) -> Iterable[str]:
    """Write the past as a table, and what follows from it."""
    yield "=== HISTORY ==="
    yield f"Location: {printable(facts['location'])}"
    rules = facts["rules"]
    every = f", --keep_every {rules['keep_every']}" if rules["keep_every"] else ""
    yield f"rules: --keep {rules['keep']}{every}" + ("" if rules["recorded"] else " (the default: none are recorded)")
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
        yield f"aside: {len(aside)} ({size}), never read; train.py --prune removes them"
    if facts["would_remove"] is not None:
        yield _preview(facts)


def _row(step: Facts) -> tuple[str, ...]:
    loss = f"{step['val_loss']:.4f}" if isinstance(step["val_loss"], (int, float)) else "-"
    saved = str(step["saved_at"] or "-")[:19].replace("T", " ")
    reason = ", ".join(step["rules"]) or ("nothing: goes at the next save" if step["place"] == KEPT else "")
    reason = step["path"].rpartition("/")[2] if step["place"] == ASIDE else reason
    row = (step["graph"], str(step["step"]), loss, size_text(step["bytes"]), saved, step["health"], reason)
    return tuple(printable(cell) for cell in row)


def _preview(facts: Facts) -> str:
    going = [step for step in facts["steps"] if step["path"] in facts["would_remove"]]
    if not going:
        return f"{facts['flags']}: would remove no step"
    size = size_text(sum(step["bytes"] for step in going))
    numbers = ", ".join(str(step["step"]) for step in going)
    return f"{facts['flags']}: would remove {numbers} ({size}); train.py --prune {facts['flags']} does"
