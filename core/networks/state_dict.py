"""The tensors of a live module under their plain names, and its optimizer's state with those names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..console.words import counted, listed
from ..containers.spec import ITEM_SIZES
from ..containers.trees import leaves, map_paths
from ..errors import InputError
from .wrappers import parameter_names, plain_tensors

_CLASSES = {torch.Tensor, nn.Parameter}
_DTYPES = {getattr(torch, dtype) for dtype in ITEM_SIZES}
"""Classes and dtypes of tensors that a file can hold."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor in the memory of this rank: all of it, unless it is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def export_state_dict(module: nn.Module, without: Container[str] = ()) -> dict[str, Any]:
    """Collect parameters and buffers under plain names; tied ones stay one tensor, views are cut from their storage.

    The extra states of modules are among them, as they are.
    """
    compacted: dict[tuple[Any, ...], torch.Tensor] = {}
    found = {}
    for name, value in plain_tensors(module).items():
        if name in without:
            continue
        where = f"model.pt: {name}"
        found[name] = compact(value, compacted, where) if is_tensor(name, value, where) else value
    return found


def is_extra(name: str) -> bool:
    """Whether an entry of a module's state dict is what its `get_extra_state` returned."""
    return name.rpartition(".")[2] == "_extra_state"


def is_tensor(name: str, value: Any, where: str) -> bool:
    """Whether an entry of a module's state dict is a tensor; an extra state may be anything.

    Raises: InputError, beginning with `where`, for anything else: only a hook of the module puts it there.
    """
    if not isinstance(value, torch.Tensor) and not is_extra(name):
        raise InputError(
            f"{where} is of type {type(value).__name__}, expected a tensor: `load` fills tensors, and hands to "
            "set_extra_state what get_extra_state returned. Nothing was written."
        )
    return isinstance(value, torch.Tensor)


def compact(tensor: torch.Tensor, seen: dict[tuple[Any, ...], torch.Tensor], where: str) -> torch.Tensor:
    """Return a tensor whose storage has just its size; equal views (tied weights) give the same tensor.

    Raises: InputError, beginning with `where`, as `plain`.
    """
    tensor = plain(tensor, where).detach()
    key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    if key not in seen:
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        seen[key] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    return seen[key]


