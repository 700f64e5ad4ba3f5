"""Lay out a .safetensors file: its header and the offset of each tensor, without torch and without tensor data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointMismatch
from .safetensors import _DTYPES

CODES = {dtype: code for code, dtype in _DTYPES.items()}
"""Safetensors' names of torch's dtypes."""

USUAL = {"format": "pt"}
"""The metadata of every file written by transformers, which refuses files without it."""

_ALIGNMENT = 8  # of the first tensor, as in the format's own writer


def header(tensors: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """Write the beginning of a file whose tensors (name, dtype, shape, bytes) then follow in this order.

    Raises: CheckpointMismatch for a dtype or a name that the format does not support.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape, nbytes in tensors:
        if name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name):
            raise CheckpointMismatch(f"{name!r} cannot be a name in a safetensors file. Use --to pt.")
        if dtype not in CODES:
            raise CheckpointMismatch(f"{name} has dtype {dtype}, which safetensors does not have. Use --to pt.")
        sides = [*shape[:-1], 2 * shape[-1]] if dtype == "float4_e2m1fn_x2" else list(shape)  # it counts the numbers
        entries[name] = {"dtype": CODES[dtype], "shape": sides, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def in_shards(sizes: Mapping[str, int], most: int | None) -> list[list[str]]:
    """Distribute tensors, in order, over files of at most `limit` bytes; a larger tensor gets a file of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if most is not None and shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def shard_names(count: int, stem: str = "model") -> list[str]:
    """Name the files of a model as in transformers."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{k:05}-of-{count:05}.safetensors" for k in range(1, count + 1)]


def index(files: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Make the index of a model in several files: the file of each tensor, and the total size in bytes."""
    places = {name: file for file, names in files.items() for name in names}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
