"""A saved optimizer state: which parameters its entries belong to, and the same state for the model of a plan.

torch.optim numbers parameters in the order in which it received them and saves no names. An old program's order is
that of its state dict, without buffers and without the second name of tied weights; two groups without names are the
matrices and the rest, as nanoGPT makes them. Works on headers (tensor specs) as well as on tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ..console.words import listed
from ..errors import CheckpointMismatch
from ..families.family import Shape, plain_names
from ..families.fused import Fusing

State = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
OTHER_MODEL = "It does not fit this model; --init_from_model starts a new model from the weights alone."


def groups_of(state: Any) -> list[dict[str, Any]]:
    """The parameter groups of a state dict, after a check of its structure.

    Raises: CheckpointMismatch when it is not the state of an optimizer.
    """
    groups = state.get("param_groups") if isinstance(state, dict) else None
    whole = isinstance(groups, list) and isinstance(state.get("state"), dict)
    if not whole or not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups or ()):
        there = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise CheckpointMismatch(
            f"optimizer state: found {there or 'nothing'}, expected state and param_groups (dict, list of dicts). "
            f"{OTHER_MODEL}"
        )
    groups, faults = groups or [], []
    ids = [i for group in groups for i in group["params"]]
    if not _each_once(ids, (int, str)):
        faults.append("params are not the numbers of parameters, each once")
    else:
        kinds = {i: type(state["state"].get(i, {})) for i in ids}
        faults += [f"state[{i}] is {kind.__name__}, expected dict" for i, kind in kinds.items() if kind is not dict]
    named = [group["param_names"] for group in groups if group.get("param_names") is not None]
    if not all(isinstance(names, (list, tuple)) and _each_once(names, str) for names in named):
        faults.append("param_names are not the names of parameters, each once")
    if faults:
        raise CheckpointMismatch(f"optimizer state: {listed(faults)}. {OTHER_MODEL}")
    return groups


def _each_once(values: Sequence[Any], kind: type | tuple[type, ...]) -> bool:
    return all(isinstance(value, kind) for value in values) and len(set(values)) == len(values)


def recorded_names(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The names that the groups list, in order; None when one lists none.

    Names may stand for the numbers themselves, as in torch's get_optimizer_state_dict.
    """
    found: list[str] = []
    for group in groups:
        params, names = group["params"], group.get("param_names")
        if names is None and all(isinstance(one, str) for one in params):
            names = params
        if names is None:
            return None
        found += names if params else []
    return found


def names_in_order(groups: Sequence[Mapping[str, Any]], order: Mapping[str, Shape]) -> list[str]:
    """Name the parameters of all groups in turn: as recorded, else by the order of the program's parameters.

    Raises: CheckpointMismatch when their number differs.
    """
    names, sizes = recorded_names(groups), [len(group["params"]) for group in groups]
    if names is None:
        matrices = [name for name, shape in order.items() if len(shape) >= 2]
        rest = [name for name, shape in order.items() if len(shape) < 2]
        splits = {(len(order),): [*order], (len(matrices), len(rest)): matrices + rest}
        names = splits.get(tuple(sizes))
        if names is None:
            split = f", or {len(matrices)} + {len(rest)}" if sum(sizes) == len(order) else ""
            found = sum(sizes) if not split else " + ".join(map(str, sizes))
            raise CheckpointMismatch(
                f"optimizer state: found {found} parameters without names, expected {len(order)}{split}. {OTHER_MODEL}"
            )
    if len(names) != sum(sizes):
        raise CheckpointMismatch(f"optimizer state: {sum(sizes)} parameters have {len(names)} names. {OTHER_MODEL}")
    return names


