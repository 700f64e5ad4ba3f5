"""What a pickle may make: so much of each kind, and so much of all together, by its length."""

from __future__ import annotations

from .inert import SLACK, Malformed

KEYS = "keys that are no texts or short numbers"

_MOST: dict[str, tuple[int, int, int]] = {
    "lists, dictionaries and sets": (SLACK, 25, 12),  # 60 to 220 bytes of memory each
    "calls": (40_000, 20, 8),
    "records of calls": (20_000, 30, 16),
    "references to storages": (20_000, 20, 12),
    KEYS: (SLACK, 40, 10),
    "names": (20_000, 20, 14),
    "tuples": (SLACK, 14, 9),
    "values in them": (10 * SLACK, 4, 1),
    "stored values": (SLACK, 3, 0),
    "states": (20_000, 25, 10),
    "items appended one by one": (SLACK, 4, 4),
    "items set one by one": (SLACK, 8, 24),
    "texts in lines": (SLACK, 8, 5),
    "long numbers": (SLACK, 5, 3),
    "steps that make nothing": (1000, 100, 1),
}
"""What a pickle may make of each kind: so many in any case, and one more for so many of its bytes; and its weight."""

_ROOM = 12 * SLACK
DENSITY = 1.6
"""What all that a pickle makes may weigh: so much in any case, and for each byte; DTensors weigh 1.4, most files 1.

So a file that has as much as it can of every kind takes no longer than one that has much of one kind.
"""


class Allowance:
    """Counts what a pickle of so many bytes makes."""

    def __init__(self, length: int, whole: int, density: float) -> None:
        self.most = {what: free + length // share for what, (free, share, _) in _MOST.items()}
        self.made = dict.fromkeys(_MOST, 0)
        self.room = _ROOM + density * length
        self.whole = whole  # bytes that the file's pickles have together, for the message

    def count(self, what: str, more: int = 1) -> None:
        """Count things of one kind.

        Raises: Malformed when they are too many, or heavier than what is left of the room.
        """
        self.made[what] += more
        self.room -= more * _MOST[what][2]
        if self.made[what] > self.most[what] or self.room < 0:
            most = min(self.most[what], self.made[what] - 1)
            raise Malformed(f"over {most} {what}, too many for {self.whole} bytes")
