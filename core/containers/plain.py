"""Convert the content of a checkpoint to JSON values."""

from __future__ import annotations

import math
from typing import Any

from .pickles.inert import DEPTH, Call, Global, as_text
from .spec import TensorSpec

ROOM = 2_000_000
"""Characters of JSON that a checkpoint may take, in addition to 16 for each byte of its files."""


class Room:
    """A budget of JSON characters: parts that a pickle shares are written at each use, and could grow without bound."""

    def __init__(self, size: float) -> None:
        self.left = ROOM + 16 * size  # bytes of the files

    def take(self, text: str, depth: int) -> None:
        """Count a text on a line of its own, at a depth of nesting."""
        self.left -= len(text) * (1 if text.isascii() and text.isprintable() else 12) + 2 * depth + 4


UNLIMITED = Room(math.inf)


def plain(value: Any, depth: int = 0, room: Room = UNLIMITED) -> Any:
    """Convert content to JSON values; tensors, records and numbers that JSON lacks become text.

    So do values nested deeper than in any real checkpoint, since readers of the JSON have to follow them. When `room`
    runs out, the last entry of each shortened list or object tells how many are missing; the outermost has all fields.
    """
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


def _left_out(count: int) -> str:
    return f"{count} more, left out: they would take more room than the files"
