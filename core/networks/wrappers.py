"""What other programs wrap around a module or an optimizer, and several of them as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..console.words import listed
from ..errors import InputError
from ..families.family import HELD, plain_name

Optimizers = torch.optim.Optimizer | Mapping[str, Any] | list[Any] | tuple[Any, ...]
Modules = nn.Module | Mapping[str, nn.Module] | list[nn.Module] | tuple[nn.Module, ...]


def held_by(module: nn.Module) -> str | None:
    """The path inside a wrapper to the module that it wraps, such as "module"; None for any other module."""
    parts = module._modules
    for name in HELD:
        if parts.get(name) is not None:
            return name
    if parts.get("module") is not None and _is_a(module, "DistributedDataParallel", "DataParallel"):
        return "module"
    base = parts.get("base_model")
    if base is not None and _is_a(module, "PeftModel") and (model := base._modules.get("model")) is not None:
        inner = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        if all(id(tensor) in inner for tensor in (*module.parameters(), *module.buffers())):  # no encoder of prompts
            return "base_model.model"
    return None


def _is_a(module: nn.Module, *names: str) -> bool:
    """Whether a module is of a class of one of these names, or of one derived from it."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, DistributedDataParallel, Fabric, PEFT and the like, in any order."""
    while (path := held_by(module)) is not None:
        module = module.get_submodule(path)
    return module


def as_module(modules: Modules) -> nn.Module:
    """Return one module: the given one without its wrappers, or a ModuleDict or ModuleList of several.

    Raises: InputError naming what is not a module, or a name that a module cannot have.
    """
    if isinstance(modules, nn.Module):
        return unwrap(modules)
    if not isinstance(modules, (Mapping, list, tuple)) or not modules:
        raise InputError(
            f"model is of type {type(modules).__name__}, expected a module, or a dict or list of modules. Nothing was "
            "changed."
        )
    named = modules if isinstance(modules, Mapping) else {str(i): module for i, module in enumerate(modules)}
    for name, module in named.items():
        if not isinstance(module, nn.Module):
            raise InputError(
                f"model[{name!r}] is of type {type(module).__name__}, expected a module. Nothing was changed."
            )
    plain = {name: unwrap(module) for name, module in named.items()}
    try:
        return nn.ModuleDict(plain) if isinstance(modules, Mapping) else nn.ModuleList(plain.values())
    except (KeyError, TypeError) as error:
        raise InputError(
            f"model: {error.args[0]}. Expected are names without dots; rename the module. Nothing was changed."
        ) from error


def plain_tensors(module: nn.Module) -> dict[str, Any]:
    """The entries of a module's state dict, live, under names without what wrappers anywhere in it add."""
    module = unwrap(module)
    paths = _paths(module)
    return {_without(paths, name): value for name, value in module.state_dict(keep_vars=True).items()}


def owners_of_extra(module: nn.Module) -> dict[str, nn.Module]:
    """The modules with an extra state, by the name under which `plain_tensors` has it."""
    module = unwrap(module)
    paths = _paths(module)
    return {
        _without(paths, f"{name}._extra_state" if name else "_extra_state"): part
        for name, part in module.named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state and held_by(part) is None
    }


def _paths(module: nn.Module) -> dict[str, str]:
    """The path to what it wraps of each wrapper in a module, by the wrapper's own name."""
    return {name: path for name, part in module.named_modules() if (path := held_by(part)) is not None}


def _without(paths: Mapping[str, str], name: str) -> str:
    """A name without the holders of wrappers; those that the wrapper itself has left out are not looked for."""
    if not paths:
        return plain_name(name)
    words = name.split(".")
    kept: list[str] = []
    at = 0
    prefix = ""
    while at < len(words):
        while (path := paths.get(prefix)) is not None:
            inner = path.split(".")
            prefix = f"{prefix}.{path}" if prefix else path
            if words[at : at + len(inner)] == inner:
                at += len(inner)
        if at >= len(words):
            break
        kept.append(words[at])
        prefix = f"{prefix}.{words[at]}" if prefix else words[at]
        at += 1
    return plain_name(".".join(kept))


def parameter_names(module: nn.Module) -> dict[int, str]:
    """The name of each parameter in `model.pt` by its identity; a tied one has its first name."""
    module = unwrap(module)
    names: dict[int, str] = {}
    if _paths(module):  # a state dict, which takes longer, has the names where wrappers have some of their own
        for name, value in plain_tensors(module).items():
            names.setdefault(id(value), name)
    for name, parameter in module.named_parameters():
        names.setdefault(id(parameter), plain_name(name))
    return names


def optimizers_by_name(optimizer: Any) -> dict[str, torch.optim.Optimizer] | None:
    """The optimizers of a dict or a list by name, and of a single one under ""; None for anything else.

    They are without wrappers, like that of accelerate.

    Raises: InputError naming what is among them and is no optimizer.
    """
    if isinstance(optimizer, torch.optim.Optimizer) or _inside(optimizer) is not None:
        return {"": unwrap_optimizer(optimizer)}
    if not isinstance(optimizer, (Mapping, list, tuple)):
        return None
    named = optimizer if isinstance(optimizer, Mapping) else {str(i): one for i, one in enumerate(optimizer)}
    found = {name: unwrap_optimizer(one) for name, one in named.items()}
    if not any(isinstance(one, torch.optim.Optimizer) for one in found.values()):
        return None
    wrong = [
        f"optimizer[{name!r}] is of type {type(one).__name__}"
        for name, one in found.items()
        if not isinstance(one, torch.optim.Optimizer)
    ]
    wrong += [f"the name {name!r} is no text" for name in found if not isinstance(name, str)]
    if wrong:
        raise InputError(f"{listed(wrong)}, expected optimizers by name. Nothing was changed.")
    return found


def class_names(optimizers: Mapping[str, torch.optim.Optimizer]) -> str | dict[str, str]:
    """The name of the class of each optimizer, or of a single one under ""."""
    names = {name: type(optimizer).__name__ for name, optimizer in optimizers.items()}
    return names[""] if names.keys() == {""} else names


def says_when_it_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook runs before everything by which an optimizer changes parameters.

    One without torch's constructor has no hooks, and schedule-free ones change them in `eval` and `train` as well.
    """
    return "_optimizer_step_pre_hooks" in vars(optimizer) and not callable(getattr(optimizer, "eval", None))


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer whose parameters and state a wrapper shows as its own, as AcceleratedOptimizer does."""
    while (inner := _inside(optimizer)) is not None:
        optimizer = inner
    return optimizer


def _inside(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer that a wrapper holds: one over the same groups and the same state; None where there is none."""
    if isinstance(optimizer, (Mapping, list, tuple)) or not hasattr(optimizer, "param_groups"):
        return None
    for inner in getattr(optimizer, "__dict__", {}).values():
        if isinstance(inner, torch.optim.Optimizer) and inner is not optimizer and _same(optimizer, inner):
            return inner
    return None


def _same(optimizer: Any, inner: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has the very groups and state of another one."""
    groups, theirs = optimizer.param_groups, inner.param_groups
    same = len(groups) == len(theirs) and all(a is b for a, b in zip(groups, theirs, strict=True))
    return same and optimizer.state is inner.state
