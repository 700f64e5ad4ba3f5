"""Rules: how tensors of one program become tensors of another, each with its inverse; and tables of them.

A rule works on views (core/containers/tensors/views.py): it is geometry, and reads nothing. A table is a tuple of rows
`(their name or names, our name or names, rule)`; in a name `{i}` is a layer: the row is applied to each. A name with a
`{j}` stands for those of all heads, with an `{l}` for those of all layers, on which a rule of several tensors works.
A table is read both ways: `apply(table, ...)` makes ours of theirs, and with `back=True` theirs of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from ..containers.tensors.views import (
    View,
    concatenate,
    merge_axes,
    permute,
    split,
    split_axis,
    squeeze,
    unsqueeze,
)
from ..errors import CheckpointMismatch

Sizes = Mapping[str, int]
"""Numbers of a model by the words of core/families/family.py: n_layer, n_head, n_kv_head, head_size, n_embd, ..."""


class Rule(Protocol):
    """A change of tensors, and its inverse."""

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Make `count` of our tensors from theirs."""

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Make `count` of their tensors from ours."""


@dataclass(eq=False, repr=False)
class Rename:
    """Another name for the same tensor."""

    def __str__(self) -> str:
        return "rename"

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Change nothing."""
        return list(views)

    inverse = forward


@dataclass(eq=False, repr=False)
class Permute:
    """Permute the axes: axis k of ours is axis `axes[k]` of theirs."""

    axes: tuple[int, ...]

    def __str__(self) -> str:
        return "transpose" if self.axes == (1, 0) else f"permute{self.axes}"

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Permute."""
        return [permute(view, self.axes) for view in views]

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Permute back."""
        back = tuple(self.axes.index(k) for k in range(len(self.axes)))
        return [permute(view, back) for view in views]


