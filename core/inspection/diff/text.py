"""A comparison for people, line by line, and as JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from ...console.words import columns, printable
from ...containers.pickles.inert import as_text
from ...containers.plain import plain
from ...containers.tensors.views import View
from ..tensor_table import grouped
from .change import Change
from .comparison import VALUES, Comparison, Pair, Tensors, Values
from .side import Facts, Side

_SHOWN = 40
"""Rows of one list."""

_WIDTH = 60
"""Characters of a value."""


def comparison_facts(found: Comparison) -> Facts:
    """The comparison as JSON values; equal parts are only counted."""
    facts = {
        "equal": found.equal,
        "different": found.different,
        "a": _side_facts(found.a),
        "b": _side_facts(found.b),
        **{part: _values_facts(getattr(found, part)) for part in VALUES},
        "weights": _tensors_facts(found.weights),
        **{
            part: _tensors_facts(tensors) if (tensors := getattr(found, part)) is not None else None
            for part in ("moments", "ema", "also")
        },
        "notes": found.notes,
    }
    return plain(facts)


def _side_facts(side: Side) -> Facts:
    found = side.found
    return {
        "path": str(found.path),
        "kind": found.container.kind,
        "family": side.family,
        "step": found.step,
        "measured": side.measured,
    }


def _values_facts(values: Values) -> Facts:
    return {
        "equal": values.equal,
        "same": values.same,
        "different": {name: {"a": a, "b": b} for name, (a, b) in values.different.items()},
        "only_a": values.only_a,
        "only_b": values.only_b,
        "remark": values.remark,
    }


def _tensors_facts(tensors: Tensors) -> Facts:
    return {
        "equal": tensors.equal,
        "compared": tensors.compared,
        "different": [_pair_facts(pair) for pair in tensors.different],
        "only_a": [_stored_facts(name, stored) for name, stored in tensors.only_a.items()],
        "only_b": [_stored_facts(name, stored) for name, stored in tensors.only_b.items()],
        "faults": tensors.faults,
        "notes": tensors.notes,
    }


def _pair_facts(pair: Pair) -> Facts:
    return {
        "name": pair.title,
        "a": _view_facts(pair.a, pair.name),
        "b": _view_facts(pair.b, pair.name),
        "change": _change_facts(pair.change) if pair.change is not None else None,
    }


def _change_facts(change: Change) -> Facts:
    facts = {**asdict(change), "rms": change.rms}
    del facts["squares"]
    return facts


def _stored_facts(name: str, stored: View) -> Facts:
    return {"name": stored.names[0] if len(stored.names) == 1 else name, **_view_facts(stored, name)}


def _view_facts(view: View, name: str) -> Facts:
    names = view.names or (name,)  # an empty tensor is made of nothing
    return {"names": names, "dtype": view.dtype, "shape": view.shape}


def comparison_lines(found: Comparison) -> Iterable[str]:
    """Write a comparison; its last line tells whether the two are equal."""
    for who, side in (("A", found.a), ("B", found.b)):
        path, step = str(side.found.path), [] if side.found.step is None else [f"step {side.found.step}"]
        what = ", ".join([side.found.container.kind, side.family, *step])
        yield f"{who}: {printable(path)} ({printable(what)})"
    yield ""
    if rows := list(_measured_rows(found)):
        yield from columns([("", "A", "B"), *rows])
        yield ""
    for part in VALUES:
        yield from _values_lines(part, getattr(found, part))
    yield from _tensors_lines("tensors", found.weights)
    for part in ("moments", "ema", "also"):
        if (tensors := getattr(found, part)) is not None:
            yield from _tensors_lines(part, tensors)
    yield from (f"note: {printable(note)}" for note in found.notes)
    yield ""
    yield f"different: {', '.join(found.different)}" if found.different else "equal in all that was compared"


def _measured_rows(found: Comparison) -> Iterable[tuple[str, ...]]:
    """What one looks for first, where one of both records it."""
    for name, title in (
        ("val_loss", "validation loss"),
        ("learning_rate", "learning rate"),
        ("grad_norm", "gradient norm"),
    ):
        values = [side.measured.get(name) for side in (found.a, found.b)]
        if any(value is not None for value in values):
            yield title, *("-" if value is None else _number(name, value) for value in values)


def _number(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "val_loss" else f"{value:.3g}"


def _values_lines(title: str, values: Values) -> Iterable[str]:
    numbers = [(values.same, "equal"), (len(values.different), "not equal")]
    numbers += [(len(values.only_a), "only in A"), (len(values.only_b), "only in B")]
    said = [f"{count} {what}" for count, what in numbers if count] + ([values.remark] if values.remark else [])
    yield f"{title}: {printable(', '.join(said) or 'nothing')}"
    rows: list[tuple[str, ...]] = []
    rows += [(f"  {name}", f"A {_shown(a, b)}", f"B {_shown(b, a)}") for name, (a, b) in values.different.items()]
    rows += [(f"  {name}", f"only in A {_shown(value)}") for name, value in values.only_a.items()]
    rows += [(f"  {name}", f"only in B {_shown(value)}") for name, value in values.only_b.items()]
    yield from _limited([(printable(name), *rest) for name, *rest in rows])


def _shown(value: Any, other: Any = None) -> str:
    """A value on one line; for a long list its length, and where it begins to differ from the other."""
    if isinstance(value, float):
        return _rounded(value, other)
    if not isinstance(value, list) or not isinstance(other, list) or len(as_text(value)) <= _WIDTH:
        return as_text(value, _WIDTH)
    first = next((i for i, (x, y) in enumerate(zip(value, other, strict=False)) if x != y), min(len(value), len(other)))
    item = f"[{first}] is {as_text(value[first], _WIDTH)}" if first < len(value) else "and no more"
    return f"{len(value)} entries, {item}"


def _rounded(value: float, other: Any) -> str:
    """A number to four digits, or to as many as tell it from the other."""
    if not isinstance(other, float):
        return f"{value:.4g}"
    return next((text for n in range(4, 17) if (text := f"{value:.{n}g}") != f"{other:.{n}g}"), repr(value))


def _tensors_lines(title: str, tensors: Tensors) -> Iterable[str]:
    shapes = [pair for pair in tensors.different if pair.change is None]
    changed = [pair for pair in tensors.different if pair.change is not None]
    yield f"{title}: {tensors.compared} compared, {tensors.compared - len(tensors.different)} equal"
    yield from (f"  {printable(note)}" for note in tensors.notes)
    yield from _limited([(f"  {printable(fault)}",) for fault in tensors.faults])
    for who, lone in (("A", tensors.only_a), ("B", tensors.only_b)):
        if lone:
            yield f"  only in {who}: {len(lone)}"
            yield from _limited([(f"    {name}", *rest) for name, *rest in grouped(_rows(lone))])
    if shapes:
        yield f"  other shapes: {len(shapes)}"
        yield from _limited([_shapes_row(pair) for pair in shapes])
    if changed:
        yield f"  changed: {len(changed)}, the largest first"
        yield from _limited([("    name", "max |B-A|", "max relative", "changed"), *map(_row, changed)])


def _rows(lone: Mapping[str, View]) -> Iterable[Facts]:
    return (_stored_facts(name, stored) for name, stored in lone.items())


def _shapes_row(pair: Pair) -> tuple[str, ...]:
    kinds = (f"{who} {stored.shape} {stored.dtype}" for who, stored in (("A", pair.a), ("B", pair.b)))
    return f"    {printable(pair.title)}", *kinds


def _row(pair: Pair) -> tuple[str, ...]:
    change, remarks = pair.change, []
    assert change is not None
    if pair.a.dtype != pair.b.dtype:
        remarks.append(f"{pair.a.dtype} and {pair.b.dtype}")
    if change.nan:
        remarks.append(f"{change.nan} with NaN")
    share = f"{change.changed:,} of {change.elements:,}"
    return f"    {printable(pair.title)}", f"{change.absolute:.3g}", f"{change.relative:.3g}", share, ", ".join(remarks)


def _limited(rows: list[tuple[str, ...]]) -> Iterable[str]:
    yield from columns(rows[:_SHOWN])
    if len(rows) > _SHOWN:
        yield f"    ... and {len(rows) - _SHOWN} more; --json lists all"
