"""A conversion as data: the model in progress, and the plan of every file, checked before the first byte is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle.training_state import TrainingState
from ..console.words import listed, on_one_side
from ..containers.container import Container
from ..containers.spec import ITEM_SIZES
from ..containers.tensors.reading import FLOATS, Gatherer, same_elements
from ..containers.tensors.views import View
from ..errors import CheckpointMismatch
from ..families.choices import Choice, question
from ..families.rules import Row, Sizes, Table, apply
from ..families.tie import is_tied
from ..inspection.tensor_table import grouped
from .run import Run

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Torch's dtypes by their names for --dtype."""

TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
"""Suffixes of torch files; a target with another suffix is a folder, when the format allows either."""


@dataclass(frozen=True)
class Options:
    """The options of a conversion; `more` has those that apply only to some families."""

    dtype: str | None = None  # torch's name; None keeps each tensor's
    shard_size: int | None = None
    tied: bool | None = None
    vocab_size: int | None = None
    include_optimizer: bool = False
    meta: Path | None = None
    bpe_file: Path | None = None  # of GPT-2's ranks
    choices: Mapping[str, Any] = field(default_factory=dict)  # by names of `families.choices.FLAGS`
    more: Mapping[str, Any] = field(default_factory=dict)
    average_with: tuple[Path, ...] = ()  # further checkpoints, for the mean of all


@dataclass
class Moments:
    """An optimizer state by names of parameters: values of a parameter's shape as views, everything else unchanged."""

    groups: list[dict[str, Any]]  # hyper-parameters, with `names` in place of params
    views: dict[str, dict[str, View]]  # exp_avg, exp_avg_sq, ...: by parameter
    others: dict[str, dict[str, Any]]  # of each parameter: step, as a number or a view
    order: str = ""  # by which rule the parameters were named


@dataclass
class Source:
    """A model on its way from one program to another; its data is still in the source's files."""

    path: Path
    container: Container
    family: str
    tensors: dict[str, View]  # by the family's own names
    config: dict[str, Any]  # as the family's program writes it
    sizes: Sizes
    biases: Mapping[str, bool] = field(default_factory=dict)  # of the source: whether qkv, proj, mlp, ... have one
    tokenizer: dict[str, Any] | None = None  # as in tokenizer.json of a bundle
    step: int | None = None
    state: TrainingState = field(default_factory=TrainingState)
    moments: Moments | None = None
    run: Run | None = None  # how another program trained it; a bundle goes on so
    sources: dict[str, View] = field(default_factory=dict)  # every tensor that has to be used or dropped
    family_of_source: str = ""
    dropped: dict[str, str] = field(default_factory=dict)  # name in the source: why
    rules: dict[str, str] = field(default_factory=dict)  # by the tensors' present names: the changes so far, in words
    route: list[tuple[tuple[Row, ...], bool]] = field(default_factory=list)  # tables applied so far; True: backwards
    notes: list[str] = field(default_factory=list)
    program: str = ""  # what wrote it, for people
    along: dict[str, View] = field(default_factory=dict)  # an optimizer's tensors that keep their names and layout
    averaged: list[Path] = field(default_factory=list)  # the checkpoints whose mean it is; none where it is one
    choices: list[Choice] = field(default_factory=list)  # what decides what it computes, and who says so

    def drop(self, name: str, reason: str) -> None:
        """Leave a tensor out, for a reason."""
        view = self.tensors.pop(name)
        self.dropped.update(dict.fromkeys(view.names, reason))
        if self.moments is not None:
            for views in self.moments.views.values():
                views.pop(name, None)

    def tie(self, name: str, other: str) -> None:
        """Let a tensor be another one again; its own, which repeats the values of that one, is dropped."""
        if name in self.tensors and self.tensors[name].names != self.tensors[other].names:
            self.drop(name, f"the values of {other}, written once for both")
        self.tensors[name] = self.tensors[other]

    def replace(self, name: str, view: View, rule: str) -> None:
        """Set or replace the view of a tensor, and record how it was made."""
        self.tensors[name] = view
        before = self.rules.get(name, "")
        self.rules[name] = f"{before}, {rule}" if before else rule

    def choice(self, name: str) -> Any:
        """The value of a choice; None where the family has no such choice."""
        return next((choice.value for choice in self.choices if choice.name == name), None)

    def ask(self) -> None:
        """Refuse to go on while a choice of the model is open.

        Raises: CheckpointMismatch naming each, its flag and the values that fit.
        """
        if asked := question(self.choices):
            config = self.path.parent / "config.json"
            is_beside = self.path.is_file() and self.family.startswith("hf_") and config.exists() and not self.config
            raise self.refuse(f"{asked} Or name the folder: {config} is not read with a file." if is_beside else asked)

    def refuse(self, reason: str) -> CheckpointMismatch:
        """Make the error that names the source."""
        return CheckpointMismatch(f"{self.path}: {reason}")

    def refuse_without_config(self, lacks: str) -> CheckpointMismatch:
        """Make the error for a model whose config was not read: it is not there, or only its weights were named."""
        is_folder = self.path.is_dir()
        folder = self.path if is_folder else self.path.parent
        config = folder / "config.json"
        why, remedy = f"no config.json {'in' if is_folder else 'beside'} it", "Put the model's own there"
        if is_folder and config.exists():
            why = "its config.json has no entries"
        elif config.exists():
            why, remedy = f"a file by itself, with which {config} is not read", f"Name the folder: {folder}"
        elif not is_folder:
            remedy += ", and name the folder"
        return self.refuse(f"{why}, and {lacks} not in the tensors. {remedy}.")

    def is_zero(self, name: str) -> bool:
        """Whether all bytes of a tensor are zero (those of a minus zero are not)."""
        with Gatherer() as gatherer:
            return all(not any(piece) for piece in gatherer.pieces(self.tensors[name]))

    def is_tied(self, head: str, table: str, said: bool | None = None) -> bool:
        """Whether the head is the token table, by their values and by what the program says (see families/tie.py)."""
        own, whole = self.tensors.get(head), self.tensors[table]
        if own is None:
            return True
        return bool(is_tied(said, shares=own.place == whole.place, same=lambda: same_elements(own, whole)))


