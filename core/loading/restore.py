"""Optimizers as they were saved: their whole state, and the values of their groups."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..bundle.bundle import Bundle
from ..bundle.optimizer_state import groups_of, names_in_order, of_no_parameter, recorded_names, states_by_name
from ..bundle.parts import once
from ..console.words import listed
from ..containers.trees import map_leaves
from ..errors import CheckpointMismatch, InputError
from ..model import GPT
from ..networks.wrappers import Optimizers, class_names, optimizers_by_name
from .optimizer import FUSED_DEVICES, Matched, Parameter, lossy, match, misfit, refuse
from .tensors import load_optimizer, read_optimizer, recorded_dtype, say_without_moments

LATER = {"foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay"}
"""Settings that versions of torch have added to its optimizers: a file without them may be of the same class."""

DEVICES = {"fused": FUSED_DEVICES, "capturable": ("cuda", "xpu", "hpu")}
"""The devices that have what a setting asks for."""

MISFIT = "Nothing was changed."


@dataclass
class Prepared:
    """What an optimizer is going to be: the argument of its `load_state_dict`."""

    optimizer: torch.optim.Optimizer
    state: dict[str, Any]
    entries: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)  # of each parameter that has one
    lines: list[str] = field(default_factory=list)  # what is not as in the file


def load_optimizers(
    bundle: Bundle, module: nn.Module, optimizer: Optimizers, say: Callable[[str], None], strict: bool = True
) -> None:
    """Give the optimizers of a module everything that a step has of them; report what is not as in the file.

    Raises: CheckpointMismatch when they are others than those that were saved, InputError for what is no optimizer;
    nothing is changed then.
    """
    live = optimizers_by_name(optimizer)
    if live is None:
        raise InputError(
            f"optimizer is of type {type(optimizer).__name__}, expected an optimizer, or a dict or list of them. "
            "Nothing was changed."
        )
    whole = isinstance(module, GPT) and not bundle.state.frozen
    content = load_optimizer(bundle) if whole else read_optimizer(bundle)
    say_without_moments(bundle, content, say)
    if content is None or bundle.optimizer is None:
        return
    path = bundle.optimizer.source.path
    try:
        states = states_by_name(content)
        _refuse_others(live, states, bundle.state.optimizer_class)
        prepared = {}
        for name, state in states.items():
            try:
                prepared[name] = _prepare(live[name], state, bundle, module, alone=len(states) == 1, strict=strict)
            except CheckpointMismatch as error:
                raise CheckpointMismatch(f"{name}: {error}" if name else str(error)) from error
        _apply(prepared.values())
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{path}: {str(error).removesuffix(MISFIT).strip()} {MISFIT}") from error
    for name, one in prepared.items():
        for line in one.lines:
            say(f"{path}: {name + ': ' if name else ''}{line}")


def _refuse_others(live: Mapping[str, torch.optim.Optimizer], states: Mapping[str, Any], recorded: Any) -> None:
    """Refuse optimizers with other names, or of other classes, than those that were saved."""
    if live.keys() != states.keys():
        found, expected = (
            "one optimizer" if side.keys() == {""} else f"the optimizers {listed(list(side), separator=', ')}"
            for side in (states, live)
        )
        raise CheckpointMismatch(f"found {found}, expected {expected}. Load with the names that were saved.")
    here = class_names(live)
    if recorded is not None and recorded != here:
        raise CheckpointMismatch(
            f"found the state of {_told(recorded)}, expected that of {_told(here)}. Load into the optimizer that was "
            "saved, or load the model without one and start its moments from zero."
        )
    for name, optimizer in live.items() if recorded is None else ():
        for number, group in enumerate(groups_of(states[name])):
            missing = [key for key in optimizer.defaults if key not in group and key not in LATER]
            if missing and group["params"]:
                raise CheckpointMismatch(
                    f"group {number} has no {', '.join(missing)}, expected those of {type(optimizer).__name__}: "
                    "another optimizer was saved. Load into that one, or load the model without one."
                )


def _told(classes: Any) -> str:
    if not isinstance(classes, Mapping):
        return str(classes)[:80]
    return ", ".join(f"{name}: {kind}" for name, kind in classes.items())


def _prepare(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    bundle: Bundle,
    module: nn.Module,
    alone: bool,
    strict: bool,
) -> Prepared:
    """Copy a saved state into the order and the groups of an optimizer, without changing it."""
    groups = groups_of(state)
    names = recorded_names(groups)
    if names is None and alone:
        names = names_in_order(groups, once(bundle.weights.tensors))
    matched = match(optimizer, state, names, model=module, strict=strict)
    dtypes = {name: getattr(torch, spec.dtype, None) for name, spec in bundle.weights.tensors.items()}
    if isinstance(module, GPT):  # whose tensors may have other names in the file
        whole = recorded_dtype(bundle) or next(iter(dtypes.values()))
        dtypes = dict.fromkeys((one.label for one in matched.parameters), whole)
    made = Prepared(optimizer, {**state, "state": {}, "param_groups": []}, lines=list(matched.lines))
    numbers = {id(one.live): number for number, one in enumerate(matched.parameters)}
    for number, group in enumerate(optimizer.param_groups):
        settings = _settings(number, group, _homes(number, group, matched, groups, optimizer), optimizer, made.lines)
        settings["params"] = [numbers[id(p)] for p in group["params"]]
        made.state["param_groups"].append(settings)
    faults = []
    settings_of = {i: group for group in made.state["param_groups"] for i in group["params"]}
    adam = isinstance(optimizer, torch.optim.Adam)
    copies: dict[tuple[int, Any], Tensor] = {}
    for number, one in enumerate(matched.parameters):
        cast = dtypes.get(one.label)
        faults += [fault for fault in (_fault(one, settings_of[number], adam, cast),) if fault]
        if one.entry and not faults:
            entry = {key: _copied(key, value, one.live, cast, copies) for key, value in one.entry.items()}
            made.state["state"][number] = entry
            made.entries.append((one.live, entry))
    refuse(faults)
    device = next((one.live.device for one in matched.parameters), None)
    made.state["state"] |= map_leaves(functools.partial(_clone, device=device), of_no_parameter(state))
    return made


def _fault(one: Parameter, settings: dict[str, Any], adam: bool, saved: torch.dtype | None) -> str | None:
    """Say why the saved entry of a parameter does not fit it; None where it does."""
    if adam and (fault := misfit(one.label, one.live, one.entry, settings, adam)):
        return fault
    cast = {key: value for key, value in one.entry.items() if _follows(value, one.live, saved)}
    return lossy(one.label, cast, one.live.dtype)


def _follows(value: Any, p: Tensor, saved: torch.dtype | None) -> bool:
    """Whether a value has the dtype of its parameter, and takes its new one; any other stays as it was saved."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype == saved != p.dtype


