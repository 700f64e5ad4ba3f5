"""Comparison: the differences between two checkpoints of any containers and programs; nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...containers.pickles.inert import as_text
from ...containers.plain import plain
from ...containers.tensors.views import View
from ...errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointNotFound
from ...families.common_names import common_fields, naming
from ...families.family import plain_names
from .change import Change, Progress, change_between, is_zero
from .side import Facts, Side

VALUES = ("config", "tokenizer", "step", "optimizer")
"""The parts of a comparison that are plain values."""


@dataclass
class Values:
    """Differences in plain values, by name."""

    same: int = 0
    different: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    only_a: Facts = field(default_factory=dict)
    only_b: Facts = field(default_factory=dict)
    remark: str = ""  # what was not compared, and why
    counts: bool = False  # whether that makes the checkpoints different

    @property
    def equal(self) -> bool:
        """Whether nothing was found that is not the same."""
        return not (self.different or self.only_a or self.only_b or self.counts)


@dataclass
class Pair:
    """One tensor in both checkpoints; `change` is None if its elements cannot be compared."""

    name: str
    a: View
    b: View
    change: Change | None = None

    @property
    def title(self) -> str:
        """Its title: the name in both files, without what wrappers add, or else its common name."""
        if len(self.a.names) == len(self.b.names) == 1:
            (first,), (second,) = plain_names(self.a.names), plain_names(self.b.names)
            return first if first == second else self.name
        return self.name

    @property
    def is_comparable(self) -> bool:
        """Whether elements correspond one to one; those of some dtypes hold two numbers."""
        return self.a.shape == self.b.shape and self.a.dtype.endswith("_x2") == self.b.dtype.endswith("_x2")

    @property
    def equal(self) -> bool:
        """Whether dtype, shape and every element are the same."""
        return self.a.dtype == self.b.dtype and self.change is not None and not self.change.changed


@dataclass
class Tensors:
    """Differences in tensors."""

    compared: int = 0
    different: list[Pair] = field(default_factory=list)  # other shapes, then the largest change first
    only_a: dict[str, View] = field(default_factory=dict)
    only_b: dict[str, View] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # why some could not be compared
    notes: list[str] = field(default_factory=list)  # differences in storage that do not matter

    @property
    def equal(self) -> bool:
        """Whether nothing was found that is not the same."""
        return not (self.different or self.only_a or self.only_b or self.faults)


@dataclass
class Comparison:
    """The differences between two checkpoints, and the parts that were not compared."""

    a: Side
    b: Side
    config: Values
    tokenizer: Values
    step: Values
    optimizer: Values  # its settings
    weights: Tensors
    moments: Tensors | None  # None where they were not compared
    ema: Tensors | None  # None where neither has one
    also: Tensors | None
    notes: list[str]

    @property
    def different(self) -> list[str]:
        """The parts that differ."""
        return [
            name
            for name in (*VALUES, "weights", "moments", "ema", "also")
            if (part := getattr(self, name)) is not None and not part.equal
        ]

    @property
    def equal(self) -> bool:
        """Whether all that was compared is the same."""
        return not self.different


def compare(a: Side, b: Side, moments: bool = False, progress: Progress = lambda size: None) -> Comparison:
    """Compare two checkpoints part by part, and their tensors element by element under common names.

    A part that only one of them has makes them different, unless the other is of another program or holds only
    weights: then it is reported, but does not count. `moments` compares the tensors of the optimizers' states too.
    `progress` receives the number of bytes read from both.

    Raises: CheckpointNotFound, CheckpointDamaged when a tensor cannot be read.
    """
    strict = a.program == b.program and not a.has_weights_alone and not b.has_weights_alone
    notes = []
    if naming(a.family) != naming(b.family):
        notes.append(f"no names in common are known for {a.family} and {b.family}: tensors of equal names are compared")
    optimizer, known = _compare_settings(a, b, strict)
    both = a.found.optimizer is not None and b.found.optimizer is not None
    if both and not (moments and known):
        notes.append(
            "the moments of the optimizers are not compared" + (": their owners are unknown" if moments else "")
        )
    return Comparison(
        a,
        b,
        config=_compare_configs(a, b, strict),
        tokenizer=_compare_values(plain(a.found.tokenizer), plain(b.found.tokenizer), strict),
        step=_compare_values(_step(a), _step(b), strict),
        optimizer=optimizer,
        weights=_compare_weights(a, b, progress),
        moments=_compare_moments(a, b, progress) if both and moments and known else None,
        ema=_compare_part("ema", a, b, progress),
        also=_compare_part("also", a, b, progress),
        notes=notes,
    )


def _step(side: Side) -> Facts | None:
    return None if side.found.step is None else {"step": side.found.step}


def _compare_values(a: Facts | None, b: Facts | None, strict: bool) -> Values:
    if a is None or b is None:
        if a is b:
            return Values(remark="neither has one")
        return Values(remark=f"only {'B' if a is None else 'A'} has one", counts=strict)
    shared = [name for name in a if name in b]
    different = {name: (a[name], b[name]) for name in shared if not _same(a[name], b[name])}
    return Values(
        same=len(shared) - len(different),
        different=different,
        only_a={name: value for name, value in a.items() if name not in b},
        only_b={name: value for name, value in b.items() if name not in a},
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal; true and 1 are not."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _compare_configs(a: Side, b: Side, strict: bool) -> Values:
    """Compare all fields of one program's configs; for two programs, the fields that mean the same in both."""
    if a.program == b.program or a.fields is None or b.fields is None:
        return _compare_values(a.fields, b.fields, strict)
    found = _compare_values(common_fields(a.fields), common_fields(b.fields), strict)
    found.only_a, found.only_b = {}, {}
    found.remark = "fields of two programs: those that mean the same in both are compared"
    return found


