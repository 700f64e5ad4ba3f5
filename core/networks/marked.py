"""Values for which a torch file has no type, as dicts with a mark: arrays, counters, deques, states of objects."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..bundle.also import MARK
from ..errors import CheckpointDamaged, InputError
from .state_dict import plain


def marked(value: Any, where: str) -> Any:
    """Copy the containers of a value, with marked dicts for what a file has no type for.

    Raises: InputError, beginning with `where`, for an array of objects, and for a tensor that no file holds.
    """
    if isinstance(value, torch.Tensor):
        return plain(value, where)
    if isinstance(value, np.ndarray):
        return _array(value, where)
    if isinstance(value, collections.Counter):
        return {MARK: "counter", "items": [[key, count] for key, count in value.items()]}
    if isinstance(value, collections.deque):
        items = [marked(item, f"{where}.{i}") for i, item in enumerate(value)]
        return {MARK: "deque", "items": items, "maxlen": value.maxlen}
    if isinstance(value, Mapping):
        return escaped({key: marked(item, f"{where}.{key}") for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        items = [marked(item, f"{where}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def escaped(values: dict[Any, Any]) -> dict[Any, Any]:
    """A dict whose values are marked; one that has the key of marks is not taken for a mark."""
    return {MARK: "dict", "items": [[key, value] for key, value in values.items()]} if MARK in values else values


def _array(array: np.ndarray, where: str) -> dict[str, Any]:
    """An array as a flat tensor of its numbers, or of its bytes, with its dtype in NumPy's notation and its shape."""
    if array.dtype.hasobject or array.dtype.names:
        raise InputError(
            f"{where} is an array of {array.dtype}, whose values no tensor holds. Expected are numbers, texts or "
            "times of one size: save a list. Nothing was written."
        )
    flat = np.ascontiguousarray(array).reshape(-1)
    try:
        tensor = torch.from_numpy(flat.copy())
    except (TypeError, ValueError):  # torch has no such numbers, or not in this order of bytes
        tensor = torch.from_numpy(flat.view(np.uint8).copy())
    return {MARK: "array", "dtype": array.dtype.str, "shape": list(array.shape), "tensor": tensor}


@dataclass(frozen=True)
class ObjectState:
    """The state of an object, with the name of its class."""

    kind: str
    state: Any


@dataclass(frozen=True)
class RankStates:
    """What each rank had, by rank."""

    states: list[Any]


def unmarked(value: Any, where: str) -> Any:
    """Copy a value as it was before `marked`; its tensors are not copied.

    Raises: CheckpointDamaged, beginning with `where`, for a mark of a form that `marked` does not write.
    """
    if isinstance(value, dict):
        if MARK in value:
            try:
                return _MADE[value[MARK]](value, where)
            except (AttributeError, KeyError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
                raise CheckpointDamaged(
                    f"{where} is marked as {str(value[MARK])[:80]!r}, in an unknown form."
                ) from error
        return {key: unmarked(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [unmarked(item, f"{where}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _made_array(value: dict[str, Any], where: str) -> np.ndarray:
    dtype = np.dtype(value["dtype"])
    if dtype.hasobject:
        raise ValueError
    return np.frombuffer(bytearray(value["tensor"].numpy().tobytes()), dtype).reshape(value["shape"])


def _made_dict(value: dict[str, Any], where: str) -> dict[Any, Any]:
    return {key: unmarked(item, f"{where}.{key}") for key, item in value["items"]}


def _made_deque(value: dict[str, Any], where: str) -> collections.deque[Any]:
    return collections.deque((unmarked(item, where) for item in value["items"]), value["maxlen"])


_MADE = {
    "array": _made_array,
    "counter": lambda value, where: collections.Counter(dict(value["items"])),
    "deque": _made_deque,
    "dict": _made_dict,
    "object": lambda value, where: ObjectState(str(value["class"]), unmarked(value["state"], where)),
    "ranks": lambda value, where: RankStates([unmarked(state, where) for state in value["states"]]),
}
"""What each mark stands for."""
