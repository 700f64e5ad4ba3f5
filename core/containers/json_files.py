"""JSON objects on disk: read with every key once, written as people like to read them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from ..errors import CheckpointDamaged


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; a key that occurs twice is refused, since readers disagree on which one counts.

    Raises: CheckpointDamaged with the place where reading stopped.
    """
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where}: {len(data)} bytes that are no valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointDamaged(f"{where}: found a JSON {type(values).__name__}, expected an object.")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:80]!r} occurs {times} times")
    return values


def dump_json(values: dict[str, Any]) -> bytes:
    """Write a JSON object as people like to read it."""
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
