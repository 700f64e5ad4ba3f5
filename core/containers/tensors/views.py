"""View: a tensor as blocks of data in files, so that rearranging it moves no byte.

Every function here is pure geometry: it takes views and returns views. Reading a view (reading.py) gives its elements
dense and in row-major order, regardless of their layout in the files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..container import Container
from ..spec import ITEM_SIZES, TensorSpec, is_dense

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A box of a tensor: where it begins in the tensor, and where its elements are stored; or a constant value."""

    begin: Shape
    shape: Shape
    strides: Shape  # in elements, within the file
    offset: int  # of its first element's first byte
    file: str  # within the container
    source: Container | None  # None: every element is `value`
    name: str  # of the tensor that it is a part of, for people
    value: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor composed of blocks; each element is in exactly one of them."""

    dtype: str
    shape: Shape
    blocks: tuple[Block, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * ITEM_SIZES[self.dtype]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that it is composed of, each once."""
        return tuple(dict.fromkeys(block.name for block in self.blocks if block.source is not None))

    @property
    def is_constant(self) -> bool:
        """Whether it has no data from any file."""
        return bool(self.blocks) and all(block.source is None for block in self.blocks)

    @property
    def place(self) -> tuple[object, ...]:
        """A key that is equal for views of the same bytes of the same file, as tied tensors are."""
        blocks = ((b.begin, b.shape, b.strides, b.offset, b.file, id(b.source), b.value) for b in self.blocks)
        return (self.dtype, self.shape, *blocks)


def stored(container: Container, spec: TensorSpec) -> View:
    """View a tensor of a container as it is."""
    blocks = (Block(c.begin, c.shape, c.strides, c.offset, c.file, container, spec.name) for c in spec.blocks)
    return View(spec.dtype, spec.shape, tuple(block for block in blocks if 0 not in block.shape))


def filled(dtype: str, shape: Shape, value: float = 0.0) -> View:
    """Make a tensor of one value."""
    block = Block((0,) * len(shape), shape, (0,) * len(shape), 0, "", None, "", value)
    return View(dtype, shape, () if 0 in shape else (block,))


def permute(view: View, axes: Sequence[int]) -> View:
    """Permute the axes: axis k of the result is axis `axes[k]` of the view."""

    def order(values: Shape) -> Shape:
        return tuple(values[a] for a in axes)

    blocks = (replace(b, begin=order(b.begin), shape=order(b.shape), strides=order(b.strides)) for b in view.blocks)
    return View(view.dtype, order(view.shape), tuple(blocks))


def concatenate(views: Sequence[View], axis: int = 0) -> View:
    """Concatenate tensors along an axis."""
    blocks: list[Block] = []
    end = 0
    for view in views:
        blocks += [replace(b, begin=_put(b.begin, axis, 1, b.begin[axis] + end)) for b in view.blocks]
        end += view.shape[axis]
    return View(views[0].dtype, _put(views[0].shape, axis, 1, end), tuple(blocks))


def slice_axis(view: View, axis: int, start: int, stop: int) -> View:
    """Slice an axis from `start` up to `stop`."""
    item = ITEM_SIZES[view.dtype]
    blocks = []
    for block in view.blocks:
        low, high = max(block.begin[axis], start), min(block.begin[axis] + block.shape[axis], stop)
        if low < high:
            part = _part(block, axis, low - block.begin[axis], high - block.begin[axis], item)
            blocks.append(replace(part, begin=_put(part.begin, axis, 1, low - start)))
    return View(view.dtype, _put(view.shape, axis, 1, stop - start), tuple(blocks))


def split(view: View, axis: int, lengths: Sequence[int]) -> list[View]:
    """Split a tensor along an axis into parts of these lengths, which `concatenate` puts together."""
    edges = itertools.pairwise([0, *itertools.accumulate(lengths)])
    return [slice_axis(view, axis, start, stop) for start, stop in edges]


