"""Markup: texts of a checkpoint as parts of a page, in which none of them can become markup."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from typing import Any

from ...console.words import printable
from ...containers.pickles.inert import as_text

_LISTED = 20
"""Lines of a box."""


def escaped(value: Any) -> str:
    """Escape any text of a checkpoint."""
    return html.escape(printable(str(value)))


def json_text(value: Any) -> str:
    """JSON that cannot end the script element that contains it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rounded(value: float | None, digits: int = 4) -> float | None:
    """A number rounded to a few digits; None for one that JSON lacks."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def finite(value: Any) -> float | None:
    """A number of a training state as such; None for anything else, and for one that nobody counted."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e18 else None


def number_text(value: float) -> str:
    """A number for people, to four digits: 1,234, 0.0123, 3e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e15 or abs(value) < 1e-4:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def count_text(count: float) -> str:
    """A count in the unit that leaves three digits: 124 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.{1 if count >= 100 * size else 2}f} {unit}"
    return f"{count:.0f}"


def duration_text(seconds: float) -> str:
    """A time span in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def moment(saved_at: Any) -> str:
    """A date as an element to which the browser adds its age; empty for what is no date."""
    from datetime import UTC, datetime

    try:
        when = datetime.fromisoformat(saved_at).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return ""
    said = f"{when.day} {when:%b %Y, %H:%M} UTC"
    return f'<time datetime="{when:%Y-%m-%dT%H:%M:%SZ}">{said}</time>'


def pairs(values: Iterable[tuple[str, Any]]) -> str:
    """A list of names and values."""
    texts = [(str(key), value if isinstance(value, str) else as_text(value, 400)) for key, value in values]
    rows = "".join(
        f'<div class="{"wide" if len(key + said) > 30 else ""}"><dt>{escaped(key)}</dt><dd>{escaped(said)}</dd></div>'
        for key, said in texts
    )
    return f"<dl>{rows}</dl>"


def box(kind: str, title: str, lines: list[str]) -> str:
    """A box of sentences, of which the first ones are shown; empty without any."""
    if not lines:
        return ""
    items = "".join(f"<li>{escaped(line)}</li>" for line in lines[:_LISTED])
    more = f"<li>and {len(lines) - _LISTED} more</li>" if len(lines) > _LISTED else ""
    return f'<aside class="{kind}"><strong>{escaped(title)}</strong><ul>{items}{more}</ul></aside>'


def fold(title: str, content: str, *, note: str = "", opened: bool = False) -> str:
    """Content behind a title that opens it; title and note are plain texts."""
    small = f" <small>{escaped(note)}</small>" if note else ""
    return f"<details{' open' * opened}><summary>{escaped(title)}{small}</summary>{content}</details>"


def table(heading: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "") -> str:
    """A table of cells that are markup already; it scrolls where the page is narrow."""
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in heading)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    label = f' aria-label="{escaped(caption)}"' if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region"{label or " aria-label=table"}>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
