"""The tensors of a checkpoint as a table, with those of all layers in one row."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..console.words import printable
from ..containers.spec import TensorSpec
from .inspect import Facts


def tensor_facts(tensors: Mapping[str, TensorSpec], pattern: str | None = None) -> list[Facts]:
    """Name, dtype, shape and bytes of the tensors that match a pattern (as for file names)."""
    return [
        {"name": name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes}
        for name, t in tensors.items()
        if pattern is None or fnmatchcase(name, pattern)
    ]


def each(tensors: Iterable[Facts]) -> list[tuple[str, ...]]:
    """A row for each tensor."""
    return [(printable(t["name"]), str(tuple(t["shape"])), t["dtype"], f"{t['bytes']:,} bytes") for t in tensors]


def grouped(tensors: Iterable[Facts]) -> list[tuple[str, ...]]:
    """Group tensors that differ only in their numbers: `blocks.{0..5}.sa.qkv.weight`, `6 x (1152, 384)`, `float32`."""
    groups: dict[tuple[Any, ...], list[tuple[str, ...]]] = {}
    for tensor in tensors:
        parts = tuple(re.split(r"(?<![^.])(\d{1,9})(?![^.])", tensor["name"]))
        groups.setdefault((parts[::2], tuple(tensor["shape"]), tensor["dtype"]), []).append(parts[1::2])
    rows: list[tuple[str, ...]] = []
    for (words, shape, dtype), numbers in groups.items():
        for spans, count in _products(numbers):
            name = words[0] + "".join(_span(span) + word for span, word in zip(spans, words[1:], strict=True))
            rows.append((printable(name), f"{count} x {shape}" if count > 1 else str(shape), dtype))
    return rows


def _products(numbers: list[tuple[str, ...]]) -> list[tuple[list[list[str]], int]]:
    """Write index tuples as products of columns: a single one if possible, otherwise one for each tail."""
    columns = [list(dict.fromkeys(column)) for column in zip(*numbers, strict=True)]
    if math.prod(len(column) for column in columns) == len(numbers):
        return [(columns, len(numbers))]
    tails: dict[tuple[str, ...], list[str]] = {}
    for first, *tail in numbers:
        tails.setdefault(tuple(tail), []).append(first)
    return [([firsts, *([n] for n in tail)], len(firsts)) for tail, firsts in tails.items()]


def _span(column: list[str]) -> str:
    if len(column) == 1:
        return column[0]
    if column == [str(n) for n in range(int(column[0]), int(column[0]) + len(column))]:
        return f"{{{column[0]}..{column[-1]}}}"
    return "{" + ",".join(column if len(column) <= 6 else [*column[:3], "...", column[-1]]) + "}"
