"""JSON objects on disk: read with duplicate keys refused, written indented for people."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from ..errors import CheckpointDamaged


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; a duplicate key is refused, because readers disagree on which one counts.

    Raises: CheckpointDamaged with the position where parsing failed.
    """
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where}: {len(data)} bytes that are not valid JSON ({error}).") from error
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
    """Format a JSON object for people: indented, one entry a line."""
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
