"""What has a state of its own beside module and optimizer: schedulers, scalers, loaders, random generators."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..console.commands import typed
from ..errors import CheckpointMismatch, InputError
from .distributed import World, group_size
from .wrappers import plain_tensors, unwrap

ALL = "all"
"""In the place of an object: the generators of this process that Python, NumPy and torch draw from by default."""


def named(also: Mapping[str, Any], world: World) -> dict[str, Any]:
    """The objects of a caller by name, with those that `all` stands for.

    Raises: InputError for another form, and for `all` where other processes have generators of their own.
    """
    if not isinstance(also, Mapping):
        raise InputError(
            f"also is of type {type(also).__name__}, expected a dict of objects by name. Nothing was changed."
        )
    if wrong := [name for name in also if not isinstance(name, str)]:
        raise InputError(f"also: found the name {wrong[0]!r}, expected a text. Nothing was changed.")
    found = {name: AllGenerators() if isinstance(one, str) and one == ALL else one for name, one in also.items()}
    others = group_size()
    if world.size < others and (alone := [n for n, one in found.items() if isinstance(one, AllGenerators)]):
        raise InputError(
            f'also: {alone[0]} is "all" in a group of {others} processes, and the manager is of one: the others would '
            "lose theirs. Make it on every rank, with CheckpointManager(..., ranks=WorldRanks.joined()) of "
            f"{typed('core.training.ranks')}. Nothing was changed."
        )
    return found


class AllGenerators:
    """Python's `random`, NumPy's legacy functions, torch on the CPU, and on every GPU of this process."""

    def state_dict(self) -> dict[str, Any]:
        """Their states by name; that of the GPUs is a list, empty where this process has none."""
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give all of them the states that they had.

        Raises: ValueError where this process has another number of GPUs.
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if len(state["cuda"]) != gpus:
            raise ValueError(f"found the generators of {len(state['cuda'])} GPUs, expected {gpus}")
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if gpus:
            torch.cuda.set_rng_state_all(state["cuda"])


class _Way(NamedTuple):
    """How the state of a class of objects is read and set."""

    read: Callable[[Any], Any]
    put: Callable[[Any, Any], Any]


def _module_state(module: nn.Module) -> dict[str, Any]:
    return {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in plain_tensors(module).items()}


def _fill_module(module: nn.Module, state: dict[str, Any]) -> None:
    """Load a state with plain names into a module whose names may be others: parts of it may be wrapped."""
    own = dict(zip(plain_tensors(module), module.state_dict(), strict=True))
    module.load_state_dict({own.get(name, name): value for name, value in state.items()})


_WAYS: dict[type, _Way] = {
    nn.Module: _Way(_module_state, _fill_module),
    random.Random: _Way(lambda one: one.getstate(), lambda one, state: one.setstate(state)),
    np.random.RandomState: _Way(lambda one: one.get_state(legacy=False), lambda one, state: one.set_state(state)),
    np.random.Generator: _Way(
        lambda one: one.bit_generator.state, lambda one, state: setattr(one.bit_generator, "state", state)
    ),
    torch.Generator: _Way(lambda one: one.get_state(), lambda one, state: one.set_state(state)),
}
"""What has no state_dict, and modules, whose wrappers leave no trace."""


_STATE_DICT = _Way(lambda one: one.state_dict(), lambda one, state: one.load_state_dict(state))


def plain_object(value: Any) -> Any:
    """An object without the wrappers of other libraries: a module, and torch's scheduler in that of accelerate."""
    if isinstance(value, nn.Module):
        return unwrap(value)
    return vars(value)["scheduler"] if type(value).__name__ == "AcceleratedScheduler" else value


def is_stateful(value: Any) -> bool:
    """Whether an object has a state that can be read and set; its class alone has none."""
    return not isinstance(value, type) and (
        isinstance(value, tuple(_WAYS))
        or all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))
    )


def class_name(value: Any) -> str:
    """The name by which a file records the class of an object."""
    return "all generators" if isinstance(value, AllGenerators) else type(value).__qualname__


def state_of(value: Any) -> Any:
    """The state of an object as it is now; it may share memory with the object."""
    return _way(value).read(value)


def put_state(value: Any, state: Any, where: str) -> Callable[[], None]:
    """Give an object a state, and return what takes that back.

    Raises: CheckpointMismatch, beginning with `where`, when the object does not take it; it is as before then.
    """
    way = _way(value)
    before = copy.deepcopy(way.read(value))
    try:
        way.put(value, state)
    except Exception as error:  # of a method of any class
        way.put(value, before)
        raise CheckpointMismatch(
            f"{where}: {class_name(value)} does not take the state that was saved ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}). Load it into what was saved, or without it. Nothing was changed."
        ) from error
    return lambda: way.put(value, before)


def _way(value: Any) -> _Way:
    return next((way for kind, way in _WAYS.items() if isinstance(value, kind)), _STATE_DICT)
