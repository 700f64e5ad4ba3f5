"""The elements of a tensor as dense bytes in row-major order, wherever and however they lie: no torch, no numpy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO, Literal

from ...errors import CheckpointDamaged, CheckpointError
from ..blocks import read_at
from ..container import Container
from ..pickles.inert import as_text
from ..spec import ITEM_SIZES, Chunk, TensorSpec

PIECE = 8 << 20
"""Bytes given at a time."""

_LARGEST_GAP = 32 << 10
"""Bytes that are read for nothing rather than skipped with a read of their own: both take some microseconds."""

_LARGEST_VIEW = 1 << 20
"""Bytes that a tensor may have beyond those of all files: a view can repeat what it looks at without end."""

Format = Literal["B", "H", "I", "Q"]
_FORMATS: dict[int, Format] = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""How memoryview calls units of so many bytes; an element of 16 bytes is two units."""

Dim = tuple[int, int, int]
"""One dimension of a block: its size, and its steps in the file and in the result, in units."""


def pieces(container: Container, spec: TensorSpec, size: int = PIECE) -> Iterator[bytes]:
    """Read the elements of a tensor in row-major order, at most `size` bytes (and at least one element) at a time.

    Memory is bounded by a few pieces, whatever the strides and blocks are.

    Raises: CheckpointNotFound when a file is gone, CheckpointDamaged when it cannot be read or ends too early,
        CheckpointError for a view that claims far more bytes than the files have.
    """
    if fault := inflated(container, spec):
        raise CheckpointError(f"{container.path}: {as_text(spec.name, 80)[1:-1]} {fault}.")
    item = ITEM_SIZES[spec.dtype]
    with _Source(container) as source:
        if spec.contiguous and not spec.chunks:
            step = max(size // item, 1) * item
            for start in range(0, spec.nbytes, step):
                yield source.read(spec.file, spec.offset + start, min(step, spec.nbytes - start))
            return
        blocks = spec.chunks or (
            Chunk(spec.file, spec.offset, spec.nbytes, (0,) * len(spec.shape), spec.shape, spec.strides),
        )
        unit = min(item, 8)
        for begin, end in _boxes(spec.shape, max(size // item, 1)):
            dense = bytearray(math.prod(e - b for b, e in zip(begin, end, strict=True)) * item)
            box = _Box(source, memoryview(dense), unit, max(size, _LARGEST_GAP))
            for block in blocks:
                box.add(begin, end, block, item // unit)
            yield bytes(dense)


def inflated(container: Container, spec: TensorSpec) -> str:
    """Say that a view repeats its elements beyond what is read; "" for any other tensor."""
    if spec.nbytes <= _LARGEST_VIEW or spec.nbytes <= (size := sum(container.files.values())):
        return ""
    return f"has {spec.nbytes} bytes, all files together {size}: a view that repeats its elements, not read"


class _Source:
    """Reads the files of a container, holding the last one open."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.name = ""
        self.file: BinaryIO | None = None
        self.held = ExitStack()

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Read these bytes of a file."""
        name = name or self.container.path.name
        path = self.container.path
        where = str(path if name == path.name else path / name)
        if self.file is None or name != self.name:
            self.held.close()
            self.file, self.name = self.held.enter_context(self.container.open(name)), name
        try:
            return read_at(self.file, offset, size, where)
        except OSError as error:
            raise CheckpointDamaged(f"{where}: cannot be read ({error.strerror}). The disk may be failing.") from error


def _boxes(shape: tuple[int, ...], most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a tensor into boxes (begin, end) of at most so many elements that follow one another in row-major order."""
    if 0 in shape:
        return
    if not shape:
        yield (), ()
        return
    cut = next(d for d in range(len(shape)) if math.prod(shape[d + 1 :]) <= most)
    rows, rest = most // math.prod(shape[cut + 1 :]), shape[cut + 1 :]
    for index in itertools.product(*map(range, shape[:cut])):
        for first in range(0, shape[cut], rows):
            last = min(first + rows, shape[cut])
            yield (*index, first, *(0 for _ in rest)), (*(i + 1 for i in index), last, *rest)


class _Box:
    """A box of a tensor while it is put together from what lies in the files."""

    def __init__(self, source: _Source, dense: memoryview, unit: int, most: int) -> None:
        self.source = source
        self.format = _FORMATS[unit]
        self.dense = dense.cast(self.format)
        self.unit = unit  # bytes
        self.most = most  # bytes read at a time
        self.file, self.offset = "", 0

    def add(self, begin: tuple[int, ...], end: tuple[int, ...], block: Chunk, units: int) -> None:
        """Put in what a block has of the box; each element is so many units."""
        dims: list[Dim] = [(units, 1, 1)]
        first, at, step = 0, 0, units
        for b, e, origin, n, stride in reversed(
            list(zip(begin, end, block.begin, block.shape, block.strides, strict=True))
        ):
            low, high = max(b, origin), min(e, origin + n)
            if low >= high:
                return
            dims.append((high - low, stride * units, step))
            first += (low - origin) * stride * units
            at += (low - b) * step
            step *= e - b
        self.file, self.offset = block.file, block.offset + first * self.unit
        repeated = [dim for dim in dims if dim[1] == 0 and dim[0] > 1]
        dims = _merged([dim for dim in dims if dim[1]])
        self.fill(dims, 0, at)
        dims = [(n, step, step) for n, _, step in dims]
        for n, _, step in repeated:
            done = 1
            while done < n:  # twice as many each time
                more = min(done, n - done)
                _scatter(self.dense, at + done * step, self.dense[at:], [*dims, (more, step, step)])
                done += more
            dims.append((n, step, step))

    def fill(self, dims: list[Dim], first: int, at: int) -> None:
        """Read dims, sorted by their steps in the file: at once where little lies between, else slice by slice."""
        if self.together(dims):
            data = self.source.read(self.file, self.offset + first * self.unit, _extent(dims) * self.unit)
            _scatter(self.dense, at, memoryview(data).cast(self.format), dims)
            return
        (n, step, dense_step), *inner = dims
        slices = 1
        if self.together(inner) and (step - _extent(inner)) * self.unit <= _LARGEST_GAP:
            slices = max((self.most // self.unit - _extent(inner)) // step + 1, 1)
        for i in range(0, n, slices):
            some = [(min(slices, n - i), step, dense_step), *inner] if slices > 1 else inner
            self.fill(some, first + i * step, at + i * dense_step)

    def together(self, dims: list[Dim]) -> bool:
        """Whether dims are worth one read."""
        gaps = ((step - _extent(dims[i + 1 :])) * self.unit for i, (_, step, _) in enumerate(dims))
        return _extent(dims) * self.unit <= self.most and all(gap <= _LARGEST_GAP for gap in gaps)


def _extent(dims: list[Dim]) -> int:
    """Units in the file from the first to the last, both counted."""
    return 1 + sum((n - 1) * step for n, step, _ in dims)


def _merged(dims: list[Dim]) -> list[Dim]:
    """Sort dims by their steps in the file, the largest first, and make one of two that follow on in both."""
    merged: list[Dim] = []
    for n, step, dense_step in sorted((dim for dim in dims if dim[0] > 1), key=lambda dim: -dim[1]):
        if merged and merged[-1][1:] == (n * step, n * dense_step):
            n *= merged.pop()[0]
        merged.append((n, step, dense_step))
    return merged


def _scatter(out: memoryview, at: int, data: memoryview, dims: list[Dim]) -> None:
    """Copy what lies in steps to where it belongs, along the longest dim at a time."""
    dims = sorted(_merged(dims) or [(1, 1, 1)])
    n, step, out_step = dims.pop()
    for index in itertools.product(*(range(count) for count, _, _ in dims)):
        first = sum(i * dim[1] for i, dim in zip(index, dims, strict=True))
        to = at + sum(i * dim[2] for i, dim in zip(index, dims, strict=True))
        out[to : to + (n - 1) * out_step + 1 : out_step] = data[first : first + (n - 1) * step + 1 : step]
