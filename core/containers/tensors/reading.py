"""Gather: the elements of a view as bytes, in pieces, in memory of at most one tensor; and casts of such pieces.

Bytes that lie in order already are read and handed on, without numpy; others are put in place, tensor by tensor.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from ...errors import CheckpointDamaged, CheckpointError
from .. import checksum
from ..spec import ITEM_SIZES
from ..threads import MOST, Job, Workers
from .dtypes import decode
from .views import Block, View, is_in_order

if TYPE_CHECKING:
    import numpy as np

PIECE = 512 * 1024
"""Bytes at a time: what stays in a core's cache between being read, summed, compared and written."""

SLAB = 2 << 20
"""Bytes read at a time of a tensor whose elements have to be put in place; they too stay in a core's cache."""

SMALL, _MOST_SPARSE = 16384, 4
"""Elements that are read for nothing rather than skipped, and how many there may be for each that is wanted."""

_LARGE = 2 << 20  # bytes of a tensor that threads are worth starting for
_MOST_OPEN = 64  # files; a folder may have thousands

_TILE = 64, 2048  # elements that follow one another where they are put, and where they lie

FLOATS = ("float64", "float32", "float16", "bfloat16")
"""Dtypes that a cast makes one another of."""


class Gatherer:
    """Reads views of any containers, holding their files open; large tensors are put in place by so many threads."""

    def __init__(self, threads: int = MOST) -> None:
        self._threads = threads
        self._held = ExitStack()
        self._files: dict[tuple[int, str], BinaryIO] = {}
        self._piece = bytearray()
        self._tensor: mmap.mmap | bytes = b""
        self._idle: list[bytearray] = []  # memory of slabs

    def __enter__(self) -> Gatherer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def pieces(self, view: View, size: int = PIECE) -> Iterator[memoryview]:
        """Give the elements in row-major order, `size` bytes at a time, in memory that the next piece overwrites.

        Raises: CheckpointDamaged when a file cannot be read or ends too early.
        """
        if not is_in_order(view):
            whole = self._placed(view)
            for start in range(0, len(whole), size):
                yield whole[start : start + size]
            return
        if len(self._piece) != size:
            self._piece = bytearray(size)
        room = memoryview(self._piece)
        filled = 0
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

    def read_on(self, block: Block, offset: int, left: int, into: memoryview) -> None:
        """Read the next bytes of a block that lies in order, of which so many are left; for those who watch them."""
        self._read(block, offset, into)

    def _read(self, block: Block, offset: int, into: memoryview) -> None:
        file = self._file(block)
        where, done = _where(block), 0
        try:
            while done < len(into):
                count = checksum.read_into(file.fileno(), into[done:], offset + done)
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
        """All elements of a tensor, put where they belong, by several threads where it is large."""
        import numpy as np

        item = ITEM_SIZES[view.dtype]
        kind: np.dtype = np.dtype(f"u{item}" if item <= 8 else "V16")
        if len(self._tensor) < view.nbytes:  # else used again: memory that is asked for anew has to be cleared first
            self._tensor = b""
            self._tensor = mmap.mmap(-1, view.nbytes)  # which is given back at once when it is let go of
        dense = memoryview(self._tensor)[: view.nbytes]
        fills = self._fills(view, np.frombuffer(dense, kind).reshape(view.shape))
        if self._threads == 1 or view.nbytes < _LARGE or not self._can_share(view):
            for fill in fills:
                fill()
        else:
            with Workers(fills, self._threads) as workers:
                workers.wait()
        return dense

    def _can_share(self, view: View) -> bool:
        """Open the files of a view together, so that several threads may read them; False where that cannot be."""
        files = {(id(block.source), block.file): block for block in view.blocks if block.source is not None}
        if not checksum.POSITIONED_READS or len(files) > _MOST_OPEN:
            return False
        if len(self._files) + len(files) > _MOST_OPEN:
            self._close()
        for block in files.values():
            self._file(block)
        return True

    def _fills(self, view: View, out: np.ndarray) -> Iterator[Job]:
        """Give the jobs that put all elements of a tensor in place."""
        import numpy as np

        for block in view.blocks:
            box = out[tuple(slice(b, b + n) for b, n in zip(block.begin, block.shape, strict=True))]
            if block.source is None:
                box[...] = np.frombuffer(_constant(view.dtype, block.value), out.dtype)[0]
            else:
                order = sorted(range(box.ndim), key=lambda d: -block.strides[d])
                strides = tuple(block.strides[d] for d in order)
                yield from self._slabs(block, box.transpose(order), strides, block.offset)

    def _slabs(self, block: Block, box: np.ndarray, strides: tuple[int, ...], offset: int) -> Iterator[Job]:
        """Give the jobs that fill a box whose axes are sorted by their strides in the file: a slab of the file each."""
        item, extent = box.itemsize, _extent(box.shape, strides)
        if box.ndim == 0 or (extent * item <= SLAB and extent <= _MOST_SPARSE * box.size + SMALL):
            yield partial(self._fill, block, box, strides, offset)
            return
        inner = _extent(box.shape[1:], strides[1:])
        rows = (SLAB // item - inner) // max(strides[0], 1) + 1
        if rows >= box.shape[0] or rows < 2 or strides[0] > _MOST_SPARSE * inner + SMALL:
            rows = 0  # what lies between would be read for nothing
        for k in range(0, box.shape[0], rows or 1):
            part, at = (box[k : k + rows], strides) if rows else (box[k], strides[1:])
            yield from self._slabs(block, part, at, offset + k * strides[0] * item)

    def _fill(self, block: Block, box: np.ndarray, strides: tuple[int, ...], offset: int) -> None:
        """Fill a box from a slab of the file."""
        import numpy as np

        try:
            slab = self._idle.pop()
        except IndexError:  # the first of a thread
            slab = bytearray(SLAB)
        data = memoryview(slab)[: _extent(box.shape, strides) * box.itemsize]
        self._read(block, offset, data)
        flat = np.frombuffer(data, box.dtype)
        steps = tuple(stride * box.itemsize for stride in strides)
        _put(box, np.lib.stride_tricks.as_strided(flat, box.shape, steps, writeable=False))
        self._idle.append(slab)


def same_bytes(a: memoryview, b: memoryview) -> bool:
    """Whether both have the same bytes: Python compares two views one by one, a bytearray at the speed of memory."""
    if isinstance(a.obj, bytearray) and len(a.obj) == len(a):
        return a.obj == b
    return a == b.obj if isinstance(b.obj, bytearray) and len(b.obj) == len(b) else a.tobytes() == b


def same_elements(a: View, b: View, progress: Callable[[int], object] = lambda size: None) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes; `progress` is told those compared."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with Gatherer() as one, Gatherer() as two:
        for x, y in zip(one.pieces(a), two.pieces(b), strict=True):
            if not same_bytes(x, y):
                return False
            progress(len(x))
    return True


def _put(box: np.ndarray, values: np.ndarray) -> None:
    """Copy, by tiles that fit a core's cache where the two have another axis as their innermost: 8 times as fast."""
    inner = min(range(box.ndim), key=lambda d: (box.strides[d] if box.shape[d] > 1 else 1 << 62, -d), default=0)
    if box.ndim < 2 or inner == box.ndim - 1 or box.size <= math.prod(_TILE):
        box[...] = values
        return
    out, given = box.swapaxes(inner, -2), values.swapaxes(inner, -2)
    rows, columns = _TILE
    for k in range(0, out.shape[-2], rows):
        for j in range(0, out.shape[-1], columns):
            out[..., k : k + rows, j : j + columns] = given[..., k : k + rows, j : j + columns]


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _where(block: Block) -> str:
    assert block.source is not None
    path = block.source.path
    return str(path if not block.file or block.file == path.name else path / block.file)


def _constant(dtype: str, value: float) -> bytes:
    """One element of a value."""
    if not value:
        return bytes(ITEM_SIZES[dtype])
    if dtype in FLOATS:
        codes = {"float64": "<d", "float32": "<f", "float16": "<e", "bfloat16": "<f"}
        data = struct.pack(codes[dtype], value)
        return data[2:] if dtype == "bfloat16" else data  # short binary fractions, which rounding does not change
    return int(value).to_bytes(ITEM_SIZES[dtype], "little", signed=value < 0)


def cast(piece: memoryview, dtype: str, target: str) -> memoryview:
    """Make elements of one dtype those of another, rounding to the nearest, ties to even.

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
