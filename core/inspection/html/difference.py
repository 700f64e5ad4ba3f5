"""Difference: two checkpoints on one page, what moved by layer and kind, and which settings are not the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...console.words import printable
from ...containers.pickles.inert import as_text
from ..diff.change import Change
from ..diff.comparison import VALUES, Comparison, Tensors, Values
from .document import document, publish
from .markup import box, count_text, escaped, fold, number_text, table
from .weights import kind_and_layer

_KINDS, _LAYERS, _ROWS = 300, 200, 300
"""Limits of the map, and of a list."""

_COLD, _HOT = (232, 240, 254), (245, 147, 90)
"""The colours of the smallest and the largest change; the dark text on them is readable on both."""

Map = dict[str, dict[int | None, Change | None]]
"""For each kind of tensor the changes by layer; None where the two are equal."""


def write_difference(file: Path, found: Comparison, *, overwrite: bool = False) -> None:
    """Write the page of a comparison.

    Raises: InputError as `publish`.
    """
    publish(file, lambda: difference_page(found), overwrite)


def difference_page(found: Comparison) -> str:
    """The page of a comparison as text."""
    a, b = (str(side.found.path) for side in (found.a, found.b))
    names = " and ".join(Path(path).absolute().name or path for path in (a, b))
    said = f"different: {', '.join(found.different)}" if found.different else "equal in all that was compared"
    body = [
        f"<header><h1>{escaped(names)}</h1><p>{escaped(said)}</p>",
        *(f'<p class="path">{who} {escaped(path)}{_step(step)}</p>' for who, path, step in _sides(found)),
        "</header>",
        box("note", "Notes", [*found.notes, *found.weights.notes]),
        *_settings(found),
        *_tensors("Weights", "weights", found.weights, map_of(found)),
    ]
    for title, ident in (("Moments of the optimizer", "moments"), ("Average of the weights", "ema"), ("Other", "also")):
        if (tensors := getattr(found, ident)) is not None:
            body += _tensors(title, ident, tensors, _by_kind([], tensors))
    return document(names, body)


def _sides(found: Comparison) -> Iterator[tuple[str, str, object]]:
    yield from (("A", str(found.a.found.path), found.a.found.step), ("B", str(found.b.found.path), found.b.found.step))


def _step(step: object) -> str:
    return f", step {step:,}" if isinstance(step, int) else ""


def map_of(found: Comparison) -> Map:
    """The changes of the weights that both have, equal ones included."""
    return _by_kind([name for name in found.a.tensors if name in found.b.tensors], found.weights)


def _by_kind(shared: Iterable[str], tensors: Tensors) -> Map:
    """The changes of tensors by kind, in the order of `shared`; those of other shapes are not among them."""
    pairs = {pair.name: pair for pair in tensors.different}
    kinds: Map = {}
    for key in dict.fromkeys([*shared, *pairs]):
        pair = pairs.get(key)
        if pair is not None and pair.change is None:
            continue
        name, change = (pair.title, pair.change) if pair is not None else (key, None)
        kind, layer = kind_and_layer(name)
        if kind in kinds or len(kinds) < _KINDS:
            layers = kinds.setdefault(kind, {})
            if len(layers) < _LAYERS:
                layers[layer] = change
    return kinds


def _tensors(title: str, ident: str, tensors: Tensors, kinds: Map) -> Iterator[str]:
    """The map, the list of the largest changes, and what only one of them has."""
    moved = len(tensors.different)
    yield f'<section id="{ident}"><h2>{title} <small>{tensors.compared:,} compared, {moved:,} not equal</small></h2>'
    yield box("red", "Not compared", tensors.faults)
    yield heat_map(kinds)
    heading = ("tensor", "root mean square", "largest", "largest, relative", "changed")
    changed = [pair for pair in tensors.different if pair.change is not None]
    rows = ((escaped(pair.title), *_numbers(pair.change)) for pair in changed[:_ROWS] if pair.change is not None)
    if changed:
        yield fold("Tensors that changed", table(heading, rows, "tensors that changed"), note=f"{len(changed):,}")
    shapes = [pair for pair in tensors.different if pair.change is None]
    if shapes:
        cells = ((escaped(pair.title), *(f"{v.shape} {escaped(v.dtype)}" for v in (pair.a, pair.b))) for pair in shapes)
        yield fold(
            "Other shapes", table(("tensor", "A", "B"), list(cells)[:_ROWS], "other shapes"), note=str(len(shapes))
        )
    for who, lone in (("A", tensors.only_a), ("B", tensors.only_b)):
        if lone:
            cells = ((escaped(name), f"{view.shape}", escaped(view.dtype)) for name, view in lone.items())
            listed = table(("tensor", "shape", "dtype"), list(cells)[:_ROWS], f"only in {who}")
            yield fold(f"Only in {who}", listed, note=f"{len(lone):,}")
    yield "</section>"


def _numbers(change: Change) -> tuple[str, ...]:
    share = f"{count_text(change.changed)} of {count_text(change.elements)}"
    return (*(number_text(value) for value in (change.rms, change.absolute, change.relative)), share)


def heat_map(kinds: Map) -> str:
    """A table of kinds by layers whose cells are the warmer the more moved; empty where nothing did."""
    sizes = [change.rms for layers in kinds.values() for change in layers.values() if change and _drawable(change.rms)]
    if not sizes:
        return ""
    low, high = math.log10(min(sizes)), math.log10(max(sizes))
    numbers = sorted({layer for layers in kinds.values() for layer in layers if layer is not None})
    alone = any(None in layers for layers in kinds.values())
    columns: list[int | None] = [*numbers, *([None] if alone else [])]
    head = "".join(f'<th scope="col">{"no layer" if layer is None else layer}</th>' for layer in columns)
    rows = "".join(
        f'<tr><th scope="row">{escaped(printable(kind))}</th>'
        + "".join(_cell(layers, layer, low, high) for layer in columns)
        + "</tr>"
        for kind, layers in kinds.items()
    )
    said = f"from {number_text(min(sizes))} to {number_text(max(sizes))}"
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="what moved, by layer and kind"><table class="heat">'
        f"<caption>What moved, by layer and kind: the root mean square of B - A, {said}.</caption>"
        f'<thead><tr><th scope="col">kind</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _drawable(size: float) -> bool:
    return size > 0 and math.isfinite(size)


def _cell(layers: dict[int | None, Change | None], layer: int | None, low: float, high: float) -> str:
    if layer not in layers:
        return '<td class="none"></td>'
    change = layers[layer]
    if change is None or not change.changed:
        return '<td class="none">equal</td>'
    if not _drawable(change.rms):
        return f'<td class="none">{"NaN" if change.nan else "bits" if change.rms == 0 else "inf"}</td>'
    share = (math.log10(change.rms) - low) / (high - low) if high > low else 1.0
    red, green, blue = (round(cold + (hot - cold) * share) for cold, hot in zip(_COLD, _HOT, strict=True))
    return f'<td style="background:#{red:02x}{green:02x}{blue:02x}">{change.rms:.2g}</td>'


def _settings(found: Comparison) -> Iterator[str]:
    """The values that are not the same."""
    a, b = (side.measured for side in (found.a, found.b))
    texts = {name: [number_text(one[name]) if name in one else "-" for one in (a, b)] for name in {**a, **b}}
    rows = [("measured", escaped(name).replace("_", " "), *two) for name, two in texts.items()]
    rows += [row for part in VALUES for row in _values(part, getattr(found, part))]
    yield '<section id="settings"><h2>Settings that differ</h2>'
    if rows:
        yield table(("part", "setting", "A", "B"), rows[:_ROWS], "settings that differ")
    same = sum(getattr(found, part).same for part in VALUES)
    remarks = [f"{part}: {getattr(found, part).remark}" for part in VALUES if getattr(found, part).remark]
    yield f'<p class="said">{escaped("; ".join([f"{same} are the same", *remarks]))}.</p></section>'


def _values(part: str, values: Values) -> Iterator[tuple[str, ...]]:
    for name, (a, b) in values.different.items():
        yield part, escaped(name), escaped(as_text(a, 80)), escaped(as_text(b, 80))
    for name, value in values.only_a.items():
        yield part, escaped(name), escaped(as_text(value, 80)), "-"
    for name, value in values.only_b.items():
        yield part, escaped(name), "-", escaped(as_text(value, 80))
