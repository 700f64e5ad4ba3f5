"""Change: how far the numbers of one tensor moved, streamed from two checkpoints and computed piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ...containers.container import Container
from ...containers.spec import ITEM_SIZES, TensorSpec
from ...containers.tensors.dtypes import INTEGERS, decode
from ...containers.tensors.elements import pieces
from ...errors import CheckpointDamaged

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int], object]

BLOCK = 1 << 16
"""Elements that are computed with at a time: what is made of them stays in the processor's cache."""


@dataclass(slots=True)
class Change:
    """What of a tensor's elements is not the same, in numbers that do not depend on which of the two is first."""

    elements: int = 0
    changed: int = 0  # other bits; between two dtypes: another value
    nan: int = 0  # of these, NaN in one or both: they have no size
    absolute: float = 0.0  # largest |b - a|
    relative: float = 0.0  # largest |b - a| / max(|a|, |b|): 1 where zero became something, at most 2

    def add(self, other: Change) -> None:
        """Take the elements of another piece into account."""
        self.elements += other.elements
        self.changed += other.changed
        self.nan += other.nan
        self.absolute = max(self.absolute, other.absolute)
        self.relative = max(self.relative, other.relative)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it lies in a checkpoint: whole, transposed, or in parts that follow one another along its rows."""

    container: Container
    names: tuple[str, ...]
    parts: tuple[TensorSpec, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as the model has it."""
        first = self.parts[0].shape
        shape = (first[0] * len(self.parts), *first[1:]) if len(self.parts) > 1 else first
        return shape[::-1] if self.transposed else shape

    @property
    def dtype(self) -> str:
        """The dtype of its parts."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return sum(part.nbytes for part in self.parts)

    @property
    def fault(self) -> str:
        """Why its parts make no tensor; "" where they do."""
        first = self.parts[0]
        for name, part in zip(self.names[1:], self.parts[1:], strict=True):
            if (part.dtype, part.shape) != (first.dtype, first.shape) or not part.shape:
                return f"{name} is {part.dtype} {part.shape}, but {self.names[0]} is {first.dtype} {first.shape}"
        return ""

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it lies: two tensors of one place are the same bytes."""
        parts = ((p.file, p.storage, p.offset, p.shape, p.strides, p.dtype) for p in self.parts)
        return (str(self.container.path), self.transposed, *parts)

    def pieces(self) -> Iterator[bytes]:
        """Its elements in row-major order, some MiB at a time."""
        specs = map(_turned, self.parts) if self.transposed else iter(self.parts)
        return chain.from_iterable(pieces(self.container, spec) for spec in specs)


def _turned(spec: TensorSpec) -> TensorSpec:
    """The transpose of a tensor, from the same bytes."""
    chunks = tuple(
        replace(chunk, begin=chunk.begin[::-1], shape=chunk.shape[::-1], strides=chunk.strides[::-1])
        for chunk in spec.chunks
    )
    return replace(spec, shape=spec.shape[::-1], strides=spec.strides[::-1], chunks=chunks)


def change_between(a: Stored, b: Stored, progress: Progress = lambda size: None) -> Change:
    """Compare two tensors of one shape, element by element.

    Bytes of one dtype that are equal are not decoded. Elements of one dtype are the same when their bits are; elements
    of two dtypes when their values are, or both are NaN. `progress` is told the bytes read of both.

    Raises: CheckpointNotFound, CheckpointDamaged as `pieces`.
    """
    if a.transposed and b.transposed:  # the same elements in the order of the files
        a, b = replace(a, transposed=False), replace(b, transposed=False)
    total = Change()
    sizes = ITEM_SIZES[a.dtype], ITEM_SIZES[b.dtype]
    for x, y in _together(a, b):
        progress(len(x) + len(y))
        count = len(x) // sizes[0]
        total.elements += count
        if a.dtype == b.dtype and x == y:
            continue
        for start in range(0, count, BLOCK):
            one, other = (data[start * n : (start + BLOCK) * n] for data, n in zip((x, y), sizes, strict=True))
            if a.dtype != b.dtype or one != other:
                total.add(_measure(one, a.dtype, other, b.dtype))
    return total


def is_zero(tensor: Stored) -> bool:
    """Whether every element is zero, by its bits."""
    return all(data == bytes(len(data)) for data in tensor.pieces())


def _together(a: Stored, b: Stored) -> Iterator[tuple[bytes, bytes]]:
    """The same elements of both, as many at a time as both have read."""
    sources, sizes = (a.pieces(), b.pieces()), (ITEM_SIZES[a.dtype], ITEM_SIZES[b.dtype])
    data, at = [b"", b""], [0, 0]
    while True:
        for i in (0, 1):
            if at[i] == len(data[i]):
                data[i], at[i] = next(sources[i], b""), 0
        count = min((len(data[i]) - at[i]) // sizes[i] for i in (0, 1))
        if not count:
            break
        ends = [at[i] + count * sizes[i] for i in (0, 1)]
        yield data[0][at[0] : ends[0]], data[1][at[1] : ends[1]]
        at = ends
    if data != [b"", b""]:
        short = a if not data[0] else b
        raise CheckpointDamaged(f"{short.container.path}: {short.names[0]} ended early, expected {short.nbytes} bytes.")


def _measure(x: bytes, dtype_x: str, y: bytes, dtype_y: str) -> Change:
    import numpy as np

    a, b = decode(x, dtype_x), decode(y, dtype_y)
    with np.errstate(all="ignore"):
        if dtype_x == dtype_y:
            code = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}.get(ITEM_SIZES[dtype_x], f"V{ITEM_SIZES[dtype_x]}")
            differ = np.frombuffer(x, code) != np.frombuffer(y, code)
        else:
            differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        changed = int(np.count_nonzero(differ))
        if changed < len(differ):
            numbers = np.repeat(differ, len(a) // len(differ))  # some dtypes have two numbers in an element
            a, b = a[numbers], b[numbers]
        distance, size = _distance(a, b, dtype_x == dtype_y and dtype_x in INTEGERS)
        if unordered := int(np.count_nonzero(np.isnan(distance))):
            kept = ~np.isnan(distance)
            distance, size = distance[kept], size[kept]
        absolute = float(distance.max(initial=0.0))
        relative = absolute if absolute == np.inf else float(np.fmax.reduce(distance / size, initial=0.0))
    return Change(0, changed, unordered, absolute, relative)


def _distance(a: np.ndarray, b: np.ndarray, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """|b - a| and max(|a|, |b|), as float64."""
    import numpy as np

    wide = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
    x, y = a.astype(wide), b.astype(wide)
    size = np.maximum(np.abs(x), np.abs(y))
    if not whole:
        return np.abs(y - x), size
    high, low = np.maximum(a, b), np.minimum(a, b)  # float64 does not hold every int64, but modulo 2**64 it comes right
    return (high.astype(np.uint64) - low.astype(np.uint64)).astype(np.float64), size
