"""What a checkpoint of a GPT holds, under our names and as views of its files: what a migration writes and compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundle.bundle import OPTIMIZER, Bundle
from ...bundle.commit import MODEL
from ...bundle.contradictions import rearrange_optimizer
from ...containers.container import Container
from ...containers.pickles.inert import as_text
from ...containers.spec import TensorSpec
from ...containers.tensors.dtypes import decode
from ...containers.tensors.reading import Gatherer, same_elements
from ...containers.tensors.views import View, stored
from ...containers.trees import map_leaves, map_paths
from ...errors import CheckpointMismatch
from ...families.family import plain_names
from ...families.fused import FUSED, LECTURE
from ...families.lecture import LECTURE as LECTURE_TABLE
from ...families.rules import Concat, Row, apply
from ...inspection.inspect import of_bundle
from ..plan import Options, Plan, Progress, Ref, Source, Target, WeightFile, target_of

CONCAT = Concat(0)


class Number(View):
    """A tensor without sides, of which rearranging an optimizer state asks the number: its parts have to agree."""

    __slots__ = ()

    def item(self) -> Any:
        """Read the number."""
        with Gatherer(1) as gatherer:
            return decode(b"".join(gatherer.pieces(self)), self.dtype)[0].item()


@dataclass
class Content:
    """The tensors of a checkpoint of a GPT, still in its files."""

    bundle: Bundle
    container: Container
    sources: dict[str, View]  # by the family's names, without buffers and what wrappers put before a name
    weights: dict[str, View]  # by our names, in the order of the file
    sizes: dict[str, int]
    rows: tuple[Row, ...]  # the rules that make the weights of the sources

    @classmethod
    def of(cls, bundle: Bundle) -> Content:
        """See the tensors of a bundle as those of our GPT.

        Raises: CheckpointDamaged when its header cannot be read, CheckpointMismatch when parts do not fit together.
        """
        plan, container = bundle.evidence.plan, of_bundle(bundle).container
        specs = bundle.weights.tensors
        sources = {
            name: stored(container, specs[raw]) for name, raw in plain_names(specs).items() if raw not in plan.dropped
        }
        table = LECTURE_TABLE if plan.family == LECTURE else ()
        sizes = {"n_head": bundle.evidence.heads or 0}
        try:
            made = apply(table, sources, sizes)
        except CheckpointMismatch as error:
            raise CheckpointMismatch(f"{bundle.weights.source.path}: {error}.") from error
        weights = made.tensors | {name: sources[name] for name in made.unused}
        in_order = {name: weights[name] for name in plan.sources}
        for name, parts in plan.sources.items():
            # Moments are concatenated in the order of the plan, so the proof of the weights has to hold for them.
            if in_order[name].numel and in_order[name].names != tuple(specs[part].name for part in parts):
                raise CheckpointMismatch(f"{bundle.weights.source.path}: {name} and its moments differ in their parts.")
        return cls(bundle, container, sources, in_order, sizes, tuple(made.rows.values()))

    @property
    def optimizer(self) -> dict[str, Any] | None:
        """The optimizer state for the parameters of our GPT; None where there is none.

        Raises: CheckpointMismatch when it is another model's.
        """
        bundle = self.bundle
        if bundle.optimizer is None or bundle.config is None or not bundle.has_optimizer:
            return None
        state = map_leaves(self._viewed, bundle.optimizer.content)
        try:
            return rearrange_optimizer(bundle, state, _join, bundle.config)
        except CheckpointMismatch as error:
            raise CheckpointMismatch(f"{bundle.optimizer.source.path}: {error}") from error

    def _viewed(self, value: Any) -> Any:
        if not isinstance(value, TensorSpec):
            return value
        view = stored(self.container, value)
        return view if view.shape else Number(view.dtype, view.shape, view.blocks)

    def plan(self, folder: Path) -> Plan:
        """Plan the torch files of a bundle in a folder.

        Raises: CheckpointMismatch when the plan is not whole, or the optimizer state holds more than plain values.
        """
        path = self.bundle.path(MODEL)
        dropped = {self.bundle.weights.tensors[raw].name: why for raw, why in self.bundle.evidence.plan.dropped.items()}
        model = Source(path, self.container, FUSED, self.weights, {}, self.sizes, sources=self.sources, dropped=dropped)
        model.route = [(self.rows, False)] if self.rows else []
        targets = [target_of(model, name, MODEL, Options()) for name in self.weights]
        files = [WeightFile(MODEL, targets, {target.path: Ref(target.path) for target in targets})]
        if (state := self.optimizer) is not None:
            files.append(_optimizer_file(state, path))
        plan = Plan(model, folder, "bundle", files)
        plan.check()
        return plan


def _join(parts: Sequence[View]) -> View:
    """Concatenate the moments of the parts of a tensor along their rows."""
    for part in parts:
        if part.dtype != parts[0].dtype:
            raise CheckpointMismatch(
                f"{part.names[0]} is {part.dtype}, but {parts[0].names[0]} is {parts[0].dtype}, and they become one"
            )
    return CONCAT.forward(parts, {}, 1)[0]


def _optimizer_file(state: dict[str, Any], path: Path) -> WeightFile:
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    targets: list[Target] = []

    def put(where: str, value: Any) -> Any:
        if isinstance(value, View):
            _, number, key = where.split(".", 2)
            name = f"{names[int(number)]}: {key}" if where.startswith("state.") else f"group {number}: {key}"
            targets.append(Target(name, where, OPTIMIZER, value.dtype, value, "copy", is_weight=False))
            return Ref(where)
        if value is not None and not isinstance(value, (str, int, float)):
            raise CheckpointMismatch(f"{path}: its optimizer state has {as_text(value, 60)} as {where}.")
        return value

    content = map_paths(put, state)
    return WeightFile(OPTIMIZER, targets, content)


def same(a: Any, b: Any, progress: Progress = lambda size: None) -> bool:
    """Whether two contents are the same to the bit: keys, types of values, dtypes, shapes and bytes of tensors."""
    if isinstance(a, View) and isinstance(b, View):
        return same_elements(a, b, progress)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], progress) for key in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y, progress) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)
