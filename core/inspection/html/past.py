"""Past: the history of a model on one page, every step with its branch, its health and why it is kept."""

from __future__ import annotations

from pathlib import Path

from ...console.commands import typed
from ...console.words import size_text
from ..history import ASIDE, DAMAGED, KEPT
from ..inspect import Facts
from .document import document, publish
from .markup import box, escaped, moment, table


def write_past(file: Path, facts: Facts, *, overwrite: bool = False) -> None:
    """Write the page of a history, whose facts are given.

    Raises: InputError as `publish`.
    """
    publish(file, lambda: past_page(facts), overwrite)


def past_page(facts: Facts) -> str:
    """The page of a history as text."""
    steps = facts["steps"]
    title = f"{Path(facts['location']).absolute().name}: history"
    aside = [step for step in steps if step["place"] == ASIDE]
    size = size_text(sum(step["bytes"] for step in steps))
    checked = "every byte was compared with its checksum" if facts["checked"] == "checksums" else "headers were read"
    damaged = [fault for step in steps if step["health"] == DAMAGED for fault in step["faults"]]
    others = [fault for step in steps if step["health"] != DAMAGED for fault in step["faults"]]
    going = facts["would_remove"] or []
    heading = ("branch", "step", "validation loss", "size", "saved", "health", "kept by, or where")
    body = [
        f"<header><h1>{escaped(title)}</h1>",
        f"<p>{len(steps) - len(aside)} steps, {len(aside)} aside, {size}; {checked}</p>",
        f'<p class="path">{escaped(facts["location"])}</p></header>',
        box("red", "Damaged", damaged),
        box("amber", "Replaced", others),
        box("note", f"{facts['flags']} would remove", going),
        '<section id="steps"><h2>Steps</h2>',
        table(heading, map(_row, steps), "steps"),
        '<p class="said">The newest step has a star. What is aside is never read; '
        f"{escaped(typed('train.py'))} --prune removes it.</p>",
        "</section>",
    ]
    return document(title, body)


def _row(step: Facts) -> tuple[str, ...]:
    reason = ", ".join(step["rules"]) or ("nothing: removed at the next save" if step["place"] == KEPT else "")
    if step["place"] == ASIDE:
        reason = Path(step["path"]).name
    reason += " (weights only)" if step["optimizer_removed"] else ""
    loss = f"{step['val_loss']:.4f}" if isinstance(step["val_loss"], (int, float)) else "-"
    health = f"<strong>{escaped(step['health'])}</strong>" if step["health"] == DAMAGED else escaped(step["health"])
    graph = f'<pre class="graph">{escaped(step["graph"])}</pre>'
    return (
        graph,
        f"{step['step']:,}",
        loss,
        size_text(step["bytes"]),
        moment(step["saved_at"]),
        health,
        escaped(reason),
    )
