"""ComputedTensors: small tensors whose values are computed while a conversion is planned, in a file without a name."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..container import Container
from ..spec import TensorSpec, dense_strides
from .dtypes import decode
from .reading import Gatherer
from .views import View, stored

if TYPE_CHECKING:
    import numpy as np

GAMMA = {"float16": "float32", "bfloat16": "float32"}
"""The dtype in which 1 + a number of this dtype is exact (to within 2**-24), when it is another one."""


class ComputedTensors(Container):
    """Tensors that no file of the source holds; `what` describes how they were made."""

    def __init__(self, what: str) -> None:
        super().__init__("computed", Path(what), {}, {}, {"computed": 0})
        with tempfile.TemporaryFile() as file:
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)  # with the last view of it

    def open(self, name: str) -> BinaryIO:
        """Open the only file."""
        return os.fdopen(os.dup(self._fd), "rb", buffering=0)

    def put(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> View:
        """Add a tensor, and return a view of it."""
        offset = self.files["computed"]
        os.pwrite(self._fd, data, offset)
        self.files["computed"] = offset + len(data)
        return stored(self, TensorSpec(name, dtype, shape, dense_strides(shape), offset, len(data), "computed"))


def _numbers(view: View) -> np.ndarray:
    """The elements of a small tensor."""
    with Gatherer() as gatherer:
        return decode(b"".join(piece.tobytes() for piece in gatherer.pieces(view)), view.dtype)


def mean(view: View) -> float:
    """Compute the mean of the elements of a small tensor."""
    numbers = _numbers(view)
    return float(numbers.mean(dtype="float64")) if numbers.size else 0.0


def plus_one(view: View, into: ComputedTensors, name: str) -> View:
    """Add 1 to every element, rounding once; a 16-bit tensor becomes float32."""
    dtype = GAMMA.get(view.dtype, view.dtype)
    made = (_numbers(view).astype("float64") + 1.0).astype({"float32": "<f4", "float64": "<f8"}[dtype])
    return into.put(name, dtype, view.shape, made.tobytes())
