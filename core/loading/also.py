"""Give the objects of a caller the states that a step has of them, in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..bundle.bundle import ALSO, Bundle
from ..containers.trees import leaves, map_leaves
from ..errors import CheckpointMismatch
from ..networks.distributed import World
from ..networks.marked import ObjectState, RankStates, unmarked
from ..networks.stateful import class_name, is_stateful, named, plain_object, put_state
from .tensors import read_part

Action = Callable[[], Callable[[], object]]
"""Changes one thing, and returns what takes that back."""


@contextlib.contextmanager
def also_restored(
    bundle: Bundle, also: Mapping[str, Any] | None, world: World, say: Callable[[str], None], strict: bool
) -> Iterator[None]:
    """Restore the objects, and take all of it back where that, or the block, fails.

    What the step has and nobody asks for is reported. An object of which it has nothing is an error, unless `strict` is
    off; that is reported as well then.

    Raises: CheckpointMismatch when an object is another one than was saved; nothing is changed then.
    """
    actions, lines = _prepared(bundle, also or {}, world, strict)
    with contextlib.ExitStack() as undo:
        for action in actions:
            undo.callback(action())
        yield
        undo.pop_all()
    for line in lines:
        say(f"{bundle.path(ALSO)}: {line}")


def _prepared(bundle: Bundle, also: Mapping[str, Any], world: World, strict: bool) -> tuple[list[Action], list[str]]:
    """What restores the objects, and what there is to say; nothing is changed yet."""
    path, objects = bundle.path(ALSO), named(also, world)
    saved = {} if bundle.also is None else map_leaves(_own, read_part(bundle.also))
    actions: list[Action] = []
    lines: list[str] = []
    if missing := [name for name in objects if name not in saved]:
        found = (
            f"found {', '.join(saved) or 'nothing beside model and optimizer'}, expected {', '.join(missing)} as well"
        )
        if strict:
            raise CheckpointMismatch(
                f"{path}: {found}. Load without {' and '.join(missing)}, to begin anew with what you have. Nothing was "
                "changed."
            )
        lines.append(f"{found}; what is missing stays as it is")
    if left := [name for name in saved if name not in objects]:
        lines.append(f"left out, because nobody asked for it: {', '.join(left)}")
    for name, live in objects.items():
        if name not in saved:
            continue
        where = f"{path}: {name}"
        state = unmarked(saved[name], where)
        if isinstance(state, RankStates):
            here, there = world.size, len(state.states)
            if here != there:
                lines.append(
                    f"{name} is of {there} processes, here are {here}; each takes that of its rank, if there is one"
                )
            if world.rank >= there:
                continue
            state = state.states[world.rank]
        actions += _actions(live, state, where)
    return actions, lines


def _own(leaf: Any) -> Any:
    """A leaf in memory of its own, in place of the mapped file."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _actions(live: Any, saved: Any, where: str) -> list[Action]:
    """What makes a live value equal to the one that was saved, in place.

    Raises: CheckpointMismatch where it cannot.
    """
    live = plain_object(live)
    if not _fits(live, saved):
        raise CheckpointMismatch(
            f"{where} was saved from {_described(saved)}, expected {_described(live)}. Load it into what was saved, or "
            "without it. Nothing was changed."
        )
    if isinstance(saved, ObjectState):
        return [lambda: put_state(live, saved.state, where)]
    if isinstance(live, torch.Tensor):
        return [lambda: _put(live, saved, live.clone(), _copy_tensor)]
    if isinstance(live, np.ndarray):
        return [lambda: _put(live, saved, live.copy(), np.copyto)]
    places = live.items() if isinstance(live, dict) else enumerate(live)
    held = dict(saved.items() if isinstance(saved, dict) else enumerate(saved))
    actions: list[Action] = []
    for key, value in places:
        if key not in held and _objects(value):
            raise CheckpointMismatch(f"{where}: found no {key}, expected {_described(value)}. Nothing was changed.")
        if key in held and (_fits(plain_object(value), held[key]) or _objects(value)):
            actions += _actions(value, held[key], f"{where}.{key}")
            held[key] = value
    if alone := [key for key, value in held.items() if any(isinstance(leaf, ObjectState) for leaf in leaves(value))]:
        raise CheckpointMismatch(
            f"{where}: found {alone[0]}, expected an object that takes its state. Nothing was changed."
        )
    if isinstance(live, dict):
        return [*actions, lambda: _put(live, held, dict(live), _fill_dict)]
    return [*actions, lambda: _put(live, list(held.values()), list(live), _fill_list)]


def _fits(live: Any, saved: Any) -> bool:
    """Whether a live value can become the saved one in place."""
    if isinstance(saved, ObjectState) or is_stateful(live):
        return isinstance(saved, ObjectState) and is_stateful(live) and saved.kind == class_name(live)
    if isinstance(live, (torch.Tensor, np.ndarray)):
        tensors = isinstance(live, torch.Tensor) == isinstance(saved, torch.Tensor)
        return tensors and hasattr(saved, "dtype") and (saved.dtype, saved.shape) == (live.dtype, live.shape)
    return any(isinstance(live, kind) and isinstance(saved, kind) for kind in (dict, list))


def _objects(value: Any) -> bool:
    """Whether there are objects with a state in a live value."""
    return any(is_stateful(plain_object(leaf)) for leaf in leaves(value))


def _put(live: Any, value: Any, before: Any, fill: Callable[[Any, Any], object]) -> Callable[[], object]:
    fill(live, value)
    return lambda: fill(live, before)


def _copy_tensor(live: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        live.copy_(value)


def _fill_dict(live: dict[Any, Any], values: Mapping[Any, Any]) -> None:
    live.clear()
    for key, value in values.items():  # a counter's update would add
        live[key] = value


def _fill_list(live: list[Any], values: list[Any]) -> None:
    live[:] = values


def _described(value: Any) -> str:
    """Say what a live or a saved value is."""
    if isinstance(value, ObjectState):
        return value.kind
    if isinstance(value, (torch.Tensor, np.ndarray)):
        kind = "a tensor" if isinstance(value, torch.Tensor) else "an array"
        return f"{kind} of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return class_name(value) if is_stateful(value) else f"a {type(value).__name__}"