def split_axis(view: View, axis: int, inner: int) -> View:
    """Split an axis into two, the second of length `inner`."""
    item, blocks = ITEM_SIZES[view.dtype], []
    for block in view.blocks:
        for part in _aligned(block, axis, inner, item):
            begin, size, stride = part.begin[axis], part.shape[axis], part.strides[axis]
            rows = max(size // inner, 1)
            halves = (begin // inner, begin % inner), (rows, size // rows), (stride * inner, stride)
            blocks.append(_with_axes(part, axis, 1, *halves))
    return View(view.dtype, _put(view.shape, axis, 1, view.shape[axis] // inner, inner), tuple(blocks))


def merge_axes(view: View, axis: int) -> View:
    """Merge two consecutive axes into one."""
    item, inner, blocks = ITEM_SIZES[view.dtype], view.shape[axis + 1], []
    for block in view.blocks:
        n, whole = block.shape[axis], block.shape[axis + 1] == inner
        regular = whole and (n == 1 or block.strides[axis] == block.strides[axis + 1] * inner)
        parts = [block] if regular else [_part(block, axis, k, k + 1, item) for k in range(n)]
        for part in parts:
            begin = part.begin[axis] * inner + part.begin[axis + 1]
            stride = part.strides[axis + 1] if inner > 1 else part.strides[axis]
            blocks.append(_with_axes(part, axis, 2, (begin,), (part.shape[axis] * part.shape[axis + 1],), (stride,)))
    return View(view.dtype, _put(view.shape, axis, 2, view.shape[axis] * inner), tuple(blocks))


def unsqueeze(view: View, axis: int) -> View:
    """Insert an axis of length 1 (unsqueeze)."""
    blocks = (_with_axes(block, axis, 0, (0,), (1,), (0,)) for block in view.blocks)
    return View(view.dtype, _put(view.shape, axis, 0, 1), tuple(blocks))


def squeeze(view: View, axis: int) -> View:
    """Remove an axis of length 1 (squeeze)."""
    blocks = (_with_axes(block, axis, 1, (), (), ()) for block in view.blocks)
    return View(view.dtype, _put(view.shape, axis, 1), tuple(blocks))


def _part(block: Block, axis: int, low: int, high: int, item: int) -> Block:
    """Slice a block from `low` up to `high` along an axis, counted from the block's own begin."""
    step = block.strides[axis] if block.source is not None else 0
    return replace(
        block,
        begin=_put(block.begin, axis, 1, block.begin[axis] + low),
        shape=_put(block.shape, axis, 1, high - low),
        offset=block.offset + low * step * item,
    )


def _aligned(block: Block, axis: int, inner: int, item: int) -> Iterator[Block]:
    """Cut a block into pieces that each cover whole multiples of `inner`, or lie within one."""
    begin, end = block.begin[axis], block.begin[axis] + block.shape[axis]
    first, last = -(-begin // inner) * inner, end // inner * inner
    edges = sorted({begin, end, *(edge for edge in (first, last) if begin < edge < end)})
    for low, high in itertools.pairwise(edges):
        yield _part(block, axis, low - begin, high - begin, item)


def _with_axes(block: Block, axis: int, count: int, begin: Shape, shape: Shape, strides: Shape) -> Block:
    """Replace `count` axes of a block from `axis` on by others."""
    return replace(
        block,
        begin=_put(block.begin, axis, count, *begin),
        shape=_put(block.shape, axis, count, *shape),
        strides=_put(block.strides, axis, count, *strides),
    )


def _put(values: Shape, axis: int, count: int, *new: int) -> Shape:
    """Replace `count` values from `axis` on by new ones."""
    return (*values[:axis], *new, *values[axis + count :])


def is_in_order(view: View) -> bool:
    """Whether its blocks, one after another, are its elements in row-major order, so that bytes are only copied."""
    at = 0
    for block in sorted(view.blocks, key=lambda b: b.begin):
        dense = block.source is None or is_dense(block.shape, block.strides)
        if not dense or block.shape[1:] != view.shape[1:] or (block.shape and block.begin[0] != at):
            return False
        at += block.shape[0] if block.shape else 0
    return True