@dataclass(eq=False, repr=False)
class Concat:
    """Concatenate theirs along an axis; the parts have equal lengths, or those of the sizes named by `words`."""

    axis: int = 0
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"concatenate along {self.axis}"

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Concatenate."""
        return [concatenate(views, self.axis)]

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Split."""
        (view,) = views
        whole = view.shape[self.axis]
        lengths = [sizes[word] for word in self.words] or [whole // count] * count
        if sum(lengths) != whole:
            raise CheckpointMismatch(f"{whole} along axis {self.axis} cannot be split into {lengths}")
        return split(view, self.axis, lengths)


@dataclass(eq=False, repr=False)
class Stack:
    """Stack theirs along a new axis."""

    axis: int = 0

    def __str__(self) -> str:
        return f"stack along {self.axis}"

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Stack."""
        return [concatenate([unsqueeze(view, self.axis) for view in views], self.axis)]

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Unstack."""
        (view,) = views
        return [squeeze(part, self.axis) for part in split(view, self.axis, [1] * view.shape[self.axis])]


@dataclass(eq=False, repr=False)
class Interleave:
    """Interleave theirs by group along the first axis: for each group its rows of the first, the second, and so on.

    Megatron's q, k, v: the query heads that share a key and a value precede them.
    """

    groups: str = "n_kv_head"  # the word of the sizes that says how many
    words: tuple[str, ...] = ("q_size", "kv_size", "kv_size")  # rows of each of theirs

    def __str__(self) -> str:
        return f"interleave per group ({self.groups})"

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Interleave."""
        groups = sizes[self.groups]
        for view in views:
            if view.shape[0] % groups:
                raise CheckpointMismatch(f"{view.shape[0]} rows cannot be cut into {groups} groups")
        return [merge_axes(concatenate([split_axis(view, 0, view.shape[0] // groups) for view in views], 1), 0)]

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Split the groups again."""
        (view,) = views
        groups = sizes[self.groups]
        rows = [sizes[word] // groups for word in self.words]
        if sum(rows) * groups != view.shape[0]:
            raise CheckpointMismatch(f"{view.shape[0]} rows are not {groups} groups of {' + '.join(map(str, rows))}")
        return [merge_axes(part, 0) for part in split(split_axis(view, 0, sum(rows)), 1, rows)]


@dataclass(eq=False, repr=False)
class Halves:
    """Bring what turns together half a head apart, where neighbours did, in the rows of the first `count` of theirs."""

    count: int

    def __str__(self) -> str:
        return "pairs of a head to its halves"

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Put the first of each pair before the second ones, head by head."""
        return self._swapped(views, sizes["head_size"], 2)

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Put the pairs together again."""
        return self._swapped(views, sizes["head_size"], sizes["head_size"] // 2)

    def _swapped(self, views: Sequence[View], size: int, inner: int) -> list[View]:
        """Swap the two axes of which the rows of a head are made, the second of length `inner`."""
        made = []
        for view in views[: self.count]:
            if size % 2 or view.shape[0] % size:
                raise CheckpointMismatch(f"{view.shape[0]} rows cannot be cut into heads of pairs, {size} rows each")
            rows = split_axis(split_axis(view, 0, size), 1, inner)
            swapped = permute(rows, (0, 2, 1, *range(3, len(rows.shape))))
            made.append(merge_axes(merge_axes(swapped, 1), 0))
        return [*made, *views[self.count :]]


@dataclass(eq=False, repr=False)
class Merge:
    """Merge two axes of theirs into one; the size named by `word` is the length of the second."""

    axis: int
    word: str

    def __str__(self) -> str:
        return f"merge axes {self.axis} and {self.axis + 1}"

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Merge."""
        return [merge_axes(view, self.axis) for view in views]

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Split the axis."""
        return [split_axis(view, self.axis, sizes[self.word]) for view in views]


@dataclass(eq=False, repr=False)
class Chain:
    """Rules applied one after another, from theirs to ours."""

    rules: tuple[Rule, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.rules))

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Apply each."""
        for rule in self.rules:
            views = rule.forward(views, sizes, count)
        return list(views)

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Undo each, the last one first."""
        for rule in reversed(self.rules):
            views = rule.inverse(views, sizes, count)
        return list(views)


@dataclass(eq=False, repr=False)
class Inverse:
    """The inverse of a rule: several of ours in one of theirs."""

    rule: Rule
    words: str = ""

    def __str__(self) -> str:
        return self.words or f"undo: {self.rule}"

    def forward(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Undo the rule."""
        return self.rule.inverse(views, sizes, count)

    def inverse(self, views: Sequence[View], sizes: Sizes, count: int) -> list[View]:
        """Apply the rule."""
        return self.rule.forward(views, sizes, count)


COUNTED = {"{j}": "n_head", "{l}": "n_layer"}
"""Letters that stand for many tensors of one row, and the size that gives their number."""

RENAME, TRANSPOSE = Rename(), Permute((1, 0))

Names = str | tuple[str, ...]
Row = tuple[Names, Names, Rule]
Table = tuple[Row, ...]


def layer(theirs: Names, ours: Names, weight: Rule = RENAME, bias: Rule = RENAME) -> Table:
    """Make the rows for the weight and for the bias of a layer."""

    def named(names: Names, end: str) -> Names:
        return names + end if isinstance(names, str) else tuple(name + end for name in names)

    return tuple((named(theirs, end), named(ours, end), rule) for end, rule in ((".weight", weight), (".bias", bias)))


@dataclass(eq=False, repr=False)
class Result:
    """The result of applying a table to tensors."""

    tensors: dict[str, View] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)  # of each tensor that was made, in words
    rows: dict[int, Row] = field(default_factory=dict)  # those that were used
    unused: list[str] = field(default_factory=list)


def apply(table: Iterable[Row], tensors: Mapping[str, View], sizes: Sizes, back: bool = False) -> Result:
    """Make ours from theirs by a table, or theirs from ours; a row without any of its tensors is skipped.

    Raises: CheckpointMismatch when a part of a tensor is missing, parts do not fit, or two rows make one tensor.
    """
    made, used = Result(), set[str]()
    for number, row in enumerate(table):
        theirs, ours, rule = row
        given, wanted = (ours, theirs) if back else (theirs, ours)
        for i in _layers(given, tensors):
            parts, targets = expanded(given, i, sizes), expanded(wanted, i, sizes)
            there = [name for name in parts if name in tensors]
            if not there:
                continue
            if len(there) < len(parts):
                lost = next(name for name in parts if name not in tensors)
                raise CheckpointMismatch(f"{lost} is missing, {targets[0]} is made of it and {there[0]}")
            made.rows[number] = row
            used |= set(parts)
            _make(made, rule, [tensors[name] for name in parts], parts, targets, sizes, back)
    made.unused = [name for name in tensors if name not in used]
    return made


def _make(
    made: Result, rule: Rule, views: list[View], parts: list[str], targets: list[str], sizes: Sizes, back: bool
) -> None:
    others = [name for name, view in zip(parts, views, strict=True) if view.dtype != views[0].dtype]
    if others:
        raise CheckpointMismatch(f"{others[0]} and {parts[0]} have different dtypes, and {targets[0]} is made of both")
    try:
        results = (rule.inverse if back else rule.forward)(views, sizes, len(targets))
    except (CheckpointMismatch, IndexError, KeyError, ZeroDivisionError) as error:
        shapes = ", ".join(f"{name} {view.shape}" for name, view in zip(parts[:3], views, strict=False))
        reason = f"{error} is not known" if isinstance(error, KeyError) else str(error)
        raise CheckpointMismatch(f"{targets[0]} cannot be made of {shapes} ({rule}): {reason}") from error
    if len(results) != len(targets):
        raise CheckpointMismatch(f"{parts[0]} gives {len(results)} tensors, expected {len(targets)} ({rule})")
    for name, view in zip(targets, results, strict=True):
        if name in made.tensors:
            raise CheckpointMismatch(f"{name} is made twice, the second time of {parts[0]}")
        made.tensors[name], made.rules[name] = view, str(rule)


def _layers(given: Names, tensors: Mapping[str, View]) -> list[str]:
    """The numbers for `{i}` among the existing names; [""] if the row has no `{i}`."""
    names = each(given)
    if not any("{i}" in name for name in names):
        return [""]
    patterns = [pattern(name) for name in names]
    found = {match["i"] for one in patterns for name in tensors if (match := one.fullmatch(name))}
    return sorted(found, key=int)


@cache
def pattern(name: str) -> re.Pattern[str]:
    """Compile a name of a table; its groups `i` and `j` are the numbers of a layer and a head."""
    first, *others = re.escape(name).split(r"\{i\}")
    return re.compile(
        (first + r"(?P<i>\d{1,6})" + r"(?P=i)".join(others) if others else first).replace(r"\{j\}", r"(?P<j>\d{1,4})")
    )


def each(names: Names) -> tuple[str, ...]:
    """Give the names of one side of a row, however many they are."""
    return (names,) if isinstance(names, str) else names


def expanded(names: Names, i: str, sizes: Sizes) -> list[str]:
    """List the names of one layer; one with a `{j}` stands for that of every head, with an `{l}` of every layer."""
    made = []
    for name in each(names):
        name = name.replace("{i}", i)
        letter = next((letter for letter in COUNTED if letter in name), None)
        made += [name.replace(letter, str(k)) for k in range(sizes[COUNTED[letter]])] if letter else [name]
    return made
