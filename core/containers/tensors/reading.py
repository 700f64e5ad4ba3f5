"""Read the elements of a tensor as bytes in row-major order, in pieces, for any strides and blocks; and cast them.

Bytes that are already in order are read and passed on without NumPy. Others are copied to their places, a slab of the
file at a time. An example is a transposed tensor, with the file's rows across the page:

    in the file                    in memory
    a0 a1 a2 a3 a4 | a slab:       a0 b0 | c0 d0 | e0    A disk and a cache give runs of bytes, so the file is read
    b0 b1 b2 b3 b4 | one read      a1 b1 | c1 d1 | e1    from its front to its end, in runs of 2 MiB at most. In the
    c0 c1 c2 c3 c4 | the next      a2 b2 | c2 d2 | e2    order of memory, each of a0 b0 c0 would be a read of its own.
    d0 d1 d2 d3 d4 |               a3 b3 | c3 d3 | e3    A slab stays in a core's cache while its elements are copied
    e0 e1 e2 e3 e4 | the last      a4 b4 | c4 d4 | e4    to their places; several threads can have one each.

What lies between wanted elements is read and dropped while it is little (`SMALL`, `_MOST_SPARSE`); where it is much,
a slab is cut along its longest stride until it is not. Memory is that of the tensor, or `room` bytes: then it is cut
into bands that follow one another, and the file is passed over once for each.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from ...errors import CheckpointDamaged, CheckpointError
from .. import checksum
from ..pickles.inert import as_name
from ..spec import ITEM_SIZES, reach
from .dtypes import decode
from .views import Block, View, is_in_order, slice_axis

if TYPE_CHECKING:
    import numpy as np

PIECE = 512 * 1024
"""Bytes at a time: what stays in a core's cache between being read, summed, compared and written."""

SLAB = 2 << 20
"""Bytes read at a time of a tensor whose elements have to be reordered; they too stay in a core's cache."""

ROOM = 16 << 20
"""Bytes of memory for reordering tensors of any size."""

SMALL, _MOST_SPARSE = 16384, 4
"""Gap, in elements, up to which unwanted elements are read rather than skipped, and their limit per wanted element."""

_LARGE = 2 << 20  # bytes of a tensor that threads are worth starting for
_MOST_OPEN = 64  # files; a folder may have thousands

_SHARED, _APART = 2048, 64
"""Rows at a distance of a multiple of 2 KiB share a few sets of a core's nearest cache: a column of them does not fit.
In memory they are put 64 bytes further apart, which is up to four times as fast."""

_TILE = 64, 2048  # elements that follow one another where they are put, and where they lie

FLOATS = ("float64", "float32", "float16", "bfloat16")
"""Dtypes between which tensors can be cast."""


_LARGEST_VIEW = 1 << 20
"""Bytes that a tensor may have beyond those of all files: a view can repeat its elements without limit."""

Job = Callable[[], None]