Progress = Callable[[int], object]
"""Takes a number of bytes that were read, written or compared."""

Translate = Callable[[Source, Options], dict[str, Any]]
"""Returns the config in the other family's terms; may drop and fill tensors, under the present family's names.

It refuses, by `raise model.refuse(...)`, a model that the other family cannot compute.
"""


@dataclass(frozen=True)
class Pair:
    """Two families, a table between them, and the conversion of the config in each direction; None: not possible."""

    theirs: str
    ours: str
    table: Table
    to_ours: Translate | None = None
    to_theirs: Translate | None = None
    shape: str = ""  # shapes that its models may have: no way goes through pairs that have none in common

    def carry(self, model: Source, options: Options, back: bool) -> None:
        """Convert a model to `ours`, or back to `theirs`.

        Raises: CheckpointMismatch for tensors that do not exist in the other family.
        """
        translate = self.to_theirs if back else self.to_ours
        assert translate is not None
        config = translate(model, options)
        try:
            made = apply(self.table, model.tensors, model.sizes, back)
        except CheckpointMismatch as error:
            raise model.refuse(f"{error}.") from error
        if made.unused:
            target = self.theirs if back else self.ours
            (unplaced,) = on_one_side((), made.unused, f" in {target}")
            raise model.refuse(f"{unplaced}. No tensor is left out silently; --to safetensors keeps all.")
        rows = tuple(made.rows.values())
        before = {old.names: model.rules[name] for name, old in reversed(model.tensors.items()) if name in model.rules}
        model.rules = {name: _said(before.get(v.names), made.rules[name]) for name, v in made.tensors.items()}
        model.tensors, model.config = made.tensors, config
        model.route.append((rows, back))
        model.family = self.theirs if back else self.ours
        if model.moments is not None:
            model.moments.views = {
                key: apply(rows, views, model.sizes, back).tensors for key, views in model.moments.views.items()
            }


def _said(before: str | None, rule: str) -> str:
    return rule if before is None else before if rule == "rename" else f"{before}, {rule}"


