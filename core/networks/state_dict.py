"""The tensors of a live module under their plain names, and its optimizer's state with those names."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
import torch
from torch import nn

from ..containers.spec import ITEM_SIZES
from ..containers.trees import map_paths
from ..errors import InputError
from ..families.family import plain_name

UNNAMED = "unnamed."
"""Begins the name of an optimizer's parameter that is not the module's."""


_CLASSES = {torch.Tensor, nn.Parameter}
_DTYPES = {getattr(torch, dtype) for dtype in ITEM_SIZES}
"""Classes and dtypes of tensors that a file can hold."""


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, DistributedDataParallel and DataParallel, in any order."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(module, wrappers):
            module = module.module
        else:
            return module


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor in the memory of this rank: all of it, unless it is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def export_state_dict(module: nn.Module) -> dict[str, Any]:
    """Collect parameters and buffers under plain names; tied ones stay one tensor, views are cut from their storage.

    The extra states of modules are among them, as they are.
    """
    compacted: dict[tuple[Any, ...], torch.Tensor] = {}
    found = {}
    for name, value in unwrap(module).state_dict(keep_vars=True).items():
        where = f"model.pt: {name}"
        found[plain_name(name)] = compact(value, compacted, where) if is_tensor(name, value, where) else value
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


def export_optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """Collect an optimizer's state; each group lists the names of its parameters as `param_names`.

    torch.optim matches a state by position alone; the names are what lets a later load check and reorder it.
    """
    names = {id(p): plain_name(name) for name, p in unwrap(module).named_parameters()}
    state = optimizer.state_dict()
    for saved, live in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved["param_names"] = [names.get(id(p), f"{UNNAMED}{i}") for i, p in enumerate(live["params"])]
    seen: dict[tuple[Any, ...], torch.Tensor] = {}
    state["state"] = {
        number: {
            key: compact(v, seen, f"optimizer.pt: state.{number}.{key}") if isinstance(v, torch.Tensor) else v
            for key, v in values.items()
        }
        for number, values in state["state"].items()
    }
    return state


def changed_by_step(optimizer: torch.optim.Optimizer) -> set[int]:
    """Identify the storages that change in the optimizer's step, and by what follows it: its parameters and state."""
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {tensor.untyped_storage()._cdata for tensor in (*state, *parameters)}


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
