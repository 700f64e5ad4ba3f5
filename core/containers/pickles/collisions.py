"""Notice keys that were chosen to meet in the table of a dictionary or set, by placing them as CPython does.

Whole numbers are their own hashes, and the walk through a table is known: 276,000 keys of different hashes, each of
which is compared with half of all before it, took 28 s in a file of 1.7 MB.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from .inert import Call, Global, Key, Malformed

FEW = 100
"""Keys in one dictionary or set that take no time, wherever they lie."""

SLICE = 64
"""Keys that are put into one before it is looked at where they lie."""

_UNPREDICTABLE = {str, bytes, type(None), Global, Call, Key}
"""Types of keys whose hash Python salts, or takes from where they lie in memory."""

_MOST_MET = (10_000, 12)
"""Taken places that the keys of one may meet: so many, and so many for each key; random ones meet half of one."""


class Table:
    """Where the keys of a dictionary or set lie, which may then be filled further by `add`; texts may lie anywhere."""

    def __init__(self, held: Collection[Any]) -> None:
        self.held = held
        self.run = 9 if isinstance(held, set) else 0  # places behind the first one that a set tries before it jumps
        self.filled, self.met, self.taken = 0, 0, bytearray(8)
        if not self.run and {*map(type, held)} == {str}:  # a table of texts alone is made anew for another key
            self.taken = bytearray(1 << (3 * len(held) - 1).bit_length())
        self.add(held)

    def add(self, new: Collection[Any]) -> None:
        """Count keys that are in it by now, and were not when it was counted last.

        Raises: Malformed when its keys meet far more often than others would.
        """
        self.filled += len(new)
        size = len(self.taken)
        while self._is_full(size):
            size *= 4 if self.run and self.filled <= 50_000 else 2
        if size > len(self.taken):
            self.met, self.taken, new = 0, bytearray(size), self.held
        self._place(map(hash, new))

    def _is_full(self, size: int) -> bool:
        return 5 * self.filled >= 3 * (size - 1) if self.run else self.filled > 2 * size // 3

    def _place(self, hashes: Iterable[int]) -> None:
        taken, run, met = self.taken, self.run, self.met
        mask = len(taken) - 1
        free, each = _MOST_MET
        most = free + each * self.filled
        for place in hashes:
            rest, at = place & 0xFFFF_FFFF_FFFF_FFFF, place & mask
            while taken[at]:
                met += 1
                if run and at + run <= mask and (hole := taken.find(0, at, at + run + 1)) >= 0:
                    at = hole
                    break
                rest >>= 5
                at = (5 * at + rest + 1) & mask
                if met > most:
                    raise Malformed("its keys were made to collide in a dictionary or set")
            taken[at] = 1
        self.met = met


def predictable(keys: Iterable[Any]) -> bool:
    """Whether any of these keys has a hash that whoever wrote the file could know."""
    return not {*map(type, keys)} <= _UNPREDICTABLE


def fill(target: dict[Any, Any] | set[Any], keys: Sequence[Any], items: Sequence[Any] = ()) -> None:
    """Put keys into an empty set, or with items into an empty dictionary; refuse keys that were made to collide.

    Raises: Malformed.
    """
    table = Table(target) if len(keys) >= FEW and predictable(keys) else None
    step = SLICE if table else len(keys) or 1
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        new = [key for key in dict.fromkeys(part) if key not in target] if table else ()
        if isinstance(target, dict):
            target.update(zip(part, items[start : start + step], strict=True))
        else:
            target.update(part)
        if table:
            table.add(new)
