"""Tensors that a pickle holds as NumPy arrays, in place of a storage: so torch saves those of XLA, HPU and old MPS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

from ..blocks import naturals
from ..pickles.inert import Call, DtypeName, Global
from ..spec import DTYPES, MOST_DIMENSIONS, dense_strides

BUILDERS = tuple(f"torch._utils.{name}" for name in ("_rebuild_device_tensor_from_numpy", "_rebuild_xla_tensor"))
"""What torch calls with (array, dtype, device, requires_grad); the second before version 1.9."""

_DTYPES = {code.removeprefix("<"): dtype for dtype, (_, code, _, _) in DTYPES.items() if code} | {
    "b1": "bool",
    "u1": "uint8",
}
"""Torch's dtypes by NumPy's codes."""


@dataclass(frozen=True, slots=True)
class Array:
    """A NumPy array of a pickle, and the dtype of the tensor that torch makes of it."""

    data: bytes
    stored: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    def write(self, file: BinaryIO) -> None:
        """Write its elements, of the dtype of the tensor, in the order of the array."""
        from ..tensors.reading import cast  # few are cast

        file.write(self.data if self.stored == self.dtype else cast(memoryview(self.data), self.stored, self.dtype))


def array_of(record: Any, dtype: Any) -> Array | None:
    """Read the record of an array; None where it is none of plain numbers, or the dtype is another.

    NumPy has no bfloat16: such tensors are arrays of float32.
    """
    if not isinstance(record, Call) or not isinstance(record.callable, Global) or not isinstance(dtype, DtypeName):
        return None
    name, args, state = record.callable.path.rpartition(".")[2], record.args, record.state
    if name == "_reconstruct" and isinstance(state, tuple) and len(state) == 5:  # version, shape, dtype, order, bytes
        _, shape, kind, is_fortran, data = state
    elif name == "_frombuffer" and state is None and len(args) == 4:
        data, kind, shape, order = args
        is_fortran = order == "F"
    else:
        return None
    found, target = _DTYPES.get(_code(kind), ""), dtype.removeprefix("torch.")
    if not found or not naturals(shape) or len(shape) > MOST_DIMENSIONS or not isinstance(data, bytes):
        return None
    strides = dense_strides(shape[::-1])[::-1] if is_fortran else dense_strides(shape)
    size = DTYPES[found][0]
    for side in shape:
        size *= side
    is_known = target in (found, "bfloat16") if found == "float32" else target == found
    return Array(data, found, target, shape, strides) if is_known and len(data) == size else None


def _code(kind: Any) -> str:
    """NumPy's code of a dtype, as "f4"; "" for one of big-endian or structured numbers."""
    state = getattr(kind, "state", None)
    is_dtype = isinstance(kind, Call) and kind.callable == Global("numpy", "dtype") and bool(kind.args)
    little = isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|")
    return str(kind.args[0]) if is_dtype and little else ""
