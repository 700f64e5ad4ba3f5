"""The optimizer state in a modded-nanogpt file: which parameters its entries belong to, and whether a run can use them.

torch.optim numbers parameters and saves no names, so the order in which each program made its optimizers is here.
With several ranks, train_gpt.py saves rank 0's slices alone, and train_gpt_medium.py those matrices that rank 0 owned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..bundle.optimizer_state import groups_of
from ..errors import CheckpointMismatch
from ..loading.optimizer import load_optimizer_state
from ..networks.modded import ModdedGPT
from ..networks.muon import MuonWithAdamW, parameters_by_kind

Entries = dict[str, dict[str, Any]]
ADAMW, MUON = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)

_LENGTH = re.compile(r"^\s*(?:train_)?seq_len\s*=\s*(\d+(?:\s*\*\s*\d+)*)", re.MULTILINE)


def take_over(content: Any, model: ModdedGPT, optimizer: MuonWithAdamW) -> list[str]:
    """Fill matrices from their mantissas, and the optimizer from the complete entries of an upstream file's state.

    Returns a line for each part that was used, and for each that was not, with the reason.
    """
    saved = content.get("optimizers") if isinstance(content, Mapping) else None
    if not isinstance(saved, list) or len(saved) != 2:
        return ["optimizer state: the file has none; moments start from zero"]
    if model.config.variant == "small_2025_02":
        return ["optimizer state: not used, its order in the version of 2025-02 is not known here"]
    try:
        adamw, muon = _named(saved, model)
    except CheckpointMismatch as error:
        return [f"optimizer state: not used, {str(error).removeprefix('optimizer state: ')}"]
    lines = []
    if found := _take_mantissas(model, muon):
        lines.append(f"weights: {found} of {len(muon)} matrices in fp32, with the mantissas of the file")
    scale, note = (1.0, "") if model.config.variant == "medium" else _per_token(content, model)
    taken: Entries = {}
    for name, entries, keys in (("AdamW", adamw, ADAMW), ("Muon", muon, MUON)):
        if why := _incomplete(entries, keys, model):
            lines.append(f"optimizer state of {name}: not used, {why}; its moments start from zero")
            continue
        taken |= {parameter: _scaled(entry, keys, scale) for parameter, entry in entries.items()}
        lines.append(f"optimizer state of {name}: used, for {len(entries)} parameters{note}")
    names = list(taken)
    groups = [{"params": list(range(len(names))), "param_names": names}]
    missing = [name for name, _ in model.named_parameters() if name not in taken]
    groups.append({"params": list(range(len(names), len(names) + len(missing))), "param_names": missing})
    load_optimizer_state(optimizer, {"state": dict(enumerate(taken.values())), "param_groups": groups})
    return lines


def _named(saved: list[Any], model: ModdedGPT) -> tuple[Entries, Entries]:
    """The entries of AdamW and of Muon by the names of their parameters; empty where a rank has none.

    Raises: CheckpointMismatch when there are more or fewer parameters than the model has.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    matrices, rest = parameters_by_kind(model)
    hidden = [name for name, _ in matrices]
    head, embed, scalar = ([name for name, _ in rest[kind]] for kind in ("head", "embed", "scalar"))
    if model.config.variant == "medium":
        adamw = _in_order(saved[0], [head, embed, scalar])
        muon = _in_order(saved[1], [sorted(hidden, key=lambda name: shapes[name], reverse=True)])
        return adamw, muon
    return _by_shape(saved[0], scalar + head + embed, shapes), _by_shape(saved[1], hidden, shapes)


def _in_order(saved: Any, groups: list[list[str]]) -> Entries:
    """Name the entries of a state whose groups are these."""
    found = [group["params"] for group in groups_of(saved)]
    if [len(ids) for ids in found] != [len(names) for names in groups]:
        sizes = " + ".join(str(len(ids)) for ids in found), " + ".join(str(len(names)) for names in groups)
        raise CheckpointMismatch(f"it has {sizes[0]} parameters, expected {sizes[1]}")
    return {
        name: saved["state"].get(i, {})
        for ids, names in zip(found, groups, strict=True)
        for i, name in zip(ids, names, strict=True)
    }