def _compare_settings(a: Side, b: Side, strict: bool) -> tuple[Values, bool]:
    """Compare the settings of the optimizers; also return whether the owners of their states are known."""
    settings: list[Facts | None] = []
    faults = []
    for side in (a, b):
        try:
            settings.append(side.settings)
        except CheckpointMismatch as error:
            faults.append(f"{side.found.path}: {error}")
    if faults:
        return Values(remark="; ".join(faults), counts=strict and len(faults) == 1), False
    first, second = settings
    if first is None or second is None:
        return _compare_values(first, second, strict), False
    try:
        return _compare_values(first | a.groups(), second | b.groups(), strict), True
    except CheckpointMismatch:
        found = _compare_values(first, second, strict)
        found.remark = "the tensors of its groups are unknown"
        return found, False


def _compare_weights(a: Side, b: Side, progress: Progress) -> Tensors:
    """Compare the models: a head that is the token table may be stored or not, a bias of zeros may be absent."""
    mine, theirs = dict(a.tensors), dict(b.tensors)
    notes = [f"{name} of {who}: {why}" for who, side in (("A", a), ("B", b)) for name, why in side.broken.items()]
    for name in {**a.broken, **b.broken}:  # then of both, part by part
        for side, tensors in ((a, mine), (b, theirs)):
            tensors.pop(name, None)
            tensors |= side.parts_of(name)
    for side, tensors, others, who in ((a, mine, theirs, "A"), (b, theirs, mine, "B")):
        if side.tied and side.tied[0] in others and side.tied[1] in tensors:
            head, table = side.tied
            tensors[head] = tensors[table]
            notes.append(f"{head} is not stored in {who}, which uses its token table for it: that is compared")
    both = a.masks.keys() & b.masks.keys()
    for who, side in (("A", a), ("B", b)):
        meanings = side.found.identity.buffers
        surplus = [meanings[original] for name, original in side.mask_names.items() if name not in both]
        if surplus:
            what = ", ".join(dict.fromkeys(surplus))
            notes.append(f"only {who} has {len(surplus)} buffers, which count for nothing ({what})")
    for side, tensors in ((a, mine), (b, theirs)):
        tensors |= {name: stored for name, stored in side.masks.items() if name in both}
    found = _compare_tensors(mine, theirs, progress)
    if a.is_gpt2 and b.is_gpt2 and a.family != b.family:
        for who, lone in (("A", found.only_a), ("B", found.only_b)):
            zeros = [name for name, stored in lone.items() if name.endswith(".bias") and is_zero(stored)]
            for name in zeros:
                del lone[name]
            if zeros:
                notes.append(f"only {who} has {len(zeros)} biases that are all zero, which is the same as none")
    found.notes = notes + _layouts(a, b, mine, theirs)
    return found


