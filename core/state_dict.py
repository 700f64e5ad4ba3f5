"""The tensors of a live module under their plain names, and its optimizer's state with those names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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


def plain_name(name: str) -> str:
    """Take the name of a compiled submodule's tensor back to what the uncompiled one has."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def export_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """Collect parameters and buffers under plain names; tied ones stay one tensor, views are cut from their storage."""
    compacted: dict[tuple[Any, ...], torch.Tensor] = {}
    found = {}
    for name, tensor in unwrap(module).state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            found[plain_name(name)] = compact(tensor, compacted)
    return found


def compact(tensor: torch.Tensor, seen: dict[tuple[Any, ...], torch.Tensor]) -> torch.Tensor:
    """Return a tensor that owns a storage of just its size; equal views (tied weights) give the same tensor."""
    tensor = tensor.detach()
    key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    if key not in seen:
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        seen[key] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    return seen[key]


def export_optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Any]:
    """Collect an optimizer's state; each group lists the names of its parameters as `param_names`.

    torch.optim matches a state by position alone; the names are what lets a later load check and reorder it.
    """
    names = {id(p): plain_name(name) for name, p in unwrap(module).named_parameters()}
    state = optimizer.state_dict()
    for saved, live in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved["param_names"] = [names.get(id(p), f"unnamed.{i}") for i, p in enumerate(live["params"])]
    seen: dict[tuple[Any, ...], torch.Tensor] = {}
    for values in state["state"].values():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                values[key] = compact(value, seen)
    return state
