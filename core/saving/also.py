"""The states of what a caller saves beside model and optimizer: the content of also.pt, by the caller's names.

docs/formats.md describes the file. What differs between ranks is kept by rank; of all else the first rank's is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..bundle.also import MARK
from ..bundle.bundle import ALSO
from ..containers.checksum import crc32
from ..containers.trees import map_leaves
from ..errors import InputError
from ..networks.distributed import World
from ..networks.marked import escaped, marked
from ..networks.stateful import AllGenerators, class_name, is_stateful, named, plain_object, state_of
from ..networks.wrappers import unwrap_optimizer
from .loadable import is_plain, refuse_unloadable, unloadable
from .torch_file import bytes_of, records_of

States = dict[str, Any]


def captured(also: Mapping[str, Any], world: World) -> States | None:
    """The states as they are now, for the first rank, which writes them; None on the others. Every rank calls it.

    They may share memory with the objects until they are copied.

    Raises: InputError naming what cannot be saved, on every rank.
    """
    states: States = {}
    sums: dict[str, int] | str
    try:
        objects = named(also, world)
        states = {name: _entry(name, value) for name, value in objects.items()}
        _refuse_unloadable(states)
        sums = {name: _sum(state) if world.size > 1 else 0 for name, state in states.items()}
    except InputError as error:  # all ranks raise it, or the others would wait for this one
        sums = str(error)
    everyone = world.everyone(sums)
    for rank, theirs in enumerate(everyone):
        if isinstance(theirs, str):
            raise InputError(theirs if world.size == 1 else f"rank {rank}: {theirs}")
        if theirs.keys() != everyone[0].keys():
            raise InputError(
                f"also: found {', '.join(theirs) or 'nothing'} on rank {rank}, expected {', '.join(everyone[0])} as on "
                "rank 0. Nothing was written."
            )
    unlike = [name for name in states if any(theirs[name] != everyone[0][name] for theirs in everyone)]
    own = {name: states[name] for name in states if name in unlike or isinstance(objects[name], AllGenerators)}
    ranks = [map_leaves(_unpacked, theirs) for theirs in world.to_first(map_leaves(_packed, own))]
    if not world.is_first:
        return None
    return states | {name: {MARK: "ranks", "states": [theirs[name] for theirs in ranks]} for name in own}


def _entry(name: str, value: Any) -> Any:
    """The state of what the caller gives under a name."""
    if not is_stateful(value) and not isinstance(value, (Mapping, list, torch.Tensor, np.ndarray)):
        raise InputError(
            f"also: {name} is of type {type(value).__name__}, which `load` could not change in place. Expected are "
            'objects with state_dict and load_state_dict, random generators, "all", tensors, arrays, and dicts and '
            "lists of them. Nothing was written."
        )
    try:
        return _state(value, f"{ALSO}: {name}")
    except RecursionError as error:
        raise InputError(f"also: {name} contains itself, which no file can hold. Nothing was written.") from error


def _state(value: Any, where: str) -> Any:
    value = plain_object(value)
    if isinstance(unwrap_optimizer(value), torch.optim.Optimizer):
        raise InputError(
            f"{where} is an optimizer: pass it as `optimizer`, alone or in a dict of optimizers, so that its state "
            "follows the names of parameters. Nothing was written."
        )
    if is_stateful(value):
        return {MARK: "object", "class": class_name(value), "state": marked(state_of(value), where)}
    if type(value) is dict:
        return escaped({key: _state(item, f"{where}.{key}") for key, item in value.items()})
    if type(value) is list:
        return [_state(item, f"{where}.{i}") for i, item in enumerate(value)]
    return marked(value, where)


@dataclass(frozen=True)
class _Packed:
    """A tensor on its way between ranks: torch's own messages have no room for every dtype."""

    dtype: torch.dtype
    shape: torch.Size
    data: bytes


def _packed(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    dense = leaf.detach().cpu().contiguous()
    return _Packed(leaf.dtype, leaf.shape, dense.reshape(-1).view(torch.uint8).numpy().tobytes())


def _unpacked(leaf: Any) -> Any:
    if not isinstance(leaf, _Packed):
        return leaf
    flat = torch.frombuffer(bytearray(leaf.data), dtype=torch.uint8) if leaf.data else torch.empty(0, dtype=torch.uint8)
    return flat.view(leaf.dtype).reshape(leaf.shape)


def _refuse_unloadable(states: States) -> None:
    """Refuse what a load would not give back, by its path."""
    if is_plain(states):
        return
    try:
        data_pkl: Any = records_of(states)[0][1]
    except Exception as error:  # of a method of any class
        raise unloadable(ALSO, states, f"{ALSO}: {error}") from error
    refuse_unloadable(ALSO, states, data_pkl)


def _sum(state: Any) -> int:
    """A checksum of a state that a load gives back."""
    found = 0
    for _, data in records_of(state):
        found = crc32(data if isinstance(data, bytes) else bytes_of(data.cpu()).numpy().data, found)
    return found
