"""Token files as programs write them, and the ids in what was opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def ids(tokens) -> list[int]:
    return np.concatenate([np.empty(0, np.uint16), *tokens.arrays]).tolist()


def shard(path: Path, values, header=(20240520, 1), dtype="<u2", count=None) -> Path:
    head = np.zeros(256, "<i4")
    head[:3] = *header, len(values) if count is None else count
    path.write_bytes(head.tobytes() + np.array(values, dtype).tobytes())
    return path
