"""The optimizer state of another program by the names of its parameters.

torch.optim numbers the parameters and saves no names. Their order is found by the sizes of the groups and the shapes of
the moments among the orders that programs have: no state is taken over under a name that only might be its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..bundle.optimizer_state import MOMENTS, OTHER_MODEL, groups_of, recorded_names
from ..bundle.parts import once
from ..containers.pickles.foreign import foreign_calls
from ..containers.pickles.inert import Call, as_name, as_text
from ..containers.spec import TensorSpec
from ..containers.tensors.views import stored
from ..errors import CheckpointMismatch
from ..families.family import WRAPPERS, Family, Shape, plain_name, plain_names
from ..families.identify import Identity
from ..families.match import in_order
from ..families.parts import is_flat
from ..inspection.inspect import Inspection
from .plan import Moments, Source

SORTED = "nanoGPT's before 2023-05-06, Linear weights and the rest, each in alphabetical order"
"""Told by the sizes of the groups: embeddings, which have two sides, are among the rest."""


@dataclass(frozen=True)
class _Order:
    """The parameters of each group by one rule."""

    rule: str
    groups: tuple[list[str], ...]
    untied: bool = True  # a second copy of the token table counts as a parameter

    @property
    def sizes(self) -> list[int]:
        return [len(group) for group in self.groups]

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group]


def moments_of(found: Inspection, identity: Identity, model: Source, family: Family) -> Moments | None:
    """The optimizer state by names of parameters; None, with a note of the reason, where they cannot be told."""
    weights = {name: spec for name, spec in found.weights.items() if name not in identity.buffers}
    if "safetensors" in found.container.kind:  # in which names are sorted
        weights = _as_modules(weights, identity, family)
    found.optimizer = by_name(found.optimizer)
    try:
        groups = groups_of(found.optimizer)
        recorded = recorded_names(groups)
        numbers = [number for group in groups for number in group["params"]]
        if recorded is None:
            order = _order_of(groups, found.optimizer["state"], once(weights), model, identity, family)
            recorded, rule = order.names, order.rule
        elif len(recorded) == len(numbers):
            rule = "recorded"
        else:
            raise CheckpointMismatch(f"optimizer state: {len(numbers)} parameters have {len(recorded)} names.")
    except CheckpointMismatch as error:
        model.notes.append(f"its optimizer state is left out: {str(error).removesuffix(OTHER_MODEL).rstrip()}")
        return None
    try:
        made = _named(found, identity, model, groups, recorded, rule)
    except CheckpointMismatch as error:
        model.notes.append(f"its optimizer state is left out: {error}")
        return None
    if rule == SORTED:
        model.notes.append(f"the order of its optimizer's parameters is {SORTED}")
    return made


def by_name(optimizer: Any) -> Any:
    """An optimizer state as torch.optim lays it out, from torch's get_optimizer_state_dict, nested or flattened.

    Such a state is keyed by names; its groups then list them as `param_names` too. Any other is returned as it is.
    """
    if isinstance(optimizer, Mapping) and is_flat(optimizer):
        optimizer = _unflattened(optimizer)
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    if not isinstance(groups, list):
        return optimizer
    named = []
    for group in groups:
        params = group.get("params") if isinstance(group, dict) else None
        is_named = isinstance(params, list) and all(isinstance(one, str) for one in params)
        named.append({**group, "param_names": params} if is_named else group)
    return {**optimizer, "param_groups": named}


def _unflattened(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nest `state.<name>.<moment>` and `param_groups.<name>.<setting>`; parameters of equal settings are one group."""
    state: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, rest = key.partition(".")
        name, _, word = rest.rpartition(".")
        (state if part == "state" else settings).setdefault(name, {})[word] = value
    groups: list[dict[str, Any]] = []
    for name, mine in settings.items():
        same = next((group for group in groups if {**group, "params": None} == {**mine, "params": None}), None)
        if same is None:
            groups.append({**mine, "params": [name]})
        else:
            same["params"].append(name)
    return {"state": state, "param_groups": groups}


def _as_modules(weights: dict[str, TensorSpec], identity: Identity, family: Family) -> dict[str, TensorSpec]:
    """Sort weights as the modules of a family register them: the norms of a layer of Llama come last."""
    raws = {identity.places[raw]: raw for raw in weights if raw in identity.places}
    names = in_order(raws, family)
    if family.name == "hf_llama":
        layers = {name: ".".join(name.split(".")[:3]) for name in names}
        places = {layer: place for place, layer in enumerate(dict.fromkeys(layers.values()))}
        names.sort(key=lambda name: (places[layers[name]], name.endswith("layernorm.weight")))
    return {raws[name]: weights[raws[name]] for name in names} | weights


