"""A plan: how the tensors of a file become the tensors of a model, worked out from their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..console.words import listed
from ..errors import CheckpointMismatch
from . import gpt, lecture
from .family import Shape, plain_names

FUSED, LECTURE = "fused", "lecture"


@dataclass(frozen=True)
class Plan:
    """For each tensor of a model the tensors of a file it is made of, which follow one another along its rows."""

    family: str
    sources: dict[str, tuple[str, ...]]  # our name: names in the file
    dropped: dict[str, str]  # name in the file: why the model does not need it

    def shapes(self, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """Compute the shapes of what the plan makes, from those in the file.

        Raises: CheckpointMismatch when a part is missing, or parts of one tensor do not fit together.
        """
        missing = [part for parts in self.sources.values() for part in parts if part not in found]
        if missing:
            total = sum(map(len, self.sources.values()))
            raise CheckpointMismatch(
                f"{len(missing)} of {total} tensors are missing: it was saved incompletely; "
                + listed([f"{part} is missing" for part in missing])
            )
        return {name: _joined(name, parts, found) for name, parts in self.sources.items()}


def _joined(name: str, parts: tuple[str, ...], found: Mapping[str, Shape]) -> Shape:
    first, *others = (tuple(found[part]) for part in parts)
    for part, shape in zip(parts[1:], others, strict=True):
        if shape != first:
            raise CheckpointMismatch(f"{part} is {shape}, but {parts[0]} is {first}; {name} is made of both")
    return (first[0] * len(parts), *first[1:]) if first else first


def make_plan(family: str, table: Mapping[str, str], dropped: Mapping[str, str], names: Iterable[str]) -> Plan:
    """Work out a plan for the names of a file; a name without a row keeps its name, so that it can be reported.

    A table maps names of the family to ours, `{i}` a layer and `{j}` a head. Rows with a `{j}` and one target are
    concatenated: row by row in the order of the table, head by head within a row.
    """
    plain = plain_names(names)
    rows = [(re.compile(_pattern(theirs)), theirs, ours) for theirs, ours in table.items()]
    reasons = [(re.compile(_pattern(name)), reason) for name, reason in dropped.items()]
    heads, made, out = 0, dict[str, tuple[str, ...]](), {}
    joined: dict[str, tuple[str, str]] = {}
    for name, original in plain.items():
        if reason := next((r for pattern, r in reasons if pattern.fullmatch(name)), None):
            out[original] = reason
            continue
        match, theirs, ours = next(
            ((m, theirs, ours) for pattern, theirs, ours in rows if (m := pattern.fullmatch(name))), (None, "", name)
        )
        numbers = match.groupdict() if match else {}
        target = ours.replace("{i}", numbers.get("i") or "")
        made.setdefault(target, (original,))
        if "{j}" in theirs:
            heads = max(heads, int(numbers["j"]) + 1)
            joined[target] = (ours, numbers["i"])
        elif made[target] != (original,):
            raise CheckpointMismatch(f"{made[target][0]} and {original} are two names of {target}")
    if heads > len(plain):
        raise CheckpointMismatch(f"a head has the number {heads - 1}, but there are only {len(plain)} tensors in all")
    for target, (ours, layer) in joined.items():
        parts = [theirs for theirs, name in table.items() if name == ours and "{j}" in theirs]
        named = [part.format(i=layer, j=j) for part in parts for j in range(heads)]
        made[target] = tuple(plain.get(name, name) for name in named)
    return Plan(family, made, out)


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\{i\}", r"(?P<i>\d{1,6})").replace(r"\{j\}", r"(?P<j>\d{1,4})")


def recognise(names: Iterable[str]) -> Plan:
    """Plan how the tensors of a GPT of any of our generations become those of the model.

    Raises: CheckpointMismatch when two names mean one tensor.
    """
    names = list(names)
    if any(".sa.heads." in name for name in plain_names(names)):
        return make_plan(LECTURE, lecture.TENSORS, lecture.DROPPED, names)
    return make_plan(FUSED, {name: name for name in gpt.TENSORS}, gpt.DROPPED, names)
