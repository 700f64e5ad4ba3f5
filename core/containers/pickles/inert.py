"""Inert records: the content of a pickle beyond plain values, as text and data that are safe to show and walk."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Sequence
from typing import Any

from ...console.words import listed_names
from ...errors import CheckpointDamaged

DEPTH = 200
"""Levels of nesting a structure may have: far below Python's own limit of 1000 calls."""

SLACK = 100_000
"""Values that a structure may unfold to, beyond 8 for each byte of its pickle."""


class Global:
    """The name of a class or function in a pickle; compares by name, and is never looked up."""

    __slots__ = ("path",)

    def __init__(self, module: str, name: str) -> None:
        self.path = f"{module}.{name}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Global) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return as_text(self)


class Cycle(Global):
    """What stands in a value in place of one that holds it, so that each content is a tree."""

    __slots__ = ()

    def __init__(self) -> None:
        self.path = "a value that contains itself"

    __eq__ = object.__eq__  # two of them may be keys of one dictionary
    __hash__ = object.__hash__


class Call:
    """A call that a pickle requests and that is never made: an instance of a class, or the result of a function."""

    __slots__ = ("args", "callable", "items", "state")
    changes = True
    """Whether the pickle may give it a state and items."""

    def __init__(self, callable: Any, args: tuple[Any, ...]) -> None:
        self.callable = callable
        self.args = args
        self.state: Any = None  # what BUILD would set: usually the attributes, by name
        self.items: Sequence[Any] = ()  # appended values, and (key, value) pairs; few have any

    def extend(self, values: Iterable[Any]) -> None:
        """Append values, as to a list or dictionary that is an instance of a class of its own."""
        if not isinstance(self.items, list):
            self.items = []
        self.items.extend(values)

    def __repr__(self) -> str:
        return as_text(self)


class New(Call):
    """A new object of a class, which its constructor has not filled: a set of these values would be empty."""

    __slots__ = ()


