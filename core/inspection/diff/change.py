"""Change: how far the elements of one tensor moved, streamed from two checkpoints and computed piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...containers.spec import ITEM_SIZES
from ...containers.tensors.dtypes import INTEGERS, decode
from ...containers.tensors.reading import pieces, same_bytes
from ...containers.tensors.views import View, permute

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int], object]

BLOCK = 1 << 16
"""Elements processed at a time: intermediate results stay in the processor's cache."""


@dataclass(slots=True)
class Change:
    """Differences between a tensor's elements, in numbers that do not depend on the order of the two."""

    elements: int = 0
    changed: int = 0  # other bits; between two dtypes: another value
    nan: int = 0  # of these, NaN in one or both: not included in the maxima
    absolute: float = 0.0  # largest |b - a|
    relative: float = 0.0  # largest |b - a| / max(|a|, |b|): 1 where zero became something, at most 2
    squares: float = 0.0  # sum of (b - a) squared

    @property
    def rms(self) -> float:
        """The root mean square of b - a: how far an element moved, as an average."""
        return math.sqrt(self.squares / self.elements) if self.elements else 0.0

    def add(self, other: Change) -> None:
        """Include the elements of another piece."""
        self.elements += other.elements
        self.changed += other.changed
        self.nan += other.nan
        self.absolute = max(self.absolute, other.absolute)
        self.relative = max(self.relative, other.relative)
        self.squares += other.squares


def change_between(a: View, b: View, progress: Progress = lambda size: None) -> Change:
    """Compare two tensors of one shape, element by element.

    Bytes of one dtype that are equal are not decoded. Elements of one dtype are the same when their bits are; elements
    of two dtypes when their values are, or both are NaN. `progress` receives the number of bytes read from both.

    Raises: CheckpointNotFound, CheckpointDamaged as `pieces`.
    """
    a, b = _in_order_of_file(a, b)
    total = Change()
    sizes = ITEM_SIZES[a.dtype], ITEM_SIZES[b.dtype]
    for x, y in zip(pieces(a, BLOCK * sizes[0]), pieces(b, BLOCK * sizes[1]), strict=True):
        progress(len(x) + len(y))
        total.elements += len(x) // sizes[0]
        if a.dtype != b.dtype or not same_bytes(x, y):
            total.add(_measure(x, a.dtype, y, b.dtype))
    return total


def _in_order_of_file(a: View, b: View) -> tuple[View, View]:
    """Permute both to the axis order of the first one's file, so that its elements are mostly consecutive."""
    if not a.blocks:
        return a, b
    axes = sorted(range(len(a.shape)), key=lambda axis: -a.blocks[0].strides[axis])
    return permute(a, axes), permute(b, axes)


def is_zero(tensor: View) -> bool:
    """Whether every element is zero, by its bits."""
    return all(bytes(piece).count(0) == len(piece) for piece in pieces(tensor))


def _measure(x: bytes | memoryview, dtype_x: str, y: bytes | memoryview, dtype_y: str) -> Change:
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
        squares = float(distance @ distance)
        relative = absolute if absolute == np.inf else float(np.fmax.reduce(distance / size, initial=0.0))
    return Change(0, changed, unordered, absolute, relative, squares)


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
