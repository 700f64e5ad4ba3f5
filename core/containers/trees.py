"""Walks over nested dicts, lists and tuples, as in a checkpoint; every other value is a leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .pickles.inert import as_text


def leaves(value: Any) -> Iterator[Any]:
    """Yield all leaves in order."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for item in value:
        yield from leaves(item)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Copy the dicts, lists and tuples of a value, replacing each leaf by the result of `function`."""
    return map_paths(lambda _, leaf: function(leaf), value)


def map_paths(function: Callable[[str, Any], Any], value: Any, path: str = "") -> Any:
    """Like `map_leaves`, with a function that also takes the path of each leaf, such as "state.0.exp_avg"."""
    before = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return {
            key: map_paths(function, item, before + (key if isinstance(key, str) else as_text(key)))
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [map_paths(function, item, f"{before}{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return function(path, value)