def pieces(view: View, size: int = PIECE) -> Iterator[memoryview]:
    """Read the elements in row-major order, `size` bytes at a time, in memory that the next piece overwrites.

    Memory is bounded, whatever the tensor's size, strides and blocks are; a piece has one element at least.

    Raises: CheckpointNotFound when a file is gone, CheckpointDamaged when it cannot be read or ends too early,
        CheckpointError for a view that claims far more bytes than the files have.
    """
    if fault := inflated(view):
        source = next(block.source for block in view.blocks if block.source is not None)
        raise CheckpointError(f"{source.path}: {as_name(view.names[0])} {fault}.")
    item = ITEM_SIZES[view.dtype]
    with Gatherer(1, ROOM) as gatherer:
        yield from gatherer.pieces(view, max(size // item, 1) * item)


def inflated(view: View) -> str:
    """Describe a view that repeats its elements beyond the limit; "" for any other tensor."""
    if view.nbytes <= _LARGEST_VIEW:
        return ""
    sources = {id(block.source): block.source for block in view.blocks if block.source is not None}
    size = sum(sum(source.files.values()) for source in sources.values())
    size += sum(one.size for source in sources.values() for one in source.unpacked.values())
    if view.nbytes <= size:
        return ""
    return f"has {view.nbytes} bytes, all files together {size}: a view that repeats its elements, not read"


class Gatherer:
    """Reads views of any containers, keeping their files open; `threads` threads reorder a large tensor.

    With `room`, at most that many bytes are reordered at a time, otherwise a whole tensor.
    """

    def __init__(self, threads: int = checksum.THREADS, room: int | None = None) -> None:
        self._threads = threads
        self._room = room
        self._held = ExitStack()
        self._files: dict[tuple[int, str], BinaryIO] = {}
        self._piece = bytearray()
        self._tensor: mmap.mmap | bytes = b""
        self._idle: list[_Slab] = []

    def __enter__(self) -> Gatherer:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def pieces(self, view: View, size: int = PIECE) -> Iterator[memoryview]:
        """Yield the elements in row-major order, `size` bytes at a time, in memory that the next piece overwrites.

        Raises: CheckpointDamaged when a file cannot be read or ends too early.
        """
        if not is_in_order(view):
            yield from self._placed_pieces(view, size)
            return
        room, filled = self._room_for_piece(size), 0
        for block in sorted(view.blocks, key=lambda b: b.begin):
            left, offset = math.prod(block.shape) * ITEM_SIZES[view.dtype], block.offset
            while left:
                part = room[filled : filled + min(size - filled, left)]
                if block.source is None:
                    element = _constant(view.dtype, block.value)
                    part[:] = element * (len(part) // len(element))
                else:
                    self.read_on(block, offset, left, part)
                left, offset, filled = left - len(part), offset + len(part), filled + len(part)
                if filled == size:
                    yield room
                    filled = 0
        if filled:
            yield room[:filled]

    def _placed_pieces(self, view: View, size: int) -> Iterator[memoryview]:
        if self._room is None or view.nbytes <= self._room:
            whole = self._placed(view)
            for start in range(0, len(whole), size):
                yield whole[start : start + size]
            return
        room, filled = self._room_for_piece(size), 0
        for band in _bands(view, self._room):
            whole, start = self._placed(band), 0
            while start < len(whole):
                part = whole[start : start + size - filled]
                room[filled : filled + len(part)] = part
                start, filled = start + len(part), filled + len(part)
                if filled == size:
                    yield room
                    filled = 0
        if filled:
            yield room[:filled]

    def _room_for_piece(self, size: int) -> memoryview:
        if len(self._piece) != size:
            self._piece = bytearray(size)
        return memoryview(self._piece)

    def read_on(self, block: Block, offset: int, left: int, into: memoryview) -> None:
        """Read the next bytes of a block in order, of which `left` remain; subclasses observe the bytes here."""
        self._read(block, offset, into)

    def _read(self, block: Block, offset: int, into: memoryview) -> None:
        assert block.source is not None
        file = self._file(block)
        where, done = _where(block), 0
        try:
            while done < len(into):
                count = block.source.read_into(file, into[done:], offset + done)
                if not count:
                    raise CheckpointDamaged(
                        f"{where}: {block.name} ends after {offset + done} of {offset + len(into)} bytes of the file. "
                        "It was cut off while it was read."
                    )
                done += count
        except OSError as error:
            raise CheckpointDamaged(f"{where}: cannot be read ({error.strerror}). The disk may be failing.") from error

    def _file(self, block: Block) -> BinaryIO:
        assert block.source is not None
        name = block.file or block.source.path.name
        key = (id(block.source), name)
        if key not in self._files:
            if len(self._files) >= _MOST_OPEN:
                self._close()
            self._files[key] = self._held.enter_context(block.source.open(name))
        return self._files[key]

    def _close(self) -> None:
        self._held.close()
        self._files.clear()

    def _placed(self, view: View) -> memoryview:
        """All elements of a tensor in row-major order, copied by several threads when it is large."""
        import numpy as np

        item = ITEM_SIZES[view.dtype]
        kind: np.dtype = np.dtype(f"u{item}" if item <= 8 else "V16")
        if len(self._tensor) < view.nbytes:  # else reused: newly allocated memory has to be cleared first
            self._tensor = b""
            self._tensor = mmap.mmap(-1, view.nbytes)  # it returns to the system as soon as it is released
        dense = memoryview(self._tensor)[: view.nbytes]
        out = np.frombuffer(dense, kind).reshape(view.shape)
        if self._threads == 1 or view.nbytes < _LARGE or not self._can_share(view):
            for fill in self._fills(view, out):
                fill()
            return dense
        from concurrent.futures import ThreadPoolExecutor  # takes as long to import as a small file to read

        def fill_share(number: int) -> None:  # each makes its own jobs as it goes: a tensor may have millions
            for fill in itertools.islice(self._fills(view, out), number, None, self._threads):
                fill()

        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(fill_share, range(self._threads)):  # which raises the error of any
                pass
        return dense

    def _can_share(self, view: View) -> bool:
        """Open all files of a view, so that several threads may read them; False when there are too many."""
        files = {(id(block.source), block.file): block for block in view.blocks if block.source is not None}
        if not checksum.POSITIONED_READS or len(files) > _MOST_OPEN:
            return False
        if len(self._files) + len(files) > _MOST_OPEN:
            self._close()
        for block in files.values():
            self._file(block)
        return True

    def _fills(self, view: View, out: np.ndarray) -> Iterator[Job]:
        """Yield the jobs that copy all elements of a tensor to their places."""
        import numpy as np

        for block in view.blocks:
            box = out[tuple(slice(b, b + n) for b, n in zip(block.begin, block.shape, strict=True))]
            if block.source is None:
                yield partial(box.__setitem__, ..., np.frombuffer(_constant(view.dtype, block.value), out.dtype)[0])
            else:
                order = sorted(range(box.ndim), key=lambda d: -block.strides[d])
                strides = tuple(block.strides[d] for d in order)
                yield from self._slabs(block, box.transpose(order), strides, block.offset)

    def _slabs(self, block: Block, box: np.ndarray, strides: tuple[int, ...], offset: int) -> Iterator[Job]:
        """Yield the jobs that fill a box, its axes sorted by their strides in the file; each job reads one slab."""
        item, extent = box.itemsize, reach(box.shape, strides)
        if box.ndim == 0 or (extent * item <= SLAB and extent <= _MOST_SPARSE * box.size + SMALL):
            yield partial(self._fill, block, box, strides, offset)
            return
        inner = reach(box.shape[1:], strides[1:])
        rows = (SLAB // item - inner) // max(strides[0], 1) + 1
        if rows >= box.shape[0] or rows < 2 or strides[0] > _MOST_SPARSE * inner + SMALL:
            rows = 0  # the bytes in between would be read in vain
        for k in range(0, box.shape[0], rows or 1):
            part, at = (box[k : k + rows], strides) if rows else (box[k, ...], strides[1:])
            yield from self._slabs(block, part, at, offset + k * strides[0] * item)

    def _fill(self, block: Block, box: np.ndarray, strides: tuple[int, ...], offset: int) -> None:
        """Fill a box from a slab of the file."""
        import numpy as np

        try:
            slab = self._idle.pop()
        except IndexError:  # the first of a thread
            slab = _Slab()
        size = reach(box.shape, strides) * box.itemsize
        steps = tuple(stride * box.itemsize for stride in strides)
        if _lies_apart(block, box, strides):
            self._read_rows(block, offset, slab.rows(steps[0], size))
            steps = steps[0] + _APART, *steps[1:]
        else:
            self._read(block, offset, slab.data[:size])
        flat = np.frombuffer(slab.data, box.dtype)
        _put(box, np.lib.stride_tricks.as_strided(flat, box.shape, steps, writeable=False))
        self._idle.append(slab)

    def _read_rows(self, block: Block, offset: int, rows: list[memoryview]) -> None:
        """Read consecutive bytes of a file into rows of memory: by one call, where that gives all of them."""
        with contextlib.suppress(OSError):  # which is raised again below, where it names the tensor
            if os.preadv(self._file(block).fileno(), rows, offset) == sum(map(len, rows)):
                return
        for row in rows:
            self._read(block, offset, row)
            offset += len(row)


class _Slab:
    """Memory for a slab of a file; its rows can lie apart."""

    def __init__(self) -> None:
        self.data = memoryview(bytearray(SLAB + (SLAB // _SHARED + 1) * _APART))
        self._width = 0
        self._rows: list[memoryview] = []

    def rows(self, width: int, size: int) -> list[memoryview]:
        """The first `size` bytes of rows of `width` bytes each, between which `_APART` bytes are left out."""
        if width != self._width:
            self._width, starts = width, range(0, -(-SLAB // width) * (width + _APART), width + _APART)
            self._rows = [self.data[start : start + width] for start in starts]
        whole, rest = divmod(size, width)
        return self._rows[:whole] + ([self._rows[whole][:rest]] if rest else [])


def _lies_apart(block: Block, box: np.ndarray, strides: tuple[int, ...]) -> bool:
    """Whether the rows of a slab, which are read whole, are put apart from one another in memory."""
    if box.ndim < 2 or strides[0] * box.itemsize % _SHARED or not 0 < reach(box.shape[1:], strides[1:]) <= strides[0]:
        return False
    return block.source is not None and block.source.scatters


def _bands(view: View, most: int) -> Iterator[View]:
    """Cut a view into consecutive views of at most `size` bytes each, and at least one element."""
    axis = next((d for d, size in enumerate(view.shape) if size > 1), None)
    if axis is None or view.nbytes <= most:
        yield view
        return
    rows = max(most * view.shape[axis] // view.nbytes, 1)
    for start in range(0, view.shape[axis], rows):
        yield from _bands(slice_axis(view, axis, start, min(start + rows, view.shape[axis])), most)


def same_bytes(a: memoryview, b: memoryview) -> bool:
    """Whether both have the same bytes: Python compares memoryviews item by item, a bytearray at memory speed."""
    return (a.obj if isinstance(a.obj, bytearray) and len(a.obj) == len(a) else bytearray(a)) == b


def same_elements(a: View, b: View, progress: Callable[[int], object] = lambda size: None) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; `progress` receives the number of bytes compared."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with Gatherer() as one, Gatherer() as two:
        for x, y in zip(one.pieces(a), two.pieces(b), strict=True):
            if not same_bytes(x, y):
                return False
            progress(len(x))
    return True


def _put(box: np.ndarray, values: np.ndarray) -> None:
    """Copy; when the innermost axes differ, in tiles that fit a core's cache, which is 8 times as fast."""
    inner = min(range(box.ndim), key=lambda d: (box.strides[d] if box.shape[d] > 1 else 1 << 62, -d), default=0)
    if box.ndim < 2 or inner == box.ndim - 1 or box.size <= math.prod(_TILE):
        box[...] = values
        return
    out, given = box.swapaxes(inner, -2), values.swapaxes(inner, -2)
    rows, columns = _TILE
    for k in range(0, out.shape[-2], rows):
        for j in range(0, out.shape[-1], columns):
            out[..., k : k + rows, j : j + columns] = given[..., k : k + rows, j : j + columns]


def _where(block: Block) -> str:
    assert block.source is not None
    path = block.source.path
    return str(path if not block.file or block.file == path.name else path / block.file)


def _constant(dtype: str, value: float) -> bytes:
    """The bytes of one element with this value."""
    if not value:
        return bytes(ITEM_SIZES[dtype])
    if dtype in FLOATS:
        codes = {"float64": "<d", "float32": "<f", "float16": "<e", "bfloat16": "<f"}
        data = struct.pack(codes[dtype], value)
        return data[2:] if dtype == "bfloat16" else data  # short binary fractions, which rounding does not change
    return int(value).to_bytes(ITEM_SIZES[dtype], "little", signed=value < 0)


def cast(piece: memoryview, dtype: str, target: str) -> memoryview:
    """Cast elements from one dtype to another, rounding to nearest, ties to even.

    Raises: CheckpointError when a finite number becomes infinite.
    """
    import numpy as np

    numbers = decode(piece, dtype)
    if target == "bfloat16":
        with np.errstate(over="ignore"):
            bits = numbers.astype(np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        made = np.where(is_nan, ((bits >> 16) | 0x40).astype(np.uint16), rounded)  # a NaN stays one
        infinite = (made & 0x7FFF) == 0x7F80
    else:
        with np.errstate(over="ignore"):
            made = numbers.astype({"float64": "<f8", "float32": "<f4", "float16": "<f2"}[target])
        infinite = np.isinf(made)
    if infinite.any() and not np.isinf(numbers[infinite]).all():
        largest = float(np.abs(numbers[np.isfinite(numbers)]).max())
        raise CheckpointError(f"holds {largest:.6g}, which is beyond {target}. Keep the dtype, or use bf16.")
    return np.ascontiguousarray(made).data.cast("B")