def _copied(key: str, value: Any, p: Tensor, saved: torch.dtype | None, copies: dict[tuple[int, Any], Tensor]) -> Any:
    """Copy a value of an entry, nested or not, to the device of its parameter; equal tensors stay one tensor."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        device, dtype = (leaf.device, None) if key == "step" else (p.device, p.dtype)
        dtype = dtype if key != "step" and _follows(leaf, p, saved) else leaf.dtype
        place = (id(leaf), (device, dtype))
        if place not in copies:
            if hasattr(p, "device_mesh") and leaf.shape == p.shape:
                from .spread import block_like  # imports torch.distributed, which one process does not need

                copies[place] = block_like(leaf, p)
            else:
                copies[place] = leaf.detach().to(device=device, dtype=dtype, copy=True)
        return copies[place]

    return map_leaves(copy, value)


def _clone(leaf: Any, device: torch.device | None) -> Any:
    return leaf.detach().to(device=device, copy=True) if isinstance(leaf, Tensor) else leaf


def _homes(
    number: int, group: dict[str, Any], matched: Matched, saved: list[dict[str, Any]], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """The groups in which the parameters of a group were saved; of one without parameters that in its place."""
    mine = {id(p) for p in group["params"]}
    found = {id(one.saved): one.saved for one in matched.parameters if id(one.live) in mine and one.saved is not None}
    alike = len(saved) == len(optimizer.param_groups)
    if not mine and alike and not saved[number]["params"]:
        return [saved[number]]
    return list(found.values())


def _settings(
    number: int,
    group: dict[str, Any],
    saved: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    lines: list[str],
) -> dict[str, Any]:
    """The values of a group: those that were saved, and the live ones where a file has none or two; that is said."""
    made = {key: value for key, value in group.items() if key != "params"}
    device = next((p.device for p in group["params"]), None)
    keys = dict.fromkeys(key for one in saved for key in one if key not in ("params", "param_names"))
    for key in keys:
        values = [one[key] for one in saved if key in one]
        unlike = [value for value in values[1:] if not _equal(value, values[0])]
        here = f"{made[key]!r}" if key in made else "unset"
        if unlike or len(values) < len(saved):
            found = listed([repr(value) for value in values], separator=", ")
            lines.append(f"kept: {key} of group {number} stays {here}; its parameters were saved with {found}")
        elif values[0] and key in DEVICES and device is not None and device.type not in DEVICES[key]:
            lines.append(f"kept: {key} of group {number} stays {here}; {device.type} has no {key} kernel")
        else:
            target = made[key].device if isinstance(made.get(key), Tensor) else device
            made[key] = map_leaves(functools.partial(_clone, device=target), values[0])
    for key, value in made.items():
        ours = key not in keys and key != "param_names" and not _equal(value, optimizer.defaults.get(key))
        if saved and ours:
            lines.append(f"kept: {key} of group {number} stays {value!r}; the file has none")
    return made


def _equal(a: Any, b: Any) -> bool:
    """Whether two values of groups are equal: of one kind, tensors bit for bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b) or (a != a and b != b)