class Key(tuple):
    """A tuple as a dictionary key, with an unpredictable hash: Python salts only the hashes of text.

    Thousands of tuples crafted to have one hash would be compared with each other, one by one.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(" ".join([str(hash(value)) for value in self]))

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, other) is True


class DtypeName(str):
    """The full name of a dtype, which is shown as text and loaded as the dtype."""

    __slots__ = ()


class Size(tuple):
    """A shape, which is a tuple to everything here and loaded as a torch.Size."""

    __slots__ = ()


class ByteArray(bytes):
    """Bytes that are loaded as a bytearray."""

    __slots__ = ()


_BRACKETS = {list: ("[", "]"), tuple: ("(", ")"), Key: ("(", ")"), Size: ("(", ")")}

LEAVES = frozenset({str, bytes, int, float, bool, type(None), Global, Cycle})
"""Types whose values hold nothing."""


class Malformed(Exception):
    """A fault of a pickle, in words that complete 'damaged pickle at byte N of M: ...'."""


def as_key(value: Any) -> Any:
    """A value as a dictionary key or set element whose hash is cheap; lists cannot be one, as in Python.

    Python recomputes the hash of a tuple each time, recursively: a small pickle could demand 2**100 steps. Nested
    or long tuples, huge numbers and tensors are therefore boxed in a `Call`, which is hashed by identity.
    """
    if value is None or isinstance(value, (str, bytes, float, Global, Call)):
        return value
    if isinstance(value, int) and value.bit_length() <= 60:
        return value
    if isinstance(value, tuple) and len(value) <= 16 and not any(isinstance(v, (tuple, frozenset)) for v in value):
        return Key(map(as_key, value))
    if isinstance(value, (list, dict, set)):
        raise Malformed(f"a {type(value).__name__} as a dictionary key")
    return Call(Global("pickle", "key"), (value,))


def as_text(value: Any, limit: int = 200) -> str:
    """Show a value on one line of at most `limit` ASCII characters, as Python would write it; safe to print."""
    if type(value) is str:
        text = json.dumps(value[: limit + 1])
    else:
        parts: list[str] = []
        _write(value, parts, limit)
        text = "".join(parts)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def as_name(name: str, limit: int = 80) -> str:
    """Show a name as `as_text` does, without quotes."""
    return as_text(name, limit)[1:-1]


def names_text(names: Sequence[str], limit: int = 3) -> str:
    """Show names as `as_name` does, at most so many: "a, b, c and 4 more"."""
    return listed_names(names, limit, show=as_name)


def _write(value: Any, parts: list[str], room: int) -> int:
    """Append the text of a value to `parts`; returns the room that is left, and stops when there is none."""
    if room < 0:
        return room
    if isinstance(value, str):
        text = json.dumps(value[: room + 1])
    elif isinstance(value, bytes):
        text = repr(value[: room + 1])
    elif isinstance(value, Global):
        text = json.dumps(value.path)[1:-1]
    elif isinstance(value, Call):
        room = _write(value.callable, parts, room - 1)  # a level of nesting costs room, or recursion had no bound
        room = _write_all(value.args, parts, room, "(", ")")
        if value.state:
            room = _write(value.state, parts, _put(" with ", parts, room))
        return _write_all(value.items, parts, room, " [", "]") if value.items else room
    elif isinstance(value, dict):
        room = _put("{", parts, room)
        for i, (key, item) in enumerate(value.items()):
            if room < 0:
                return room
            room = _write(key, parts, _put(", ", parts, room) if i else room)
            room = _write(item, parts, _put(": ", parts, room))
        text = "}"
    elif isinstance(value, (list, tuple, set, frozenset)):
        opening, closing = _BRACKETS.get(type(value), ("{", "}"))
        one = isinstance(value, tuple) and len(value) == 1
        return _write_all(value, parts, room, opening, ",)" if one else closing)
    else:
        text = str(value)
    return _put(text, parts, room)


def _write_all(values: Any, parts: list[str], room: int, opening: str, closing: str) -> int:
    room = _put(opening, parts, room)
    for i, item in enumerate(values):
        if room < 0:
            return room
        room = _write(item, parts, _put(", ", parts, room) if i else room)
    return _put(closing, parts, room)


def _put(text: str, parts: list[str], room: int) -> int:
    parts.append(text)
    return room - len(text)


def children(value: Any) -> Sequence[Any] | None:
    """The values inside a value; None when it cannot have any."""
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, Call):
        return (value.callable, value.args, value.state, value.items)
    return list(value) if isinstance(value, (set, frozenset)) else None


def check_structure(root: Any, where: str, length: int) -> Container[int]:
    """Make a tree of a structure, and refuse one that a walk could not finish; returns the identities of all values.

    A value that contains itself gets a `Cycle` in place of the inner one. Refused is what is nested deeper than DEPTH,
    or unfolds (shared parts counted at each use) to far more than the `length` bytes it was read from. One pass from
    the leaves up, without recursion.

    Raises: CheckpointDamaged.
    """
    limit = 8 * length + SLACK
    measured: dict[int, int | None] = {}  # by identity: size << 8 | height; None while its children are open
    remade: dict[int, Any] = {}  # tuples that cycles were cut out of, by the identity of what they replace
    pending = [root]
    opened: list[tuple[int, Any, list[Any], int]] = []  # whose children are all above that many of `pending`
    while pending or opened:
        if opened and len(pending) == opened[-1][0]:
            _, value, inner, size = opened.pop()
            height, is_cut = 0, False
            for child in inner:
                found = measured[id(child)]
                if found is None or (remade and id(child) in remade):
                    is_cut = True
                    found = found or 1 << 8
                size += found >> 8
                if found & 255 > height:
                    height = found & 255
            if height >= DEPTH:
                raise CheckpointDamaged(f"{where}: its content is nested deeper than {DEPTH} levels.")
            if is_cut:
                _cut(value, measured, remade)
        else:
            value = pending.pop()
            if id(value) in measured:
                continue
            size, height, inner, kind = 1, 0, [], type(value)
            for child in value if kind is tuple else children(value) or ():
                kind = type(child)
                if kind is str or kind is bytes:
                    size += 1 + len(child)
                elif kind in LEAVES:
                    size += 1
                elif child or kind is Call:
                    inner.append(child)
                else:
                    size += 1
            if inner:
                measured[id(value)] = None
                opened.append((len(pending), value, inner, size))
                pending += inner
                continue
        if size > limit:
            raise CheckpointDamaged(
                f"{where}: its content unfolds to over {limit} values, too many for a pickle of {length} bytes."
            )
        measured[id(value)] = size << 8 | height + 1
    return measured


def _cut(value: Any, measured: dict[int, int | None], remade: dict[int, Any]) -> None:
    """Replace what contains a value, and the tuples that were remade, in a value whose other parts are trees.

    A tuple or frozenset is copied into `remade`; a cycle of these alone cannot be written.
    """

    def tree(child: Any) -> Any:
        return Cycle() if measured.get(id(child), 0) is None else remade.get(id(child), child)

    if isinstance(value, Call):
        value.callable, value.args, value.state, value.items = map(tree, children(value) or ())
    elif isinstance(value, list):
        value[:] = map(tree, value)
    elif isinstance(value, dict):
        pairs = [(tree(key), tree(item)) for key, item in value.items()]
        value.clear()
        value.update(pairs)
    elif isinstance(value, set):
        parts = list(map(tree, value))
        value.clear()
        value.update(parts)
    else:
        remade[id(value)] = type(value)(map(tree, value))