def plain(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Return a tensor that a file can hold: strided numbers in memory.

    Raises: InputError, beginning with `where`, for any other.
    """
    if fault := unusual(tensor):
        raise InputError(
            f"{where} is {fault}, which `load` could not give back. Expected is a dense tensor in memory: save "
            "what it is made of; nothing was written, and what was saved before stays."
        )
    return tensor


def unusual(tensor: torch.Tensor) -> str | None:
    """Say what a tensor is whose values a file could not give back: "a sparse tensor"; None for a plain one."""
    kind = type(tensor)
    if tensor.is_nested:
        return "a nested tensor"
    if kind not in _CLASSES:
        lazy = nn.parameter.is_lazy(tensor)
        return (
            "a parameter that is not initialized yet"
            if lazy
            else f"a tensor of class {kind.__module__}.{kind.__qualname__}"
        )
    if tensor.layout is not torch.strided:
        return f"a sparse tensor ({tensor.layout})"
    if tensor.is_meta:
        return "a tensor on the meta device, without values"
    if tensor.is_conj() or tensor.is_neg():
        return f"a view that {'conjugates' if tensor.is_conj() else 'negates'} another tensor"
    if tensor.dtype in _DTYPES:
        return None
    return "a quantized tensor" if tensor.is_quantized else f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"


def export_optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module, called: str = "") -> dict[str, Any]:
    """Collect an optimizer's state; each group lists the names of its parameters as `param_names`.

    torch.optim matches a state by position alone; the names, found by the identity of each parameter, are what lets a
    later load check and reorder it. `called` is its name among several, for errors.

    Raises: InputError for what a load could not give back: a parameter that the module does not hold, a state of
    another form, or one that another optimizer inside this one keeps for itself.
    """
    where = f"optimizer.pt: {called}." if called else "optimizer.pt: "
    names = parameter_names(module)
    _refuse_outside(optimizer, names, where)
    state = dict(optimizer.state_dict())
    entries, groups = state.get("state"), state.get("param_groups")
    if not isinstance(entries, dict) or not isinstance(groups, list) or len(groups) != len(optimizer.param_groups):
        raise InputError(
            f"{where}state_dict() of {type(optimizer).__name__} has {', '.join(map(str, state)) or 'nothing'}, "
            "expected state and param_groups (dict, list of dicts), by which a load finds parameters. Nothing was "
            "written."
        )
    state["param_groups"] = [
        {**group, "param_names": [names[id(p)] for p in live["params"]]}
        for group, live in zip(groups, optimizer.param_groups, strict=True)
    ]
    seen: dict[tuple[Any, ...], torch.Tensor] = {}
    state["state"] = {
        number: {
            key: compact(v, seen, f"{where}state.{number}.{key}") if isinstance(v, torch.Tensor) else v
            for key, v in values.items()
        }
        if isinstance(values, dict)
        else values
        for number, values in entries.items()
    }
    return state


def _refuse_outside(optimizer: torch.optim.Optimizer, names: Mapping[int, str], where: str) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if outside := [str(list(p.shape)) for p in held if id(p) not in names]:
        raise InputError(
            f"{where}the optimizer has {counted('parameter', outside)} outside the module, whose values would be lost. "
            'Save what holds them as well, each module under a name: save({"model": model, "loss": loss}, optimizer, '
            "...). Nothing was written."
        )
    if twice := [names[i] for i, count in Counter(map(id, held)).items() if count > 1]:
        raise InputError(f"{where}the optimizer has {listed(twice)} twice, expected once. Nothing was written.")


def export_optimizers(optimizers: Mapping[str, torch.optim.Optimizer], module: nn.Module) -> dict[str, Any]:
    """Collect the states of optimizers by name; that of a single one, under "", as it is.

    Raises: InputError as `export_optimizer_state`.
    """
    for name, optimizer in optimizers.items():
        _refuse_hidden(name, optimizer, list(optimizers.values()))
    if optimizers.keys() == {""}:
        return export_optimizer_state(optimizers[""], module)
    return {name: export_optimizer_state(optimizer, module, name) for name, optimizer in optimizers.items()}


def _refuse_hidden(name: str, optimizer: torch.optim.Optimizer, all_of_them: list[torch.optim.Optimizer]) -> None:
    """Refuse an optimizer that steps another one whose state is in no state_dict that is saved."""
    inside = {key: value for key, value in vars(optimizer).items() if isinstance(value, torch.optim.Optimizer)}
    hidden = {key: one for key, one in inside.items() if not any(one is other for other in all_of_them)}
    saved = {id(leaf) for leaf in leaves(optimizer.state_dict())} if any(o.state for o in hidden.values()) else set()
    for key, one in hidden.items():
        held = [leaf for leaf in leaves(list(one.state.values())) if isinstance(leaf, torch.Tensor)]
        if any(id(leaf) not in saved for leaf in held):
            raise InputError(
                f"optimizer.pt: {f'{name}: ' if name else ''}{type(optimizer).__name__} holds another optimizer "
                f"({key}: {type(one).__name__}), whose state its state_dict() leaves out. Save both: "
                f'{{"outer": optimizer, "{key}": optimizer.{key}}}. Nothing was written.'
            )


def changed_by_step(*optimizers: torch.optim.Optimizer) -> set[int]:
    """Identify the storages that change in a step of optimizers, and by what follows it: parameters and state."""
    found: set[int] = set()
    for optimizer in optimizers:
        entries = [values for values in optimizer.state.values() if isinstance(values, dict)]
        state = [v for values in entries for v in values.values() if isinstance(v, torch.Tensor)]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found |= {tensor.untyped_storage()._cdata for tensor in (*state, *parameters)}
    return found


def copy_others(content: Any, stable: Container[int] | None, live: dict[str, torch.Tensor], name: str) -> Any:
    """Copy the containers of a content, and its tensors except those whose storage is `stable` (None: all are).

    Identical tensors stay identical; those that are not copied go into `live` by name. NumPy's numbers become Python's.

    Raises: InputError as `plain`.
    """
    copies: dict[int, torch.Tensor] = {}

    def copy(path: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value.item() if isinstance(value, np.generic) else value
        if stable is None:  # a state that was not exported, where each tensor was looked at
            value = plain(value, f"{name}: {path}")
        if stable is None or value.untyped_storage()._cdata in stable:
            live[f"{name}.{path}"] = value
            return value
        if id(value) not in copies:
            copies[id(value)] = value.detach().clone()
        return copies[id(value)]

    return map_paths(copy, content)
