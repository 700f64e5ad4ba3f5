"""Every pair of families that a model can go between, and the shortest way from one to another."""

from __future__ import annotations

from collections.abc import Callable

from ..plan import Pair
from . import decoders
from . import gpt as gpt_pairs
from . import litgpt as litgpt_pairs
from . import megatron as megatron_pairs
from . import meta_llama as meta_llama_pairs
from . import modded as modded_pairs

PAIRS: tuple[Pair, ...] = (
    *gpt_pairs.PAIRS,
    *decoders.PAIRS,
    *litgpt_pairs.PAIRS,
    *meta_llama_pairs.PAIRS,
    *modded_pairs.PAIRS,
    *megatron_pairs.PAIRS,
)

Way = list[tuple[Pair, bool]]
"""Pairs to go through in turn; True: from `ours` back to `theirs`."""


def ways(family: str, closed: Callable[[Pair, bool], bool] = lambda pair, back: False) -> dict[str, Way]:
    """The shortest way to each family that can be reached from one, itself with an empty way; not through `closed`."""
    found: dict[str, Way] = {family: []}
    pending = [family]
    while pending:
        here = pending.pop(0)
        for pair in PAIRS:
            for there, back, translate in ((pair.ours, False, pair.to_ours), (pair.theirs, True, pair.to_theirs)):
                start = pair.ours if back else pair.theirs
                if start != here or translate is None or there in found or closed(pair, back):
                    continue
                shapes = [set(one.shape.split()) for one, _ in (*found[here], (pair, back)) if one.shape]
                if not shapes or set.intersection(*shapes):
                    found[there] = [*found[here], (pair, back)]
                    pending.append(there)
    return found
