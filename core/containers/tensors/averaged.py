"""AveragedTensors: the mean of tensors of several containers, computed piece by piece whenever it is read."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO

from ..container import Container
from ..spec import ITEM_SIZES, TensorSpec, dense_strides
from .dtypes import decode
from .reading import PIECE, ROOM, Gatherer, cast
from .views import View, slice_axis, squeeze, stored

if TYPE_CHECKING:
    import numpy as np


class _Named(io.BytesIO):
    """Stands for the file of one tensor, which has no bytes anywhere."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.key = name


class AveragedTensors(Container):
    """Means over containers, each a tensor in a file of its own that is computed at each read.

    Sums are of float64, and each mean is rounded to the dtype of the sources; an element whose bits are the same in all
    of them keeps these bits. Memory is that of a piece of each source.
    """

    def __init__(self, first: Container, held: ExitStack) -> None:
        super().__init__("average", first.path, {}, first.content, {}, notes=list(first.notes))
        self.parts: dict[str, list[View]] = {}
        self._files_of: dict[tuple[object, ...], str] = {}
        self._readers = threading.local()
        self._held = held

    def put(self, name: str, views: Sequence[View]) -> View:
        """Add the mean of views of one dtype and shape, and return a view of it; tied tensors have one mean."""
        dtype, shape, size = views[0].dtype, views[0].shape, views[0].nbytes
        file = self._files_of.setdefault(tuple(view.place for view in views), name)
        self.parts[file] = list(views)
        self.files[file] = size
        self.tensors[name] = TensorSpec(name, dtype, shape, dense_strides(shape), 0, size, file, file)
        return stored(self, self.tensors[name])

    def open(self, name: str) -> BinaryIO:
        """Open what `read_into` computes for a tensor."""
        return _Named(name)

    def read_into(self, file: BinaryIO, buffer: memoryview, position: int) -> int:
        """Compute bytes of a tensor from `position` on; returns how many."""
        assert isinstance(file, _Named)
        views = self.parts[file.key]
        item = ITEM_SIZES[views[0].dtype]
        first, last = position // item, -(-(position + len(buffer)) // item)
        step = PIECE // item
        done, skip = 0, position - first * item
        for start in range(first, last, step):
            made = self._mean(views, start, min(start + step, last))[skip:]
            part = made[: len(buffer) - done]
            buffer[done : done + len(part)] = part
            done, skip = done + len(part), 0
        return done

    @property
    def scatters(self) -> bool:
        """No: what is computed goes into one place."""
        return False

    def _mean(self, views: Sequence[View], start: int, stop: int) -> bytes:
        """The mean of the elements from `start` to `stop`, in row-major order."""
        import numpy as np

        dtype = views[0].dtype
        total: np.ndarray = np.zeros(stop - start)
        first, same = b"", np.ones(stop - start, bool)
        bits = np.dtype(f"u{ITEM_SIZES[dtype]}")
        with np.errstate(all="ignore"):  # infinities of both signs have no mean
            for view in views:
                data = b"".join(p.tobytes() for part in span(view, start, stop) for p in self._gatherer.pieces(part))
                first = first or data
                same &= np.frombuffer(data, bits) == np.frombuffer(first, bits)
                total += decode(data, dtype)
            made = np.frombuffer(cast((total / len(views)).data.cast("B"), "float64", dtype), bits)
        return np.where(same, np.frombuffer(first, bits), made).tobytes()

    @property
    def _gatherer(self) -> Gatherer:
        """The reader of this thread; its files are closed with the conversion."""
        if not hasattr(self._readers, "own"):
            self._readers.own = self._held.enter_context(Gatherer(1, ROOM))
        found: Gatherer = self._readers.own
        return found


def span(view: View, start: int, stop: int) -> Iterator[View]:
    """Cut out the elements from `start` to `stop`, in row-major order, as views that follow one another."""
    if start == 0 and stop == view.numel:
        yield view
        return
    inner = view.numel // view.shape[0]
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        yield from span(squeeze(slice_axis(view, 0, first, first + 1), 0), start - first * inner, stop - first * inner)
        return
    whole, end = -(-start // inner), stop // inner
    if start % inner:
        yield from span(view, start, whole * inner)
    if whole < end:
        yield slice_axis(view, 0, whole, end)
    if stop % inner:
        yield from span(view, end * inner, stop)
