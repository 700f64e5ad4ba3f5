"""Fill an existing module, and its optimizer, from a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..bundle.bundle import Bundle
from ..bundle.folder import MODEL
from ..console.words import counted, differences, listed
from ..containers.trees import map_leaves
from ..errors import CheckpointMismatch
from ..families.family import plain_names
from ..model import GPT
from ..networks.frozen import Frozen
from ..networks.modded import ModdedGPT
from ..networks.state_dict import is_extra, local
from ..networks.wrappers import Optimizers, owners_of_extra, plain_tensors
from .casts import cast_loss
from .modded import refuse_other_shapes
from .restore import load_optimizers
from .tensors import load_weights, read_part

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Live tensors by name, each with the saved one."""


@dataclass
class Fit:
    """What is copied into a live module: tensors, and the extra states of its submodules."""

    pairs: Pairs = field(default_factory=dict)
    extra: list[tuple[nn.Module, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # what is left alone, and what the copy changes


def fill_live(
    bundle: Bundle,
    module: nn.Module,
    optimizer: Optimizers | None,
    say: Callable[[str], None],
    strict: bool = True,
    frozen: Frozen | None = None,
) -> None:
    """Copy the weights of a step into a module, and all of its optimizers; report what was left alone.

    `frozen` computes the digests of what the step left out.

    Raises: CheckpointMismatch when names, shapes or values do not fit; module and optimizer are unchanged then.
    """
    modded = isinstance(module, ModdedGPT) and not bundle.state.frozen
    fit = _fit_modded(bundle, module) if isinstance(module, ModdedGPT) and modded else fitting(bundle, module, strict)
    if bundle.state.frozen:
        (frozen or Frozen()).compare(plain_tensors(module), bundle.state.frozen, bundle.weights.source.path)
    fit.lines += _rounded(fit.pairs, bundle)
    for line in fit.lines:
        say(f"{bundle.path(MODEL)}: {line}")
    if optimizer is not None:
        load_optimizers(bundle, module, optimizer, say, strict)
    if modded:
        module.load_state_dict({name: saved for name, (_, saved) in fit.pairs.items()})
        return
    with torch.no_grad():
        for live, saved in fit.pairs.values():
            _row(live, live).copy_(_row(_like(live, saved), live))
    for owner, state in fit.extra:
        owner.set_extra_state(map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state))


def _like(live: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """A saved tensor as the live one is: where that is sharded, this rank's block."""
    if not hasattr(live, "device_mesh"):
        return saved
    from .spread import block_like  # imports torch.distributed, which one process does not need

    return block_like(saved, live)


def _row(tensor: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that fills a live one: its first row in each dimension along which that is expanded."""
    for dim, (size, stride) in enumerate(zip(live.shape, local(live).stride(), strict=True)):
        if size > 1 and not stride:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def fitting(bundle: Bundle, module: nn.Module, strict: bool = True) -> Fit:
    """Pair the tensors of a live module with the weights of a bundle, and report those without a counterpart.

    Unless `strict`, tensors that only one side has are left alone; else they are an error. Different shapes always are.

    Raises: CheckpointMismatch when names or shapes do not fit.
    """
    base = bundle.state.frozen or {}
    saved = load_weights(bundle) if isinstance(module, GPT) and not base else read_part(bundle.weights)
    live = {name: tensor for name, tensor in plain_tensors(module).items() if name not in base}
    owners = owners_of_extra(module)
    new, left = [n for n in live if n not in saved], [n for n in saved if n not in live]
    common = [name for name in live if name in saved]
    compared = common if common and not strict else {**live, **saved}
    expected, found = ({n: _shape(n, t) for n, t in side.items() if n in compared} for side in (live, saved))
    if faults := differences(expected, found):
        hint = " What fits is loaded with strict=False." if common and strict and (new or left) else ""
        raise CheckpointMismatch(f"{bundle.weights.source.path} does not fit this model: {listed(faults)}.{hint}")
    if deaf := [name for name in common if name in owners and not _takes_extra(owners[name])]:
        raise CheckpointMismatch(
            f"{bundle.weights.source.path} does not fit this model: its modules have no set_extra_state for "
            f"{listed(deaf, separator=', ')}."
        )
    fit = Fit({name: (live[name], saved[name]) for name in common if name not in owners})
    fit.extra = [(owners[name], saved[name]) for name in common if name in owners]
    fit.lines += [f"new: {counted('tensor', new)}, not in the checkpoint; they stay as they are"] if new else []
    fit.lines += [f"left out: {counted('tensor', left)}, not in the module"] if left else []
    return fit


def _takes_extra(module: nn.Module) -> bool:
    return type(module).set_extra_state is not nn.Module.set_extra_state


def _shape(name: str, value: Any) -> tuple[int, ...]:
    """The shape of a tensor; an extra state, which may be anything, has none."""
    return () if is_extra(name) else tuple(value.shape)


def _fit_modded(bundle: Bundle, module: ModdedGPT) -> Fit:
    refuse_other_shapes(bundle, module)
    live, saved = module.state_dict(keep_vars=True), read_part(bundle.weights)
    return Fit({name: (live[plain], saved[name]) for plain, name in plain_names(saved).items()})


def _rounded(pairs: Pairs, bundle: Bundle) -> list[str]:
    """Report which tensors the copy rounds to fewer digits.

    Raises: CheckpointMismatch when it would lose more: a live tensor that holds nothing or cannot hold a value, or one
    that two saved ones with different values would fill.
    """
    faults, rounded = _doubly_filled(pairs), []
    for name, (live, saved) in pairs.items():
        if live.is_meta:
            faults.append(
                f"{name} is on the meta device, where it holds no values (module.to_empty makes room for them)"
            )
            continue
        row = _row(saved, live)
        if row is not saved and not torch.equal(row.expand_as(saved), saved):
            faults.append(f"{name} is expanded, one row in memory, and the file has different ones (clone it first)")
            continue
        fault, less = cast_loss(saved, live.dtype)
        faults += [f"{name}: {fault}, its dtype in the module"] if fault else []
        rounded += [f"{name}: {saved.dtype} to {live.dtype}".replace("torch.", "")] if less else []
    if faults:
        raise CheckpointMismatch(
            f"{bundle.weights.source.path} does not fit this model: {listed(faults)}. Nothing was changed."
        )
    return [f"rounded: {counted('tensor', rounded)}"] if rounded else []


def _doubly_filled(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> list[str]:
    """Find live tensors that are tied, which saved ones with different values would fill one after the other."""
    first: dict[tuple[Any, ...], str] = {}
    faults = []
    for name, (live, saved) in pairs.items():
        part = local(live)
        if part.is_meta or not part.numel():
            continue
        other = first.setdefault((part.data_ptr(), part.shape, part.stride()), name)
        before = pairs[other][1]
        if before.data_ptr() != saved.data_ptr() and (before.dtype != saved.dtype or not torch.equal(before, saved)):
            faults.append(f"{other} and {name} are one tensor in the module, and differ in the file (untie them first)")
    return faults
