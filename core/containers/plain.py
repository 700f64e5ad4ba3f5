"""Convert the content of a checkpoint to JSON values."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable
from json.encoder import encode_basestring_ascii
from typing import Any

from .pickles.inert import DEPTH, Call, Global, as_text
from .spec import TensorSpec

ROOM = 2_000_000
"""Characters of JSON that a checkpoint may take, in addition to 8 for each byte of its files."""

_NUMBERS = {int, bool, type(None)}

_MANY = 8
"""Values of a collection that is looked at as a whole: fewer are faster one by one."""


class Room:
    """A budget of JSON characters: parts that a pickle shares are written at each use, and could grow without bound."""

    def __init__(self, size: float) -> None:
        self.left = ROOM + 8 * size  # bytes of the files

    def take(self, text: str, depth: int) -> None:
        """Count a text on a line of its own, at a depth of nesting."""
        self.left -= len(text) * (1 if text.isascii() and text.isprintable() else 12) + 2 * depth + 4


UNLIMITED = Room(math.inf)


def plain(value: Any, depth: int = 0, room: Room = UNLIMITED) -> Any:
    """Convert content to JSON values; tensors, records and numbers that JSON lacks become text.

    So do values nested deeper than in any real checkpoint, since readers of the JSON have to follow them. When `room`
    runs out, the last entry of each shortened list or object tells how many are missing; the outermost has all fields.
    """
    if type(value) in _NUMBERS:
        room.left -= len(str(value)) + 2 * depth + 4
        return value
    if 0 < depth <= DEPTH and type(value) in (dict, list, tuple) and len(value) >= _MANY:
        simple = _simple(value, depth, room)
        if simple is not None:
            return simple
    if depth <= DEPTH and isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, item in value.items():
            if depth and room.left < 0:
                found["..."] = _left_out(len(value) - len(found))
                break
            name = key if isinstance(key, str) else as_text(key)
            room.take(name, depth)
            found[name] = plain(item, depth + 1, room)
        return found
    if depth <= DEPTH and isinstance(value, (list, tuple, set, frozenset)):
        listed: list[Any] = []
        for item in value:
            if room.left < 0:
                listed.append(_left_out(len(value) - len(listed)))
                break
            listed.append(plain(item, depth + 1, room))
        return listed
    records = (Call, Global, TensorSpec, bytes, dict, list, tuple, set, frozenset)
    if isinstance(value, records) or (isinstance(value, float) and not math.isfinite(value)):
        value = as_text(value)
    room.take(value if isinstance(value, str) else str(value), depth)
    return value


def _simple(value: Any, depth: int, room: Room) -> Any:
    """A collection of texts and numbers alone, which JSON holds as it is; None for any other, or one without room."""
    items = value.values() if type(value) is dict else value
    if not {*map(type, items)} <= _WRITTEN.keys() or (type(value) is dict and {*map(type, value)} != {str}):
        return None
    try:
        size = len(json.dumps(value, allow_nan=False)) + len(value) * (2 * depth + 4)
    except ValueError:  # a number that is none
        return None
    if size > room.left:
        return None
    room.left -= size
    return value if type(value) is dict else list(value)


def write_plain(value: Any, write: Callable[[str], Any], depth: int = 0) -> None:
    """Write JSON values, as `plain` makes them, as `json.dumps(value, indent=2, allow_nan=False)` would."""
    if not isinstance(value, (dict, list)) or not value:
        write(json.dumps(value))
        return
    named = isinstance(value, dict)
    items: Iterable[Any] = value.items() if isinstance(value, dict) else zip(itertools.repeat(""), value, strict=False)
    line = "\n" + "  " * depth
    if len(value) >= _MANY and {*map(type, value.values() if isinstance(value, dict) else value)} <= _WRITTEN.keys():
        text = _encoder(depth)(value)
        write(f"{text[0]}{line}  {text[1:-1]}{line}{text[-1]}")
        return
    before = "{" if named else "["
    for name, inner in items:
        before += f"{line}  {encode_basestring_ascii(name)}: " if named else f"{line}  "
        if type(inner) in _WRITTEN:
            write(before + _WRITTEN[type(inner)](inner))
        else:
            write(before)
            write_plain(inner, write, depth + 1)
        before = ","
    write(line + ("}" if named else "]"))


_WRITTEN: dict[type, Callable[[Any], str]] = {
    str: encode_basestring_ascii,
    int: int.__repr__,
    float: float.__repr__,
    bool: {True: "true", False: "false"}.__getitem__,
    type(None): {None: "null"}.__getitem__,
}
"""How JSON has a text, and a number or word that `plain` left."""


@functools.cache
def _encoder(depth: int) -> Callable[[Any], str]:
    """What writes a collection of texts and numbers alone, in C, which `indent` would forbid."""
    return json.JSONEncoder(allow_nan=False, separators=(",\n" + "  " * (depth + 1), ": ")).encode


def _left_out(count: int) -> str:
    return f"{count} more, left out: they would take more room than the files"
