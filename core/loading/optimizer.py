"""AdamW for a model: which weights decay, and how a saved state is matched with the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..bundle.optimizer_state import OTHER_MODEL, groups_of, names_in_order, recorded_names
from ..console.words import counted, listed, tell
from ..errors import CheckpointMismatch
from ..families.family import plain_name
from ..networks.wrappers import parameter_names
from .casts import cast_loss
from .mapped import Owner

if TYPE_CHECKING:
    from ..model import GPT

BETAS = (0.9, 0.95)
SWITCHES = ("amsgrad", "maximize", "foreach", "decoupled_weight_decay")
CONTINUED = {"betas", "eps", "weight_decay", "fused", *SWITCHES}
"""The settings that a saved group decides; the learning rate is the run's."""

DDP = ("module",)
"""The prefix that DistributedDataParallel adds to the names of parameters."""

ADAM_KEYS = {"step", "exp_avg", "exp_avg_sq"}
FUSED_DEVICES = ("cpu", "cuda")


def configure_optimizer(
    model: GPT | nn.Module,
    learning_rate: float,
    weight_decay: float | None = None,
    optimizer_state: dict[str, Any] | None = None,
    say: Callable[[str], None] = tell,
    owner: Owner | None = None,
) -> torch.optim.AdamW:
    """Make AdamW over the named parameters of a model; matrices and embeddings decay (by 0.1), biases and norms do not.

    Fused, which on two CPU cores takes a fifth of the time of the loop or less. With a state it continues as the
    optimizer that was saved, with its groups, betas, weight decay and kernel, as kernels differ in the last bits; only
    the learning rate is new, and the weight decay if one is given. A state is loaded by name, as
    `load_optimizer_state` does: parameters that it lacks start from zero, in the group of those like them. One without
    names and with a single group is taken to be in the order of the model's parameters. An `owner` decides which of its
    tensors are copied; without one all are.

    Raises: CheckpointMismatch when the given state is another model's.
    """
    everything = {plain_name(name, DDP): p for name, p in model.named_parameters()}
    named = {name: p for name, p in everything.items() if p.requires_grad}
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in named.values())
    if optimizer_state is None:
        decay = 0.1 if weight_decay is None else weight_decay
        groups = [
            {"params": [(n, p) for n, p in named.items() if p.dim() >= 2], "weight_decay": decay},
            {"params": [(n, p) for n, p in named.items() if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=BETAS, fused=fused)
    saved = groups_of(optimizer_state)
    names = [plain_name(n, DDP) for n in names_in_order(saved, {name: tuple(p.shape) for name, p in named.items()})]
    refuse([f"{name} is not in this model" for name in names if name not in everything])
    made = _like(saved, names, named, learning_rate, weight_decay, fused)
    for line in load_optimizer_state(made, optimizer_state, names, known=everything, owner=owner):
        say(line)
    return made


def _like(
    saved: Sequence[dict[str, Any]],
    names: Sequence[str],
    named: dict[str, nn.Parameter],
    learning_rate: float,
    weight_decay: float | None,
    fused: bool,
) -> torch.optim.AdamW:
    """AdamW with the groups and hyper-parameters of a saved one, as far as this device has them."""
    rest, new = iter(names), [name for name in named if name not in set(names)]
    groups: list[dict[str, Any]] = []
    for group in saved:
        kept = {key: value for key, value in group.items() if key in CONTINUED}
        if weight_decay is not None and kept.get("weight_decay"):
            kept["weight_decay"] = weight_decay
        kept["fused"] = (kept.get("fused") and fused) or None
        mine = [name for name in (next(rest) for _ in group["params"]) if name in named]
        groups.append({**kept, "params": [(name, named[name]) for name in mine], "capturable": False})
    for name in new:
        alike = [g for g in groups if any((p.dim() < 2) == (named[name].dim() < 2) for _, p in g["params"])]
        (alike or groups)[-1]["params"].append((name, named[name]))
    refuse([fault for number, group in enumerate(groups) for fault in _impossible(number, group)])
    groups = [group for group in groups if group["params"]]
    # Passed to the constructor as well: only then does GradScaler leave it to the kernel to skip an update.
    return torch.optim.AdamW(groups, lr=learning_rate, fused=all(group["fused"] for group in groups) or None)


def _impossible(number: int, group: dict[str, Any]) -> list[str]:
    """List the settings of a group with which no update can be made; torch would fail only at the first one."""
    betas = group.get("betas", BETAS)
    numbers: dict[str, Any] = {name: group[name] for name in ("eps", "weight_decay") if name in group}
    faults = []
    if isinstance(betas, (tuple, list)) and len(betas) == 2:
        numbers = {f"betas[{i}]": beta for i, beta in enumerate(betas)} | numbers
    else:
        faults = [f"betas is {betas!r}, expected two numbers of at least 0"]
    faults += [
        f"{name} is {value!r}, expected a number of at least 0"
        for name, value in numbers.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf
    ]
    faults += [
        f"{name} is {group[name]!r}, expected true or false"
        for name in SWITCHES
        if name in group and not isinstance(group[name], bool) and (name != "foreach" or group[name] is not None)
    ]
    return [f"group {number}: {fault}" for fault in faults]


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    names: Sequence[str] | None = None,
    *,
    model: nn.Module | None = None,
    known: Collection[str] = (),
    strict: bool = True,
    owner: Owner | None = None,
) -> list[str]:
    """Copy the moments of a saved state into an optimizer, and report which ones start from zero or are dropped.

    Hyper-parameters stay those of this run. Matches by name where the state carries names, or where `names` gives them
    in the state's order; else by order. The optimizer's own names are those of its groups, or of the `model`. Then
    order and groups do not matter; a parameter that the state lacks starts from zero; the moments of one that is
    `known` (by default: in the model) but not in the optimizer, since it is frozen, are dropped. Not `strict`, so are
    those of parameters that the model does not have. All is checked before anything changes. An `owner` decides which
    moments are copied; without one all are.
    (`Optimizer.load_state_dict` matches by position, checks no shape, keeps the tensors it is given and takes
    hyper-parameters from the file.)

    Raises: CheckpointMismatch naming what is missing, unexpected, or of another shape.
    """
    matched = match(optimizer, state, names, model=model, known=known, strict=strict)
    adam = isinstance(optimizer, torch.optim.Adam)
    refuse(
        [
            fault
            for one in matched.parameters
            if (fault := _fault(one.label, one.live, one.entry, one.group, adam or "betas" in one.group))
        ]
    )
    for one in matched.parameters:
        if one.entry:
            optimizer.state[one.live] = {k: _copy(k, v, one.live, one.group, owner) for k, v in one.entry.items()}
        elif one.is_new:
            optimizer.state.pop(one.live, None)
    return matched.lines


@dataclass(frozen=True)
class Parameter:
    """A live parameter of an optimizer, and what was saved of it."""

    label: str
    live: Tensor
    group: dict[str, Any]
    entry: dict[str, Any]  # empty where it was never updated
    saved: dict[str, Any] | None  # the group in which it was saved
    is_new: bool


@dataclass(frozen=True)
class Matched:
    """The parameters of an optimizer in order, and the lines about those that only one side has."""

    parameters: list[Parameter]
    lines: list[str]


def match(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    names: Sequence[str] | None = None,
    *,
    model: nn.Module | None = None,
    known: Collection[str] = (),
    strict: bool = True,
) -> Matched:
    """Find what a saved state has of each parameter of an optimizer, as `load_optimizer_state` says; change nothing.

    Raises: CheckpointMismatch naming what is missing or unexpected.
    """
    groups = groups_of(state)
    here = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    here_names = _names(optimizer.param_groups)
    lines, new = list[str](), list[str]()
    if model is not None:
        found_names = parameter_names(model)
        known = known or found_names.values()
        if all(id(p) in found_names for p, _ in here):
            here_names = [found_names[id(p)] for p, _ in here]
    there_ids = [i for group in groups for i in group["params"]]
    there_names = recorded_names(groups) or (list(names) if names is not None else None)
    if there_names is not None:  # a name that is here as it stands, like that of a part called module, has no wrapper
        mine = set(here_names or ())
        there_names = [name if name in mine else plain_name(name, DDP) for name in there_names]
    if there_names is not None and len(there_names) != len(there_ids):
        raise CheckpointMismatch(
            f"optimizer state: found {len(there_ids)} parameters for {len(there_names)} names. {OTHER_MODEL}"
        )
    if there_names is None or here_names is None:
        if len(there_ids) != len(here):
            raise CheckpointMismatch(
                f"optimizer state: found {len(there_ids)} parameters without names, expected {len(here)}. {OTHER_MODEL}"
            )
        labels = here_names or there_names or [f"parameter {i}" for i in range(len(here))]
        found = dict(zip(labels, there_ids, strict=True))
    else:
        labels, found = here_names, dict(zip(there_names, there_ids, strict=True))
        new = [name for name in labels if name not in found]
        gone = [name for name in found if name not in set(labels)]
        foreign = [name for name in gone if name not in set(known)]
        strangers = len(new) == len(labels) > 0 and len(found) > 0  # nothing in common
        refuse(
            [f"{name} is missing" for name in new if strangers]
            + [f"{name} is not in this model" for name in foreign if strict or strangers]
        )
        if new:
            lines.append(f"reset: {counted('new parameter', new)}; moments start from zero")
        if gone:
            lines.append(f"dropped: the moments of {counted('parameter', gone)}, no longer in the optimizer")
    home = {i: group for group in groups for i in group["params"]}
    return Matched(
        [
            Parameter(
                label, p, group, state["state"].get(i := found.get(label), {}), home.get(i), is_new=label in set(new)
            )
            for label, (p, group) in zip(labels, here, strict=True)
        ],
        lines,
    )


def _names(groups: list[dict[str, Any]]) -> list[str] | None:
    """Plain names in order, or None when a group has none."""
    names = recorded_names(groups)
    return [plain_name(name, DDP) for name in names] if names is not None else None


def _fault(label: str, p: Tensor, entry: dict[str, Any], settings: dict[str, Any], adam: bool) -> str | None:
    """The fault of the saved entry of parameter p, if any; an empty entry was never updated."""
    return misfit(label, p, entry, settings, adam) or lossy(label, entry, p.dtype)


def misfit(label: str, p: Tensor, entry: dict[str, Any], settings: dict[str, Any], adam: bool) -> str | None:
    """Say what keys or shapes of a saved entry do not fit parameter p; an empty entry was never updated."""
    if adam and entry and not entry.keys() >= ADAM_KEYS:
        return f"{label} has {', '.join(sorted(map(str, entry)))}, expected {', '.join(sorted(ADAM_KEYS))}"
    if entry and settings.get("amsgrad") and "max_exp_avg_sq" not in entry:
        return f"{label} has no max_exp_avg_sq, which amsgrad needs"
    for key, value in entry.items():
        expected = () if key == "step" else tuple(p.shape)
        if isinstance(value, Tensor) and tuple(value.shape) not in ({expected, ()} if not adam else {expected}):
            return f"{label}: {key} is {list(value.shape)}, expected {list(expected)}"
    return None


def lossy(label: str, entry: dict[str, Any], dtype: torch.dtype) -> str | None:
    """Say which value of a saved entry a dtype cannot hold, if any."""
    for key, value in entry.items():
        if isinstance(value, Tensor) and key != "step" and value.is_floating_point():
            fault, _ = cast_loss(value, dtype)
            if fault:
                return f"{label}: {key}: {fault}, the dtype of its parameter"
    return None


def refuse(faults: list[str]) -> None:
    """Raise for the faults of a state, if there are any.

    Raises: CheckpointMismatch.
    """
    if faults:
        raise CheckpointMismatch(f"optimizer state: {listed(faults)}. {OTHER_MODEL}")


def _copy(key: str, value: Any, p: Tensor, group: dict[str, Any], owner: Owner | None) -> Any:
    """Copy one value of a saved entry to where the optimizer needs it: counts on the CPU unless a kernel reads them."""
    if key == "step":
        on_device = group.get("fused") or group.get("capturable")
        return torch.as_tensor(value, dtype=torch.float32, device="cpu").to(p.device if on_device else "cpu", copy=True)
    if isinstance(value, Tensor) and hasattr(p, "device_mesh"):
        from .spread import block_like  # imports torch.distributed, which one process does not need

        return block_like(value, p)
    if isinstance(value, Tensor) and owner is not None and p.device.type == "cpu":
        return owner.own(value, p.dtype if value.is_floating_point() else None)
    if isinstance(value, Tensor):
        return value.detach().to(device=p.device, dtype=p.dtype if value.is_floating_point() else None, copy=True)
    return value