def _apply(prepared: Iterable[Prepared]) -> None:
    """Fill all optimizers, or none: one whose own `load_state_dict` fails leaves them as they were."""
    before = []
    for one in prepared:
        state, groups = one.optimizer.state, one.optimizer.param_groups
        before.append((one.optimizer, state, groups, dict(state), [dict(group) for group in groups]))
    for one in prepared:
        try:
            _fill(one)
        except Exception as error:  # of a method of any class
            for was in before:
                _put(*was)
            raise CheckpointMismatch(
                f"load_state_dict of {type(one.optimizer).__name__} did not take the state "
                f"({type(error).__name__}: {error})."
            ) from error


def _fill(one: Prepared) -> None:
    """Load a prepared state into the containers that an optimizer has, which wrappers and schedulers may hold."""
    optimizer = one.optimizer
    state, groups = optimizer.state, optimizer.param_groups
    optimizer.load_state_dict(one.state)
    _put(optimizer, state, groups, dict(optimizer.state), list(optimizer.param_groups))
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        return
    for p, entry in one.entries:  # torch gives all numbers the dtype of their parameter, and takes texts apart
        for key, value in entry.items():
            if key != "step" and not _equal_kinds(optimizer.state[p].get(key), value):
                optimizer.state[p][key] = value


def _put(optimizer: torch.optim.Optimizer, state: Any, groups: list[Any], entries: Any, settings: list[Any]) -> None:
    """Put entries and settings into the dicts and the list that an optimizer had."""
    if state is not entries:
        state.clear()
        state.update(entries)
    for group, values in zip(groups, settings, strict=True):
        if group is not values:
            values = dict(values)
            group.clear()
            group.update(values)
    optimizer.state, optimizer.param_groups = state, groups


def _equal_kinds(a: Any, b: Any) -> bool:
    """Whether two values are of one type, tensors of one dtype, and what is no tensor is equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal_kinds(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(_equal_kinds, a, b))
    return type(a) is type(b) and bool(a == b)
