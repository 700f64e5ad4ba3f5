"""Proof: read the result back, undo the plan's rules, and compare it with the source, bit for bit.

A cast is compared with the same cast of the source. Data from elsewhere (fills, moments) is compared with the plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from ..containers.checksum import THREADS, crc32, crc32_range
from ..containers.container import Check, Container
from ..containers.open import open_container
from ..containers.spec import ITEM_SIZES
from ..containers.tensors.averaged import AveragedTensors
from ..containers.tensors.reading import FLOATS, PIECE, Gatherer, cast, same_bytes
from ..containers.tensors.views import Block, View, is_in_order, slice_axis, stored
from ..errors import CheckpointDamaged, CheckpointMismatch
from ..families.rules import apply
from .plan import Plan, Progress, Target, WeightFile

Comparison = tuple[str, View, View]
Run = tuple[int, str, int, int]
"""A range of bytes in a file: container, name of the file in it, offset, length."""
Sums = Mapping[Run, tuple[Container, Check, str]]
"""The source's checksum of such a range, with the name of a tensor in it."""


def _run(container: Container, file: str, offset: int, size: int) -> Run:
    return id(container), file or container.path.name, offset, size


def _runs(view: View) -> Iterator[Run]:
    """The ranges of a file that are read completely when a tensor is read."""
    if is_in_order(view):
        item = ITEM_SIZES[view.dtype]
        for block in view.blocks:
            if block.source is not None:
                yield _run(block.source, block.file, block.offset, math.prod(block.shape) * item)


class Summing(Gatherer):
    """Compares the bytes it reads with their recorded checksum, when a block covers the checksum's whole range."""

    def __init__(self, sums: Sums, threads: int) -> None:
        super().__init__(threads)
        self._sums = sums
        self._found: tuple[Container, Check, str] | None = None
        self._crc32 = 0

    def read_on(self, block: Block, offset: int, left: int, into: memoryview) -> None:
        """Read like any gatherer, and update the checksum of the bytes."""
        super().read_on(block, offset, left, into)
        if offset == block.offset:
            assert block.source is not None
            self._found, self._crc32 = self._sums.get(_run(block.source, block.file, offset, left)), 0
        if self._found is not None:
            self._crc32 = crc32(into, self._crc32)
            if left == len(into):
                _refuse_damage(*self._found, self._crc32)


class Readers(ExitStack):
    """Pairs of gatherers, for the source and for the result; a thread borrows one, and its memory is reused."""

    def __init__(self, sums: Sums, threads: int) -> None:
        super().__init__()
        self._sums, self._threads = sums, threads
        self._idle: list[tuple[Summing, Gatherer]] = []

    @contextmanager
    def pair(self) -> Iterator[tuple[Summing, Gatherer]]:
        """Borrow a pair that no thread is using."""
        try:
            pair = self._idle.pop()
        except IndexError:  # all are in use
            pair = Summing(self._sums, self._threads), Gatherer(self._threads)
            for one in pair:
                self.enter_context(one)
        yield pair
        self._idle.append(pair)


def prove(plan: Plan, place: Path, progress: Progress) -> None:
    """Compare the result at `place` with the source of the plan, and the source with its own checksums.

    Raises: CheckpointDamaged with the name of the tensor that differs, in the result or in the source.
    """
    written: dict[str, View] = {}
    direct: list[Comparison] = []
    for file in plan.files:
        container = _opened(place / file.name if plan.is_folder else place, file, plan)
        for target in file.targets:
            view = stored(container, container.tensors[target.path])
            if target.is_weight:
                written[target.name] = view
            if not target.is_weight or any(b.source is not plan.model.container for b in target.view.blocks):
                direct.append((target.name, target.view, view))
    for rows, back in reversed(plan.model.route):
        try:
            written = apply(rows, written, plan.model.sizes, not back).tensors
        except CheckpointMismatch as error:
            reason = f"cannot be converted back ({error}). It was removed again."
            raise CheckpointDamaged(f"{plan.target}: {reason}") from error
    turned: list[Comparison] = []
    for name, source in plan.model.sources.items():
        if name in written:
            turned.append((name, *_common(source, written[name])))
        elif any(raw not in plan.model.dropped for raw in source.names):
            raise CheckpointDamaged(f"{plan.target}: {name} of {plan.model.path} is not in it. It was removed again.")
    _work_off(plan, direct + turned, progress)