def rearrange(
    state: State, plan: Fusing, order: Mapping[str, Shape], ours: Sequence[str], join: Callable[[list[Any]], Any]
) -> State:
    """Give a state the parameters of the model: fused by the plan of the weights, named, in the order of `ours`.

    `order` lists the parameters of the program that saved it, in the order of its weights file; `join` concatenates
    tensors along their rows. Hyper-parameters stay those of the groups. A state that names its parameters may lack
    some of the model's: those were not trained.

    Raises: CheckpointMismatch naming what is missing, unexpected, of another shape, or contradictory.
    """
    groups = groups_of(state)
    ids = [i for group in groups for i in group["params"]]
    place = {i: g for g, group in enumerate(groups) for i in group["params"]}
    plain = {name: plain for plain, name in plain_names(order).items()}
    found = dict(zip(plain_names(names_in_order(groups, order)), ids, strict=True))
    named = recorded_names(groups) is not None
    strangers = not any(plain.get(part, part) in found for name in ours for part in plan.sources.get(name, (name,)))
    sources = [plan.sources.get(name, ()) for name in ours]
    joined = {plain.get(part, part) for several in sources if len(several) > 1 for part in several}
    faults = _faults(state["state"], found, {plain[name]: shape for name, shape in order.items()}, joined)
    made: list[tuple[str, int, dict[str, Any]]] = []
    for name in ours:
        parts = [found.pop(plain.get(part, part), None) for part in plan.sources.get(name, (name,))]
        known = [part for part in parts if part is not None]
        if not known and named and not strangers:
            continue
        if len(known) < len(parts) or len({place[part] for part in known}) != 1:
            faults.append(f"{name} is missing" if not known else f"{name} is {len(known)} of {len(parts)} parts")
            continue
        entries = [state["state"].get(part, {}) for part in known]
        try:
            made.append((name, place[known[0]], _join(name, entries, join)))
        except CheckpointMismatch as fault:
            faults.append(str(fault))
    faults += [f"{name} is not in this model" for name in found]
    if faults:
        raise CheckpointMismatch(f"optimizer state: {listed(faults)}. {OTHER_MODEL}")
    made.sort(key=lambda one: one[1])
    return {
        **state,
        "state": {i: entry for i, (_, _, entry) in enumerate(made) if entry} | of_no_parameter(state),
        "param_groups": [_group(group, g, made) for g, group in enumerate(groups)],
    }


def of_no_parameter(state: State) -> dict[Any, Any]:
    """The entries of a state that belong to the whole optimizer: those that are not under the number of a parameter."""
    ids = {i for group in state["param_groups"] for i in group["params"]}
    return {key: value for key, value in state["state"].items() if key not in ids and not isinstance(key, int)}


def states_by_name(content: Any) -> dict[str, State]:
    """The optimizer states of a step by name; that of a single one, or what is none, under ""."""
    several = isinstance(content, dict) and "param_groups" not in content and len(content) > 0
    if several and all(isinstance(one, dict) and "param_groups" in one for one in content.values()):
        return content
    return {"": content}


def _group(group: Mapping[str, Any], number: int, made: list[tuple[str, int, dict[str, Any]]]) -> dict[str, Any]:
    mine = [(i, name) for i, (name, place, _) in enumerate(made) if place == number]
    return {**group, "params": [i for i, _ in mine], "param_names": [name for _, name in mine]}


def _faults(
    entries: Mapping[Any, Any], found: Mapping[str, Any], shapes: Mapping[str, Shape], joined: Collection[str]
) -> list[str]:
    """List the faults of entries: counts, Adam's moments, and all of a part to be joined, where shapes are known.

    The state of another optimizer may be of any shape.
    """
    faults = []
    for name, number in found.items():
        for key, value in entries.get(number, {}).items() if name in shapes else ():
            if key not in (*MOMENTS, "step") and name not in joined:
                continue
            if hasattr(value, "shape"):
                if tuple(value.shape) not in ((), tuple(shapes[name])):
                    faults.append(f"{name}: {key} is {tuple(value.shape)}, expected {tuple(shapes[name])}")
            elif not isinstance(value, (int, float)) or key in MOMENTS:
                wanted = f"a tensor {tuple(shapes[name])}" if key in MOMENTS else "a number"
                faults.append(f"{name}: {key} is {type(value).__name__}, expected {wanted}")
    return faults


def _join(name: str, entries: list[dict[str, Any]], join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """Join the entries of a parameter's parts: moments are concatenated, anything without rows must be equal."""
    first = entries[0]
    if len(entries) == 1:
        return first
    if any(entry.keys() != first.keys() for entry in entries):
        raise CheckpointMismatch(f"the parts of {name} have different entries")
    joined = {}
    for key, value in first.items():
        values = [entry[key] for entry in entries]
        if hasattr(value, "shape") and len(value.shape):
            joined[key] = join(values)
        elif any(_number(other) != _number(value) for other in values):
            raise CheckpointMismatch(f"the parts of {name} were updated {sorted(set(map(_number, values)))} times")
        else:
            joined[key] = value
    return joined


def _number(value: Any) -> Any:
    """The count in a 0-d tensor; tensor specs, whose bytes are not read, count as equal."""
    return value.item() if hasattr(value, "item") else 0 if hasattr(value, "shape") else value
