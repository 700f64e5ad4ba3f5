"""Build the results of harmless callables in pickles of plain values, so that they need not stay inert records."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from .collisions import fill
from .inert import ByteArray, Call, Global, Size, as_key

Reductions = Mapping[str, Callable[..., Any]]
"""Harmless callables by their full name, each with what to build from its arguments instead of a `Call`."""

_NUMPY_SCALARS = {"f8": "d", "f4": "f", "f2": "e", "b1": "?"} | {
    f"{kind}{size}": code
    for kind, codes in (("i", "bhiq"), ("u", "BHIQ"))
    for size, code in zip("1248", codes, strict=True)
}


def as_dict(pairs: Any = ()) -> Any:
    """OrderedDict(), OrderedDict([(key, value), ...])."""
    if isinstance(pairs, dict):
        return dict(pairs)
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        return NotImplemented
    made: dict[Any, Any] = {}
    fill(made, [as_key(key) for key, _ in pairs], [value for _, value in pairs])
    return made


def as_size(sizes: Any = ()) -> Any:
    """torch.Size((2, 3)); not a callable of PLAIN, because only files of torch have it."""
    return Size(sizes) if isinstance(sizes, (tuple, list)) else NotImplemented


def _default_dict(factory: Any = None, pairs: Any = ()) -> Any:
    """Build it without its factory if that makes empty values; a record with any other factory stays visible."""
    harmless = factory is None or (isinstance(factory, Global) and factory.path in _FACTORIES)
    return as_dict(pairs) if harmless else NotImplemented


def _set(values: Any = ()) -> Any:
    if not isinstance(values, (list, tuple)):
        return NotImplemented
    made: set[Any] = set()
    fill(made, list(map(as_key, values)))
    return made


def _frozenset(values: Any = ()) -> Any:
    found = _set(values)
    return found if found is NotImplemented else frozenset(found)


def _encoded(text: Any = "", encoding: Any = "") -> Any:
    """Bytes as written by protocols 0 to 2."""
    known = isinstance(text, str) and encoding in ("latin1", "latin-1")
    return text.encode("latin-1") if known else NotImplemented


def _bytes(value: Any = b"") -> Any:
    return value if isinstance(value, bytes) else NotImplemented


def _byte_array(value: Any = b"") -> Any:
    """bytearray(b"..."); any other call of it, as with a size, makes nothing and stays a record."""
    return ByteArray(value) if isinstance(value, bytes) else NotImplemented


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    """A NumPy scalar (a loss, a step): numpy.core.multiarray.scalar(numpy.dtype("f8"), 8 bytes)."""
    state = getattr(dtype, "state", None)
    if not (isinstance(dtype, Call) and dtype.args and isinstance(state, tuple) and len(state) > 1):
        return NotImplemented
    code = _NUMPY_SCALARS.get(dtype.args[0]) if isinstance(dtype.args[0], str) else None
    order = {"<": "<", "|": "<", ">": ">"}.get(state[1]) if isinstance(state[1], str) else None
    if code is None or order is None or not isinstance(data, bytes) or len(data) != struct.calcsize(order + code):
        return NotImplemented
    return struct.unpack(order + code, data)[0]


_FACTORIES = {f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "set", "str", "tuple")}
_FACTORIES |= {name.replace("builtins", "__builtin__") for name in _FACTORIES}  # as Python 2 called them

_BUILTINS: Reductions = {"set": _set, "frozenset": _frozenset, "bytes": _bytes, "bytearray": _byte_array}

PLAIN: Reductions = {
    **{f"{module}.{name}": build for module in ("builtins", "__builtin__") for name, build in _BUILTINS.items()},
    "collections.OrderedDict": as_dict,
    "collections.defaultdict": _default_dict,
    "_codecs.encode": _encoded,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
