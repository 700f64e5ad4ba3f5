"""Statistics of a tensor, computed piece by piece from the bytes in its file: no torch, little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..containers.container import Container
from ..containers.spec import ITEM_SIZES, TensorSpec
from ..containers.tensors.dtypes import decode
from ..containers.tensors.reading import inflated, pieces
from ..containers.tensors.views import View, stored

if TYPE_CHECKING:
    import numpy as np  # costs a tenth of a second, which a plain inspection does not need

    Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK = 1 << 16
"""Elements computed at a time, so that all of them stay in a core's cache."""

_LARGE = 1e150
"""Beyond it squares may exceed the range of float64."""

BY_MAGNITUDE = "complex, by magnitude"
TWO_IN_ONE = "two numbers in each byte"

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Stat:
    """Statistics of a tensor's elements; NaN and infinities are counted, everything else covers the finite ones.

    min, max, mean and std are None when there are too few elements; std is that of a sample, as in torch.
    """

    name: str
    count: int  # of numbers, in float4 two for each element
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    min: float | None = None  # an int for types of whole numbers
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    norm: float = 0.0  # the root of the sum of squares
    note: str = ""  # how to read it, or why it was not computed

    @property
    def zero_fraction(self) -> float:
        """Fraction of all elements that are zero; 0 for an empty tensor."""
        return self.zeros / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class Histogram:
    """Histogram of a tensor's finite elements, in bins of equal width from `low` to `high`."""

    low: float
    high: float
    counts: list[int]


def statistics(container: Container, names: Iterable[str], progress: Progress = lambda size: None) -> Iterator[Stat]:
    """Compute the statistics of these tensors, one after another; `progress` receives the number of bytes read.

    Tensors that share all their elements are read once. A tensor that cannot be read here has a `note` with the reason.

    Raises: CheckpointNotFound, CheckpointDamaged when a file is gone or ends too early.
    """
    known: dict[Any, Stat] = {}
    for name in names:
        spec = container.tensors[name]
        key = (spec.file, spec.offset, spec.dtype, spec.shape, spec.strides, spec.chunks)
        if key not in known:
            known[key] = _stat(container, spec, progress)
        yield replace(known[key], name=name)


def histogram(container: Container, spec: TensorSpec, bins: int, stat: Stat | None = None) -> Histogram | None:
    """Count the finite elements of a tensor in `parts` bins of equal width; None when it has none.

    `stat` avoids computing the statistics again.

    Raises: as `statistics`.
    """
    import numpy as np

    stat = stat or _stat(container, spec, lambda size: None)
    if stat.min is None or stat.max is None:
        return None
    widest = float(np.finfo(np.float64).max) / 4  # the difference of larger values would overflow
    low, high = (min(max(float(end), -widest), widest) for end in (stat.min, stat.max))
    counts = np.zeros(bins, np.int64)
    with np.errstate(invalid="ignore"):
        for values, copies in _values(container, spec):
            work = np.clip(values[np.isfinite(values)].astype(np.float64), low, high)
            work -= low
            if high > low:
                work /= high - low
            found = np.bincount(np.minimum((work * bins).astype(np.int64), bins - 1), minlength=bins)
            counts += found * copies
    return Histogram(low, high, counts.tolist())


def _stat(container: Container, spec: TensorSpec, progress: Progress) -> Stat:
    """The statistics of one tensor."""
    import numpy as np

    if faults := [fault for part, _ in _parts(container, spec) if (fault := inflated(part))]:
        return Stat(spec.name, spec.numel, note=faults[0])
    sums = _Sums()
    with np.errstate(over="ignore", invalid="ignore"):  # of signaling NaNs
        for values, copies in _values(container, spec, progress):
            sums.add(values, copies)
        return sums.stat(spec)


def _values(
    container: Container, spec: TensorSpec, progress: Progress = lambda size: None
) -> Iterator[tuple[Array, int]]:
    """Yield the elements as numbers in blocks, in any order, with the number of times each block counts."""
    block = _BLOCK * ITEM_SIZES[spec.dtype]
    for part, copies in _parts(container, spec):
        for piece in pieces(part, block):
            yield _real(decode(piece, spec.dtype)), copies
            progress(len(piece))


def _real(values: Array) -> Array:
    """Numbers that can be ordered and summed: magnitudes of complex ones, and halves in float32."""
    import numpy as np

    if values.dtype.kind == "c":  # in float64 there is room for the squares of float32
        return np.hypot(values.real.astype(np.float64), values.imag.astype(np.float64))
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _parts(container: Container, spec: TensorSpec) -> Iterator[tuple[View, int]]:
    """Yield the blocks of a tensor in byte order, without repeating dimensions, and how often each repeats."""
    for block in stored(container, spec).blocks:
        dims = sorted(zip(block.strides, block.shape, strict=True), reverse=True)
        strides = tuple(stride for stride, _ in dims if stride)
        shape = tuple(size for stride, size in dims if stride)
        part = replace(block, begin=(0,) * len(shape), shape=shape, strides=strides)
        yield View(spec.dtype, shape, (part,)), math.prod(size for stride, size in dims if not stride)


class _Sums:
    """Statistics so far."""

    def __init__(self) -> None:
        self.count = self.nan = self.inf = self.zeros = self.finite = 0
        self.low: Any = None
        self.high: Any = None
        self.mean: Any = 0.0
        self.squares: Any = 0.0  # of the differences from the mean

    def add(self, values: Array, copies: int) -> None:
        """Add a block of numbers `times` times.

        Means and squares are merged as Chan, Golub and LeVeque do (Algorithms for computing the sample variance, 1983).
        """
        import numpy as np

        self.count += len(values) * copies
        low, high = values.min(), values.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            nan, finite = int(np.count_nonzero(np.isnan(values))), values[np.isfinite(values)]
            self.nan += nan * copies
            self.inf += (len(values) - nan - len(finite)) * copies
            if not len(finite):
                return
            values, low, high = finite, finite.min(), finite.max()
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)
        self.zeros += int(np.count_nonzero(values == 0)) * copies
        mean, squares = _mean_and_squares(values, low, high)
        before, number = self.finite, len(values) * copies
        self.finite += number
        delta = mean - self.mean
        self.mean += delta * number / self.finite
        self.squares += squares * copies + delta * delta * before * number / self.finite

    def stat(self, spec: TensorSpec) -> Stat:
        """The result."""
        note = (
            BY_MAGNITUDE if spec.dtype.startswith("complex") else TWO_IN_ONE if spec.dtype == "float4_e2m1fn_x2" else ""
        )
        found = Stat(spec.name, self.count, self.nan, self.inf, self.zeros, note=note)
        if not self.finite:
            return found
        return replace(
            found,
            min=self.low.item(),
            max=self.high.item(),
            mean=float(self.mean),
            std=float((self.squares / (self.finite - 1)) ** 0.5) if self.finite > 1 else None,
            norm=float((self.squares + self.mean * self.mean * self.finite) ** 0.5),
        )


def _mean_and_squares(values: Array, low: Any, high: Any) -> tuple[Any, Any]:
    """Mean of finite numbers, and the sum of the squares of their differences from it."""
    import numpy as np

    large = max(abs(float(low)), abs(float(high))) > _LARGE
    kind = np.longdouble if large else np.float64
    if low == high:
        return kind(low), 0.0
    work: Any = values.astype(kind)
    mean = work.mean()
    work -= mean
    return mean, np.square(work, out=work).sum()  # the dot product of a BLAS would start threads for so little
