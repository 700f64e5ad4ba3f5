"""Side: one of two checkpoints in a comparison, with everything under common names."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...bundle.evolution import Evidence, evolve
from ...bundle.optimizer_state import groups_of, names_in_order
from ...bundle.parts import once
from ...containers.checksum import crc32
from ...containers.pickles.inert import as_text
from ...containers.plain import plain
from ...containers.spec import TensorSpec
from ...containers.tensors.dtypes import decode
from ...containers.tensors.reading import pieces
from ...containers.tensors.views import View, concatenate, permute, stored
from ...containers.trees import map_paths
from ...errors import CheckpointMismatch
from ...families.common_names import GPT2, Place, common_fields, head_and_table, in_module_order, naming, places
from ...families.family import plain_names
from ...families.fused import FUSED, LECTURE, recognise
from ..html.curve import measured_at
from ..inspect import Facts, Inspection

Parts = Sequence[tuple[str, TensorSpec]]
"""The parts of a tensor, each with its readable name."""

_FEW = 16  # elements of a tensor that is compared as a value


@dataclass
class Side:
    """One of two checkpoints, as inspected from its headers."""

    found: Inspection

    @property
    def family(self) -> str:
        """The family of its tensors."""
        return self.found.identity.family

    @property
    def program(self) -> str:
        """The program whose config this is: programs write different fields."""
        return "ours" if self.family in (FUSED, LECTURE) else self.family if self.is_gpt2 else naming(self.family)

    @property
    def is_gpt2(self) -> bool:
        """Whether its tensors are those of a GPT-2, under any program's names."""
        return naming(self.family) == GPT2

    @property
    def has_weights_alone(self) -> bool:
        """Whether it holds tensors only, and nothing else to compare."""
        found = self.found
        return all(part is None for part in (found.config, found.tokenizer, found.step, found.optimizer))

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """The place of each tensor of the model by its common name, or by its own if two would have the same."""
        names = [name for name in self.found.weights if name not in self.found.identity.buffers]
        try:
            return places(self.family, names)
        except CheckpointMismatch:
            return {plain: Place((name,)) for plain, name in _plain(names).items()}

    @functools.cached_property
    def tensors(self) -> dict[str, View]:
        """The tensors of the model by their common names, without those that are broken."""
        return {
            name: self._whole([(part, self.found.weights[part]) for part in place.parts], place.transposed)
            for name, place in self.places.items()
            if name not in self.broken
        }

    @functools.cached_property
    def broken(self) -> dict[str, str]:
        """Tensors of the model that cannot be assembled, and the reasons."""
        found = {}
        for name, place in self.places.items():
            lost = next((part for part in place.parts if part not in self.found.weights), None)
            parts = [(part, self.found.weights[part]) for part in place.parts if part in self.found.weights]
            if fault := f"{lost} is missing" if lost else _fault(parts):
                found[name] = fault
        return found

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor of the model is stored transposed."""
        return name in self.places and name not in self.broken and self.places[name].transposed

    def parts_of(self, name: str) -> dict[str, View]:
        """The parts of a tensor of the model, by their names without what wrappers add."""
        place = self.places.get(name, Place(()))
        parts = _plain(part for part in place.parts if part in self.found.weights)
        return {plain: self._whole([(part, self.found.weights[part])]) for plain, part in parts.items()}

    def _whole(self, parts: Parts, transposed: bool = False) -> View:
        """A tensor whose parts are concatenated along its rows."""
        views = [stored(self.found.container, replace(spec, name=name)) for name, spec in parts]
        whole = concatenate(views) if len(views) > 1 else views[0]
        return permute(whole, range(len(whole.shape))[::-1]) if transposed else whole

    @property
    def masks(self) -> dict[str, View]:
        """Its buffers, by their names without what wrappers add."""
        return {plain: self._whole([(name, self.found.weights[name])]) for plain, name in self.mask_names.items()}

    @property
    def mask_names(self) -> dict[str, str]:
        """The names of its buffers in the file, by those without what wrappers add."""
        return _plain(name for name in self.found.identity.buffers if name in self.found.weights)

    @property
    def tied(self) -> tuple[str, str] | None:
        """The head that it does not store, and the token table used instead."""
        names = head_and_table(self.family)
        if names is None or names[0] in self.places or names[1] not in self.places:
            return None
        return None if common_fields(self.fields or {}).get("tied_head") is False else names

    @functools.cached_property
    def measured(self) -> dict[str, float]:
        """Validation loss, learning rate and gradient norm at its step, those of them that are recorded."""
        bundle = self.found.bundle
        if bundle is None or bundle.single:
            return {}
        loss = bundle.state.val_loss
        own = {"val_loss": float(loss)} if isinstance(loss, (int, float)) else {}
        return measured_at(bundle.folder, bundle.state.step) | own

    def part(self, name: str) -> tuple[dict[str, View], Facts] | None:
        """The tensors and the plain values of `ema` or `also`, by their paths; None where it has none."""
        content = self.found.container.content
        if self.found.bundle is None or not isinstance(content, dict) or name not in content:
            return None
        values: Facts = {}
        map_paths(lambda path, leaf: values.__setitem__(path, leaf), content[name])
        container, before = self.found.container, f"{name}."
        tensors = {
            n.removeprefix(before): stored(container, t) for n, t in container.tensors.items() if n.startswith(before)
        }
        return tensors, plain({path: leaf for path, leaf in values.items() if not isinstance(leaf, TensorSpec)})

    @functools.cached_property
    def fields(self) -> Facts | None:
        """Its config as JSON values; fields that an old config of ours lacks have the values of that time."""
        if self.found.config is None:
            return None
        config = plain(self.found.config)
        if self.program != "ours":
            return config
        try:
            plan = recognise(self.found.weights)
            shapes = plan.shapes({name: spec.shape for name, spec in self.found.weights.items()})
            return evolve(config, Evidence(plan, shapes), str(self.found.path)).to_dict()
        except CheckpointMismatch:  # inspection reports its faults; here it is compared unchanged
            return config

    @functools.cached_property
    def settings(self) -> Facts | None:
        """The settings of its optimizers, "group 0: lr".

        Raises: CheckpointMismatch when it is not a state of torch optimizers.
        """
        if self.found.optimizer is None:
            return None
        several = isinstance(self.found.optimizer, (list, tuple))
        found: Facts = {}
        for number, optimizer in enumerate(self.found.optimizer if several else [self.found.optimizer]):
            for index, group in enumerate(groups_of(optimizer)):
                before = f"optimizer {number}, group {index}" if several else f"group {index}"
                for key, value in group.items():
                    if key not in ("params", "param_names"):
                        found[f"{before}: {_text(key)}"] = self._value(value)
        return found

    @functools.cached_property
    def numbers(self) -> dict[str, dict[str, Any]]:
        """For each tensor of the model, the numbers of its parts in the optimizer's state.

        Raises: CheckpointMismatch when they are unknown.
        """
        groups = groups_of(self.found.optimizer)
        model = {name: spec for name, spec in self.found.weights.items() if name not in self.found.identity.buffers}
        if "safetensors" in self.found.container.kind:  # in which names are sorted
            own = self.found.identity.places
            order = in_module_order(self.family, {name: own[name] for name in model if name in own})
            model = {name: model[name] for name in order} | model
        names = plain_names(names_in_order(groups, once(model)))
        numbers = dict(zip(names, (i for group in groups for i in group["params"]), strict=True))
        known = {original: name for name, original in plain_names(model).items()}
        found = {
            name: {part: numbers[known[part]] for part in place.parts if known.get(part) in numbers}
            for name, place in self.places.items()
        }
        return {name: parts for name, parts in found.items() if parts}

    def groups(self) -> Facts:
        """The tensors of the model in each group of the optimizer.

        Raises: CheckpointMismatch when they are unknown.
        """
        owners = {number: name for name, parts in self.numbers.items() for number in parts.values()}
        return {
            f"group {index}: parameters": sorted({owners[i] for i in group["params"] if i in owners})
            for index, group in enumerate(groups_of(self.found.optimizer))
        }

    def moments(self) -> tuple[dict[str, View], Facts]:
        """The state of the optimizer by tensor, "lm_head.weight: exp_avg": tensors as stored, and plain values.

        Raises: CheckpointMismatch when the owners of the states are unknown.
        """
        tensors: dict[str, View] = {}
        values: Facts = {}
        for name, parts in self.numbers.items():
            entries = [self.found.optimizer["state"].get(number, {}) for number in parts.values()]
            for key in dict.fromkeys(key for entry in entries for key in entry):
                found = [entry.get(key) for entry in entries]
                title = f"{name}: {_text(key)}"
                names = [f"{part}: {_text(key)}" for part in parts]
                if all(isinstance(value, TensorSpec) and value.shape for value in found):
                    specs = list(zip(names, found, strict=True))
                    if _fault(specs):
                        tensors |= {part: self._whole([(part, spec)]) for part, spec in specs}
                    else:
                        tensors[title] = self._whole(specs, self.places[name].transposed)
                else:
                    each = [self._value(value) for value in found]
                    values[title] = each[0] if all(value == each[0] for value in each) else each
        return tensors, values

    def _value(self, value: Any) -> Any:
        """A setting as a JSON value: the numbers of a small tensor, or the checksum of a large one."""
        if isinstance(value, (list, tuple)):
            return [self._value(item) for item in value]
        if not isinstance(value, TensorSpec):
            return plain(value)
        data = pieces(stored(self.found.container, value))
        if value.numel > _FEW or value.dtype.startswith("complex"):
            crc = functools.reduce(lambda crc, piece: crc32(piece, crc), data, 0)
            return f"{value}, CRC32 {crc:08x}"
        numbers = plain(decode(b"".join(map(bytes, data)), value.dtype).tolist())
        return numbers if value.shape else numbers[0]


def _fault(parts: Parts) -> str:
    """Why parts do not form a tensor; "" if they do."""
    (first_name, first), *others = parts
    for name, part in others:
        if (part.dtype, part.shape) != (first.dtype, first.shape) or not part.shape:
            return f"{name} is {part.dtype} {part.shape}, but {first_name} is {first.dtype} {first.shape}"
    return ""


def _plain(names: Iterable[str]) -> dict[str, str]:
    """Names without what wrappers add, or unchanged if two would become one."""
    names = list(names)
    try:
        return plain_names(names)
    except CheckpointMismatch:
        return {name: name for name in names}


def _text(key: Any) -> str:
    return key if isinstance(key, str) else as_text(key)
