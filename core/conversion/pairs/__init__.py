"""Every pair of families that a model can go between, and the shortest way from one to another."""

from __future__ import annotations

from ..plan import Pair
from . import gpt as gpt_pairs
from . import megatron as megatron_pairs
from . import modded as modded_pairs

PAIRS: tuple[Pair, ...] = (
    *gpt_pairs.PAIRS,
    *modded_pairs.PAIRS,
    *megatron_pairs.PAIRS,
)

Way = list[tuple[Pair, bool]]
"""Pairs to go through in turn; True: from `ours` back to `theirs`."""


def ways(family: str) -> dict[str, Way]:
    """The shortest way to each family that can be reached from one, itself with an empty way."""
    found: dict[str, Way] = {family: []}
    pending = [family]
    while pending:
        here = pending.pop(0)
        for pair in PAIRS:
            for there, back, translate in ((pair.ours, False, pair.to_ours), (pair.theirs, True, pair.to_theirs)):
                start = pair.ours if back else pair.theirs
                if start == here and translate is not None and there not in found:
                    found[there] = [*found[here], (pair, back)]
                    pending.append(there)
    return found