@dataclass(frozen=True)
class Target:
    """A tensor to write."""

    name: str  # the family's name for it
    path: str  # its name within the file; differs from `name` if the file holds more than a state dict
    file: str
    dtype: str
    view: View
    rule: str
    is_weight: bool = True

    @property
    def nbytes(self) -> int:
        """Number of bytes to write."""
        return self.view.numel * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Ref:
    """A placeholder, by path, for a tensor in the content of a torch file."""

    path: str


@dataclass
class WeightFile:
    """A file of tensors to write: safetensors, or a torch file with some content."""

    name: str
    targets: list[Target]
    content: Any = None  # of a torch file: plain values, and a Ref for each tensor
    metadata: dict[str, str] = field(default_factory=dict)  # of a safetensors file
    ties: bool = True  # in a torch file, tensors with the same bytes share one storage

    @property
    def is_torch(self) -> bool:
        """Whether it is a torch file."""
        return not self.name.endswith(".safetensors")


SealTexts = Callable[[dict[str, dict[str, Any]]], dict[str, bytes]]


@dataclass
class Plan:
    """Everything that a conversion writes."""

    model: Source
    target: Path
    format: str
    files: list[WeightFile]
    texts: dict[str, bytes] = field(default_factory=dict)  # further files, by name
    copies: dict[str, Path] = field(default_factory=dict)  # files copied along, by name
    beside: dict[str, Path] = field(default_factory=dict)  # files copied beside a target that is one file
    texts_beside: dict[str, bytes] = field(default_factory=dict)  # further files beside such a target, by name
    seal: SealTexts | None = None  # makes texts from the size and CRC32 of each file
    is_folder: bool = True
    aside: dict[str, str] = field(default_factory=dict)  # entries of the source that are not written: what each is

    @property
    def targets(self) -> list[Target]:
        """Every tensor to write."""
        return [target for file in self.files for target in file.targets]

    @property
    def nbytes(self) -> int:
        """Total number of bytes of all tensors."""
        return sum(target.nbytes for target in self.targets)

    @property
    def filled(self) -> dict[str, str]:
        """Tensors, or parts of them, that do not come from the source, and their origin."""
        found = {}
        for target in self.targets:
            foreign = [b for b in target.view.blocks if b.source is not self.model.container]
            if foreign:
                block = foreign[0]
                what = f"{block.value:g}" if block.source is None else f"{block.name} of {block.source.path}"
                found[target.name] = what if len(foreign) == len(target.view.blocks) else f"in part: {what}"
        return found

    def check(self) -> None:
        """Check that every target is made exactly once, and that every source is used, or dropped for a reason.

        Raises: CheckpointMismatch.
        """
        counts = Counter((target.file, target.path) for target in self.targets)
        faults = [f"{path} is made twice" for (_, path), count in counts.items() if count > 1]
        for target in self.targets:
            if sum(math.prod(b.shape) for b in target.view.blocks) != target.view.numel:
                faults.append(f"{target.path} has {target.view.shape}, which its parts do not fill")
            if target.dtype != target.view.dtype and target.view.dtype not in FLOATS:
                faults.append(f"{target.path} is {target.view.dtype}, which cannot be cast to {target.dtype}")
        used = {name for target in self.targets for name in target.view.names}
        needed = [name for view in self.model.sources.values() for name in view.names if name not in self.model.dropped]
        faults += [f"{name} is neither used nor dropped" for name in needed if name not in used]
        if faults:
            raise CheckpointMismatch(
                f"{self.model.path}: the plan is not whole: {listed(faults)}. Nothing was written."
            )


def folded(said: Mapping[str, str]) -> dict[str, str]:
    """Merge names that differ only in their numbers and have equal values: `blocks.{0..5}.ln1.bias`."""
    facts = [{"name": name, "shape": (), "dtype": text} for name, text in said.items()]
    return {name: text for name, _, text in grouped(facts)}


def target_of(model: Source, name: str, file: str, options: Options, path: str = "") -> Target:
    """Plan one weight of a model."""
    view = model.tensors[name]
    dtype = options.dtype if options.dtype and view.dtype in FLOATS else view.dtype
    rule = model.rules.get(name, "copy")
    if dtype != view.dtype:
        rule += f", cast to {dtype}"
    return Target(name, path or name, file, dtype, view, rule)
