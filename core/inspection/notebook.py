"""What a notebook shows of our objects: small tables, in which no text of a checkpoint becomes markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..console.words import printable, size_text
from ..errors import CheckpointError
from .history import ASIDE, past_of
from .report_text import age


def table_html(title: str, rows: Iterable[Sequence[Any]], heading: Sequence[str] = ()) -> str:
    """A titled table; the first cell of a row is its name where there is no heading."""

    def row(cells: Sequence[Any], first: str = "td") -> str:
        names = [first, *["td" if not heading or first == "td" else first] * (len(cells) - 1)]
        said = (f"<{n}>{escape(printable(str(cell)))}</{n}>" for n, cell in zip(names, cells, strict=True))
        return f"<tr>{''.join(said)}</tr>"

    head = row(heading, "th") if heading else ""
    body = "".join(row(cells, "td" if heading else "th") for cells in rows)
    return f"<table><caption>{escape(printable(title))}</caption>{head}{body}</table>"


def steps_html(folder: Path) -> str:
    """The steps of a model as a table, the newest first: loss, size, age, and why each is kept."""
    try:
        entries = [entry for entry in past_of(folder).entries if entry.place != ASIDE]
    except CheckpointError:
        return f"<p>{escape(printable(str(folder)))}: no step is saved yet</p>"
    rows = []
    for entry in sorted(entries, key=lambda entry: -entry.order):
        loss = entry.state.val_loss
        told = f"{loss:.4f}" if isinstance(loss, (int, float)) else "-"
        rows.append((entry.step, told, size_text(entry.bytes), age(entry.state.saved_at), ", ".join(entry.rules)))
    return table_html(str(folder), rows, ("step", "validation loss", "size", "age", "kept by"))