def _by_shape(saved: Any, names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Entries:
    """Name the entries of a state with one group for each shape, in the arbitrary order of a set of shapes."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        groups.setdefault(shapes[name], []).append(name)
    order = []
    for ids in (group["params"] for group in groups_of(saved)):
        values = [value for i in ids for value in saved["state"].get(i, {}).values()]
        found = next((tuple(value.shape) for value in values if isinstance(value, Tensor) and value.dim()), ())
        if found not in groups:
            known = ", ".join(str(list(shape)) for shape in groups)
            raise CheckpointMismatch(
                f"it has moments of shape {list(found)} where the parameters are {known}: it is a part, that of rank 0 "
                "of several"
            )
        order.append(groups.pop(found))
    if groups:
        raise CheckpointMismatch(f"it lacks parameters of shape {', '.join(str(list(shape)) for shape in groups)}")
    return _in_order(saved, order)


def _incomplete(entries: Entries, keys: tuple[str, ...], model: ModdedGPT) -> str | None:
    """Why a run cannot continue with these entries; None when they are complete."""
    parameters = dict(model.named_parameters())
    absent = [name for name, entry in entries.items() if not entry]
    if absent:
        return f"{len(entries) - len(absent)} of {len(entries)} parameters have one: those of rank 0 of several"
    for name, entry in entries.items():
        for key in keys:
            value, shape = entry.get(key), list(parameters[name].shape)
            if not isinstance(value, Tensor) or list(value.shape) != shape or not value.is_floating_point():
                there = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                return f"{name}: {key} is {there}, expected numbers of shape {shape}"
        count = entry.get("step", 0)
        if (isinstance(count, Tensor) and count.dim()) or not isinstance(count, (Tensor, int, float)):
            return f"{name}: step is not a number"
        if keys == ADAMW and "step" not in entry:
            return f"{name} has no step"
    return None


def _scaled(entry: dict[str, Any], keys: tuple[str, ...], scale: float) -> dict[str, Any]:
    """The values that a run needs, for gradients that are `scale` times as large."""
    kept: dict[str, Any] = {key: entry[key].float() * scale ** (2 if key == "exp_avg_sq" else 1) for key in keys}
    return kept | ({"step": entry["step"]} if keys == ADAMW else {})


def _per_token(content: Mapping[str, Any], model: ModdedGPT) -> tuple[float, str]:
    """The factor from train_gpt.py's gradients, of the sum over a sequence, to ours, of the mean; and a note about it.

    The length of its sequences is in the source of the program, which its files contain.
    """
    code = content.get("code")
    found = _LENGTH.search(code) if isinstance(code, str) else None
    length = math.prod(map(int, found[1].split("*"))) if found else 0
    if length:
        return 1 / length, f" (as means over the {length} tokens of its sequences)"
    length = model.config.block_size
    return 1 / length, f" (as means over block_size {length}; the file does not record the length of its sequences)"


def _take_mantissas(model: ModdedGPT, muon: Entries) -> int:
    """Give matrices the lower halves of their fp32 numbers, of which bf16 is the upper; return how many had one."""
    found = 0
    parameters = dict(model.named_parameters())
    for name, entry in muon.items():
        p, lower = parameters[name], entry.get("mantissa")
        if not isinstance(lower, Tensor) or lower.dtype != torch.uint16 or lower.shape != p.shape:
            continue
        with torch.no_grad():
            upper = p.float().view(torch.int32)  # the lower half is zero in a bf16 number
            p.copy_((upper | lower.to(device=p.device, dtype=torch.int32)).view(torch.float32))
        found += 1
    return found