def _work_off(plan: Plan, comparisons: list[Comparison], progress: Progress) -> None:
    """Compare with checksums and with the source on all processors, which share the memory of the largest tensor.

    A record's checksum is computed during the comparison if possible; other records are read separately.
    """
    sums = {
        _run(found[0], found[1].file, found[1].offset, found[1].size): found
        for found in checks_of(target.view for target in plan.targets)
    }
    share = max((one[2].nbytes for one in comparisons), default=0) // THREADS
    easy: list[Comparison] = []
    large: list[Comparison] = []
    compared: set[Run] = set()
    for one in comparisons:
        compared.update(_runs(one[1]))
        is_easy = all(is_in_order(view) or view.nbytes <= share for view in one[1:])
        (easy if is_easy else large).append(one)
    with Readers(sums, 1) as readers:
        jobs: list[Callable[[], None]] = [
            partial(compare_checksum, *found) for run, found in sums.items() if run not in compared
        ]
        jobs += [partial(_compare, plan, one, readers, progress) for one in easy]
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda job: job(), jobs):  # raises the first error, and starts no further job then
                pass
    with Readers(sums, THREADS) as readers:
        for one in large:
            _compare(plan, one, readers, progress)


def _common(source: View, made: View) -> tuple[View, View]:
    """Slice both to their common rows, when rows were cropped or padded."""
    if source.shape == made.shape or not source.shape or source.shape[1:] != made.shape[1:]:
        return source, made
    rows = min(source.shape[0], made.shape[0])
    return slice_axis(source, 0, 0, rows), slice_axis(made, 0, 0, rows)


def _opened(path: Path, file: WeightFile, plan: Plan) -> Container:
    """Open a written file, and compare its header with the plan."""
    container = open_container(path)
    expected: dict[str, Target] = {target.path: target for target in file.targets}
    for name in [*expected, *container.tensors]:
        spec, target = container.tensors.get(name), expected.get(name)
        found = (spec.dtype, tuple(spec.shape)) if spec else None
        if target is None or found != (target.dtype, tuple(target.view.shape)):
            raise CheckpointDamaged(
                f"{plan.target}: {name} is {found or 'missing'}, planned was "
                f"{(target.dtype, tuple(target.view.shape)) if target else 'nothing'}. It was removed again."
            )
    return container


def _compare(plan: Plan, comparison: Comparison, readers: Readers, progress: Progress) -> None:
    """Raise CheckpointDamaged unless the second view holds the elements of the first, cast as planned."""
    name, source, made = comparison
    count = PIECE // max(ITEM_SIZES[source.dtype], ITEM_SIZES[made.dtype])
    with readers.pair() as (one, two):
        left = _as(made.dtype, source.dtype, one.pieces(source, count * ITEM_SIZES[source.dtype]))
        right = two.pieces(made, count * ITEM_SIZES[made.dtype])
        for number, (a, b) in enumerate(itertools.zip_longest(left, right, fillvalue=memoryview(b""))):
            if not same_bytes(a, b):
                raise CheckpointDamaged(
                    f"{plan.target}: {name} is not what {plan.model.path} holds, within {len(a)} bytes from "
                    f"element {number * count} on. It was removed again; the disk may be failing."
                )
            progress(len(a))


def _as(dtype: str, given: str, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    for piece in pieces:
        yield cast(piece, given, dtype) if given != dtype and given in FLOATS else piece


def checks_of(views: Iterable[View]) -> Iterator[tuple[Container, Check, str]]:
    """The recorded checksums for the bytes of some views, each with the name of a tensor there."""
    used: dict[int, tuple[Container, set[str]]] = {}
    pending = list(views)
    while pending:
        for block in pending.pop().blocks:
            if isinstance(block.source, AveragedTensors):
                pending += block.source.parts[block.file]
            elif block.source is not None:
                used.setdefault(id(block.source), (block.source, set()))[1].add(block.name)
    for container, names in used.values():
        for check in container.checks:
            name = next((name for name in check.names if name in names), None)
            if check.crc32 is not None and name is not None:
                yield container, check, name


def compare_checksum(container: Container, check: Check, name: str) -> None:
    """Compare the bytes of a check with their checksum.

    Raises: CheckpointDamaged naming the tensor.
    """
    with container.open(check.file) as file:
        found = crc32_range(file.fileno(), check.offset, check.offset + check.size)
    _refuse_damage(container, check, name, found)


def _refuse_damage(container: Container, check: Check, name: str, found: int) -> None:
    if found != check.crc32:
        raise CheckpointDamaged(
            f"{container.path}: {name} is damaged (CRC32 {found:08x}, recorded {check.crc32:08x}). Nothing was written."
        )
