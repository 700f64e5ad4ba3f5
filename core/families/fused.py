"""Fusing: map the tensors of a GPT of any of our generations to those of the model, from names alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..console.words import listed_names
from ..errors import CheckpointMismatch
from . import gpt, lecture
from .family import Shape, plain_names
from .rules import RENAME, Names, Table, each, expanded, pattern

FUSED, LECTURE = "fused", "lecture"
SAME: Table = tuple((name, name, RENAME) for name in gpt.TENSORS)


@dataclass(eq=False, repr=False)
class Fusing:
    """For each tensor of a model, the tensors of a file that are concatenated along its rows to make it."""

    family: str
    sources: dict[str, tuple[str, ...]]  # our name: names in the file
    dropped: dict[str, str]  # name in the file: why the model does not need it

    def shapes(self, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """Compute the shapes of the results from those in the file.

        Raises: CheckpointMismatch when a part is missing, or parts of one tensor do not fit together.
        """
        missing = [part for parts in self.sources.values() for part in parts if part not in found]
        if missing:
            total = sum(map(len, self.sources.values()))
            raise CheckpointMismatch(
                f"{len(missing)} of {total} tensors are not there: it was saved incompletely; "
                f"missing: {listed_names(missing, 10)}"
            )
        return {name: _joined(name, parts, found) for name, parts in self.sources.items()}


def _joined(name: str, parts: tuple[str, ...], found: Mapping[str, Shape]) -> Shape:
    first, *others = (tuple(found[part]) for part in parts)
    for part, shape in zip(parts[1:], others, strict=True):
        if shape != first:
            raise CheckpointMismatch(f"{part} is {shape}, but {parts[0]} is {first}; {name} is made of both")
    return (first[0] * len(parts), *first[1:]) if first else first


def fuse(family: str, table: Table, dropped: Mapping[str, str], names: Iterable[str]) -> Fusing:
    """Apply a table to the names of a file; a name without a row keeps its name, so that it can be reported.

    Of the rules only concatenation changes a name's neighbours: the names of a row follow one another, each head by
    head. A part that is not there is named all the same.

    Raises: CheckpointMismatch when two names mean one tensor.
    """
    plain = plain_names(names)
    rows = [(pattern(name), row) for row in table for name in each(row[0])]
    reasons = [(pattern(name), reason) for name, reason in dropped.items()]
    heads, made, out = 0, dict[str, tuple[str, ...]](), {}
    of_heads: dict[str, tuple[Names, str]] = {}
    for name, original in plain.items():
        if reason := next((r for found, r in reasons if found.fullmatch(name)), None):
            out[original] = reason
            continue
        match, (theirs, ours, _) = next(
            ((m, row) for found, row in rows if (m := found.fullmatch(name))), (None, ("", name, RENAME))
        )
        numbers = match.groupdict() if match else {}
        (target,) = expanded(ours, numbers["i"], {}) if "i" in numbers else each(ours)
        made.setdefault(target, (original,))
        if "j" in numbers:
            heads = max(heads, int(numbers["j"]) + 1)
            of_heads[target] = (theirs, numbers["i"])
        elif made[target] != (original,):
            raise CheckpointMismatch(f"{made[target][0]} and {original} are two names of {target}")
    if heads > len(plain):
        raise CheckpointMismatch(f"a head has the number {heads - 1}, but there are only {len(plain)} tensors in all")
    for target, (parts, layer) in of_heads.items():
        made[target] = tuple(plain.get(name, name) for name in expanded(parts, layer, {"n_head": heads}))
    return Fusing(family, made, out)


def recognise(names: Iterable[str]) -> Fusing:
    """Plan how the tensors of a GPT of any of our generations become those of the model.

    Raises: CheckpointMismatch when two names mean one tensor.
    """
    names = list(names)
    if any(".sa.heads." in name for name in plain_names(names)):
        return fuse(LECTURE, lecture.LECTURE, lecture.DROPPED, names)
    return fuse(FUSED, SAME, gpt.DROPPED, names)