def _layouts(a: Side, b: Side, mine: dict[str, View], theirs: dict[str, View]) -> list[str]:
    """Report tensors that one of them stores in another layout than the other."""
    said = []
    both = [name for name in mine if name in theirs]
    for who, one, other in (("A", (a, mine), (b, theirs)), ("B", (b, theirs), (a, mine))):
        pairs = [(len(one[1][name].names), len(other[1][name].names)) for name in both]
        joined = [x for x, y in pairs if x > y]
        turned = sum(one[0].is_transposed(name) > other[0].is_transposed(name) for name in both)
        said += [f"{len(joined)} tensors are made of {sum(joined)} in {who}"] if joined else []
        said += [f"{turned} tensors are transposed in {who}"] if turned else []
    return said


def _compare_moments(a: Side, b: Side, progress: Progress) -> Tensors:
    return _compare_both(a.moments(), b.moments(), progress)


def _compare_part(name: str, a: Side, b: Side, progress: Progress) -> Tensors | None:
    """Compare ema.pt or also.pt; that only one of two bundles has one makes them different."""
    mine, theirs = a.part(name), b.part(name)
    if mine is None and theirs is None:
        return None
    if mine is None or theirs is None:
        only = f"only {'A' if theirs is None else 'B'} has {name}.pt"
        strict = a.found.bundle is not None and b.found.bundle is not None
        return Tensors(faults=[only]) if strict else Tensors(notes=[only])
    return _compare_both(mine, theirs, progress)


def _compare_both(a: tuple[dict[str, View], Facts], b: tuple[dict[str, View], Facts], progress: Progress) -> Tensors:
    (tensors_a, values_a), (tensors_b, values_b) = a, b
    found = _compare_tensors(tensors_a, tensors_b, progress)
    values = _compare_values(values_a, values_b, True)
    found.faults += [f"{name}: {as_text(x, 60)} and {as_text(y, 60)}" for name, (x, y) in values.different.items()]
    found.faults += [f"{name} is only in A" for name in values.only_a]
    found.faults += [f"{name} is only in B" for name in values.only_b]
    return found


def _compare_tensors(a: dict[str, View], b: dict[str, View], progress: Progress) -> Tensors:
    found = Tensors(
        only_a={name: stored for name, stored in a.items() if name not in b},
        only_b={name: stored for name, stored in b.items() if name not in a},
    )
    seen: dict[Any, Change] = {}  # tied tensors are read once
    for name in a:
        if name not in b:
            continue
        pair = Pair(name, a[name], b[name])
        places = (pair.a.place, pair.b.place)
        try:
            if pair.is_comparable:
                pair.change = seen.get(places) or change_between(pair.a, pair.b, progress)
                seen[places] = pair.change
        except (CheckpointDamaged, CheckpointNotFound):
            raise
        except CheckpointError as error:  # a view that claims far more bytes than there are
            found.faults.append(str(error))
            continue
        found.compared += 1
        if not pair.equal:
            found.different.append(pair)
    found.different.sort(key=_largest_first)
    return found


def _largest_first(pair: Pair) -> tuple[Any, ...]:
    change = pair.change
    if change is None:
        return (0,)
    return 1, -bool(change.nan), -change.absolute, -change.relative, -change.changed