def _named(
    found: Inspection, identity: Identity, model: Source, groups: list[dict[str, Any]], recorded: list[str], rule: str
) -> Moments:
    """The moments and groups by the names of the parameters.

    Raises: CheckpointMismatch when one of them is no plain data.
    """
    made = Moments([], {}, {}, rule)
    names = iter(recorded)
    plain = {plain: identity.places[raw] for plain, raw in plain_names(identity.places).items()}
    for group in groups:
        mine = []
        for number in group["params"]:
            raw = next(names)
            name = identity.places.get(raw) or plain.get(plain_name(raw, WRAPPERS), raw)
            mine.append(name)
            _take_entry(made, model, found, name, found.optimizer["state"].get(number, {}))
        rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        if strange := next((key for key, value in rest.items() if foreign_calls(value)), None):
            raise CheckpointMismatch(f"its group has {as_text(rest[strange], 60)} as {as_name(str(strange))}.")
        made.groups.append({**rest, "names": mine})
    return made


def _orders(shapes: Mapping[str, Shape], identity: Identity, family: Family) -> list[_Order]:
    """The orders that programs of a family have, each with and without a second copy of the token table."""
    heads = [raw for raw in shapes if identity.places.get(raw) == family.head]
    found = []
    for some in ([], heads) if heads else ([],):
        names = [name for name in shapes if name not in some]
        matrices = [name for name in names if len(shapes[name]) >= 2]
        found.append(_Order("that of its tensors", (names,), not some))
        rest = [name for name in names if name not in matrices]
        found.append(_Order("matrices and the rest, each as its tensors", (matrices, rest), not some))
        if family.name == "nanogpt":
            tables = (family.embedding, family.positions)
            linear = sorted(name for name in matrices if identity.places.get(name) not in tables)
            found.append(_Order(SORTED, (linear, sorted(set(names) - set(linear))), not some))
    return found


def _order_of(
    groups: list[dict[str, Any]],
    entries: Mapping[Any, Any],
    shapes: Mapping[str, Shape],
    model: Source,
    identity: Identity,
    family: Family,
) -> _Order:
    """The one order that fits the groups and the moments.

    Raises: CheckpointMismatch with what does not fit, or when several orders fit and nothing decides.
    """
    numbers = [number for group in groups for number in group["params"]]
    sizes = [len(group["params"]) for group in groups]
    orders = _orders(shapes, identity, family)
    same = [order for order in orders if order.sizes == sizes]
    if not same:
        wanted = " or ".join(dict.fromkeys(_sum(order.sizes) for order in orders))
        raise CheckpointMismatch(f"found {_sum(sizes)} parameters without names, expected {wanted}.")
    faults = [_fault(order, numbers, entries, shapes) for order in same]
    fits = {tuple(order.names): order for order, fault in zip(same, faults, strict=True) if fault is None}
    if len(fits) > 1:
        rules = "; ".join(order.rule for order in fits.values())
        raise CheckpointMismatch(f"its shapes fit {len(fits)} orders of the parameters ({rules}): nothing decides.")
    if not fits:
        raise CheckpointMismatch(f"{faults[0]}.")
    (order,) = fits.values()
    if not order.untied and not model.is_tied(family.head, family.embedding):
        raise CheckpointMismatch(
            f"it has no parameter for {family.head}, whose values are not those of {family.embedding}."
        )
    return order


def _sum(sizes: list[int]) -> str:
    return " + ".join(map(str, sizes))


def _fault(order: _Order, numbers: list[Any], entries: Mapping[Any, Any], shapes: Mapping[str, Shape]) -> str | None:
    """The first moment that has not the shape of the parameter that an order gives it; None where all have."""
    for number, name in zip(numbers, order.names, strict=True):
        for key, value in entries.get(number, {}).items():
            if key in (*MOMENTS, "momentum_buffer") and isinstance(value, TensorSpec) and value.shape != shapes[name]:
                return (
                    f"{key} of parameter {number} is {value.shape}, and {name}, which is there by the order of its "
                    f"program, {shapes[name]}"
                )
    return None


def _take_entry(made: Moments, model: Source, found: Inspection, name: str, entry: Any) -> None:
    shape = model.tensors[name].shape if name in model.tensors else None
    for key, value in entry.items():
        if isinstance(value, TensorSpec):
            view = stored(found.container, value)
            if value.shape == shape and shape != ():
                made.views.setdefault(key, {})[name] = view
            else:
                made.others.setdefault(name, {})[key] = view
        elif isinstance(value, Call):
            raise CheckpointMismatch(f"it has {as_text(value, 60)} for {name}.")
        else:
            made.others.setdefault(name, {})[key] = value
