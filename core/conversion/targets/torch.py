"""Targets that are torch files: a state dict, alone or with the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...containers.tensors.views import View
from ..plan import TORCH_ENDINGS, Options, Plan, Ref, Source, Target, WeightFile, target_of
from ..sharded import add_optimizer
from .safetensors import ties

CKPT = "ckpt.pt"


def plan_pt(model: Source, options: Options, target: Path, kind: str = "pt") -> Plan:
    """Plan one torch file: a state dict, or with an optimizer `{"model", "optimizer"}`; one of these alone."""
    if options.include_optimizer and not model.along:
        return plan_torch_file(model, options, target, kind, {})
    before = "model." if model.along and model.tensors else ""
    targets = [target_of(model, name, target.name, options, before + name) for name in model.tensors]
    content = {one.name: Ref(one.path) for one in targets}
    file = WeightFile(target.name, targets, content, ties=options.tied is not False)
    if model.along:
        add_optimizer(model, file)
    return Plan(model, target, "pt", [file], is_folder=False)


def plan_torch_file(model: Source, options: Options, target: Path, kind: str, more: dict[str, Any]) -> Plan:
    """Plan a torch file of `model`, `optimizer` if requested, and further entries."""
    file = target.name if target.suffix in TORCH_ENDINGS else CKPT
    targets = [target_of(model, name, file, options, f"model.{name}") for name in model.tensors]
    content: dict[str, Any] = {"model": {one.name: Ref(one.path) for one in targets}}
    if options.include_optimizer:
        order = parameters_of(model)
        state, others = optimizer_content(
            model, order, file, "optimizer", named=kind != "nanogpt", by_name=kind == "dcp"
        )
        content["optimizer"] = state
        targets += others
    content |= more
    return Plan(model, target, kind, [WeightFile(file, targets, content)], is_folder=file != target.name)


def parameters_of(model: Source) -> list[str]:
    """Name each tensor of a model once, without the second names of tied ones."""
    aliases = ties(model)
    return [name for name in model.tensors if name not in aliases]


def optimizer_content(
    model: Source, order: list[str], file: str, prefix: str, named: bool, by_name: bool = False
) -> tuple[dict[str, Any], list[Target]]:
    """Lay out the moments as torch.optim does, in the order of the parameters in each group.

    With `by_name` the layout is that of torch's get_optimizer_state_dict: a name stands for the number of a parameter.

    Raises: CheckpointMismatch when the source has none, or has those of other parameters.
    """
    moments = model.moments
    if moments is None:
        why = next((note for note in model.notes if note.startswith("its optimizer state is left out")), None)
        raise model.refuse(f"{why or 'it has no optimizer state.'} Leave out --include_optimizer.")
    before = f"{prefix}." if prefix else ""
    group_of = {name: g for g, group in enumerate(moments.groups) for name in group["names"]}
    firsts = {name: _first_source(model, name, group_of) for name in order}
    state: dict[int | str, dict[str, Any]] = {}
    targets: list[Target] = []
    groups: list[dict[str, Any]] = []
    number = 0
    for g, group in enumerate(moments.groups):
        mine = [name for name in order if group_of.get(firsts[name]) == g]
        for k, name in enumerate(mine, number):
            others = moments.others.get(firsts[name], {})
            moved = {key: views[name] for key, views in moments.views.items() if name in views}
            at = name if by_name else k
            for key, value in (others | moved).items():
                path = f"{before}state.{at}.{key}"
                if isinstance(value, View):
                    rule = model.rules.get(name, "copy") if key in moved else "copy"
                    targets.append(Target(f"{name}: {key}", path, file, value.dtype, value, rule, is_weight=False))
                state.setdefault(at, {})[key] = Ref(path) if isinstance(value, View) else value
        rest = {key: value for key, value in group.items() if key != "names"}
        numbers = mine if by_name else list(range(number, number + len(mine)))
        groups.append({**rest, "params": numbers, **({"param_names": mine} if named and not by_name else {})})
        number += len(mine)
    return {"state": state, "param_groups": groups}, targets


def _first_source(model: Source, name: str, group_of: dict[str, int]) -> str:
    """The first parameter of the source in a parameter of the target; one that was filled in, if in a group, or ""."""
    raw = model.tensors[name].names
    if not raw and name in group_of:
        return name
    for source, view in model.sources.items():
        if raw and source in group_of and view.names == raw[:1]:
            return source
    return ""
