"""Find the config of a model among the entries of a file, whatever the program called it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..containers.pickles.foreign import attributes
from ..containers.pickles.inert import Call
from ..containers.plain import plain
from ..families.claims import NAMES

KEYS = ("config", "model_config", "model_args", "args", "hyper_parameters", "hparams")
"""Entries of a checkpoint's content under which programs store the config of a model."""

_SIZES = frozenset(name for names in NAMES.values() for name in names)
_ENOUGH = 2  # fields that name a size: a dict with so many is a model's config
_DEEP = 3
_MOST = 500  # entries: a dict with more is a state dict


def config_entry(content: Mapping[Any, Any]) -> tuple[str, dict[str, Any] | None]:
    """Find a config: its place, as `config` or `config.model`, and its fields; ("", None) without one.

    It is one of `KEYS` or a part of one, or another entry, whose fields name sizes of a model; otherwise the first of
    `KEYS` that has fields.
    """
    entries = [name for name, value in content.items() if isinstance(value, (dict, Call))]
    ranked = sorted(entries, key=lambda name: KEYS.index(name) if name in KEYS else len(KEYS))
    parts = [part for name in ranked for part in _parts(str(name), content[name], _DEEP)]
    sized = (part for part in parts if len(part[1].keys() & _SIZES) >= _ENOUGH)
    place, fields = next(sized, next((part for part in parts if part[0] in KEYS), ("", None)))
    return place, None if fields is None else {str(name): plain(value) for name, value in fields.items()}


def _parts(place: str, value: Any, depth: int) -> Iterator[tuple[str, dict[Any, Any]]]:
    """An entry and the entries in it that have fields by name, each with its path."""
    found = attributes(value) if depth and isinstance(value, (dict, Call)) else None
    if found is None or len(found) > _MOST:
        return
    yield place, found
    for name, item in found.items():
        yield from _parts(f"{place}.{name}", item, depth - 1)
