"""Whether two checkpoints of a GPT hold the same numbers, bit for bit, whatever their files, names and layout.

Nothing is loaded, joined or converted for it: the bytes of both are read where their headers say that they are, a
tensor that is made of several being the rows of these, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...bundle.bundle import Bundle
from ...bundle.optimizer_state import groups_of, names_in_order
from ...bundle.parts import TorchFile, once
from ...containers.blocks import read_at
from ...containers.pickles.inert import as_text
from ...containers.spec import TensorSpec
from ...errors import CheckpointMismatch
from ...families.family import plain_names

PIECE = 8 * 1024 * 1024
"""Bytes compared at a time."""

Progress = Callable[[int], object]


@dataclass
class Rows:
    """One tensor of a model, as it lies in a file: whole, or as parts that follow one another along its rows."""

    source: TorchFile
    parts: tuple[TensorSpec, ...]
    _dense: dict[int, bytes] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """Its dtype and shape; parts that do not fit together give a kind that no tensor has."""
        first, *others = self.parts
        if any((part.dtype, part.shape) != (first.dtype, first.shape) for part in others):
            return "parts that differ", ()
        rows = (first.shape[0] * len(self.parts), *first.shape[1:]) if others and first.shape else first.shape
        return first.dtype, rows

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return sum(part.nbytes for part in self.parts)

    def read(self, start: int, size: int) -> bytes:
        """Read bytes of its elements in row-major order, fewer at its end."""
        found, begin = bytearray(), 0
        for number, part in enumerate(self.parts):
            low, high = max(start - begin, 0), min(start - begin + size, part.nbytes)
            begin += part.nbytes
            if low >= high:
                continue
            if part.contiguous:
                found += read_at(self.source.file, part.offset + low, high - low, str(self.source.path))
            else:
                found += self._row_major(number)[low:high]
        return bytes(found)

    def _row_major(self, number: int) -> bytes:
        """The bytes of a part that lies in another order in its file, as a transposed matrix does."""
        if number not in self._dense:
            import torch  # comparing what lies in order needs none

            from ...loading.tensors import map_tensors

            tensor = map_tensors(self.source, self.parts[number]).contiguous()
            self._dense[number] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        return self._dense[number]


def unequal_weights(a: Bundle, b: Bundle, progress: Progress = lambda size: None) -> list[str]:
    """Say in which tensors of the model the weights of two checkpoints differ; nothing where every bit is equal."""
    first, second = _weights(a), _weights(b)
    return _unequal(first, second, progress)


def unequal_optimizers(a: Bundle, b: Bundle, progress: Progress = lambda size: None) -> list[str]:
    """Say where the optimizer states of two checkpoints differ: moments by parameter, settings by group.

    Raises: CheckpointMismatch when one is no state of its model.
    """
    if a.optimizer is None or b.optimizer is None:
        return [] if a.optimizer is b.optimizer else ["only one of them has an optimizer state"]
    (first, moments), (second, other_moments) = _optimizer(a), _optimizer(b)
    if len(first) != len(second):
        return [f"{len(first)} and {len(second)} parameter groups"]
    faults = [
        f"group {number}: other parameters"
        for number, (one, other) in enumerate(zip(first, second, strict=True))
        if one[0] != other[0]
    ]
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        faults += [f"group {number}: {fault}" for fault in _unequal(one[1], other[1], progress)]
    return faults + _unequal(moments, other_moments, progress)


def _weights(bundle: Bundle) -> dict[str, Any]:
    specs, source = bundle.weights.tensors, bundle.weights.source
    return {
        name: Rows(source, tuple(specs[part] for part in parts)) for name, parts in bundle.evidence.plan.sources.items()
    }


def _optimizer(bundle: Bundle) -> tuple[list[tuple[set[str], dict[str, Any]]], dict[str, Any]]:
    """The parameters and settings of each group, and the moments as "parameter: entry", all under our names."""
    assert bundle.optimizer is not None
    content, source, plan = bundle.optimizer.content, bundle.optimizer.source, bundle.evidence.plan
    groups = groups_of(content)
    shapes = once(bundle.weights.tensors)
    names = names_in_order(groups, {name: shape for name, shape in shapes.items() if name not in plan.dropped})
    numbers = dict(zip(plain_names(names), (i for group in groups for i in group["params"]), strict=True))
    plain = {name: plain for plain, name in plain_names(bundle.weights.tensors).items()}
    ours: dict[Any, str] = {}
    moments: dict[str, Any] = {}
    for name, parts in plan.sources.items():
        mine = [numbers[plain[part]] for part in parts if plain[part] in numbers]
        ours.update(dict.fromkeys(mine, name))
        entries = [content["state"].get(number, {}) for number in mine]
        for key in {key: None for entry in entries for key in entry}:
            values = [entry.get(key) for entry in entries]
            moments[f"{name}: {key}"] = _joined(source, values, f"{name}: {key}")
    if unknown := [str(number) for number in numbers.values() if number not in ours]:
        raise CheckpointMismatch(
            f"{source.path}: parameters {', '.join(unknown[:10])} belong to no tensor of the model."
        )
    listed = [
        (
            {ours[number] for number in group["params"]},
            {
                key: _joined(source, [value], key)
                for key, value in group.items()
                if key not in ("params", "param_names")
            },
        )
        for group in groups
    ]
    return listed, moments


def _joined(source: TorchFile, values: list[Any], what: str) -> Any:
    """One entry of an optimizer's state from those of its parts: rows are joined, anything else must be equal."""
    first = values[0]
    if not isinstance(first, TensorSpec):
        same = all(value == first for value in values)
    elif first.shape and all(isinstance(value, TensorSpec) for value in values):
        return Rows(source, tuple(values))
    else:
        first = Rows(source, (first,))
        same = all(isinstance(v, TensorSpec) and _difference(first, Rows(source, (v,))) is None for v in values)
    if not same:
        raise CheckpointMismatch(f"{source.path}: the parts of {what} are not equal.")
    return first


def _unequal(a: dict[str, Any], b: dict[str, Any], progress: Progress) -> list[str]:
    faults = []
    for name in {**a, **b}:
        if name not in a or name not in b:
            faults.append(f"{name} is in one of them only")
        elif fault := _difference(a[name], b[name], progress):
            faults.append(f"{name}: {fault}")
    return faults


def _difference(a: Any, b: Any, progress: Progress = lambda size: None) -> str | None:
    if not isinstance(a, Rows) or not isinstance(b, Rows):
        same = type(a) is type(b) and a == b
        return None if same else " and ".join("a tensor" if isinstance(v, Rows) else as_text(v, 60) for v in (a, b))
    if a.kind != b.kind:
        return f"{a.kind[0]} {a.kind[1]} and {b.kind[0]} {b.kind[1]}"
    for start in range(0, a.nbytes, PIECE):
        one, other = a.read(start, PIECE), b.read(start, PIECE)
        if one != other:
            byte = next(i for i, (x, y) in enumerate(zip(one, other, strict=True)) if x != y)
            return f"other bytes from {start + byte} on"
        progress(len(one))
    return None
