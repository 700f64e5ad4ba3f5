"""Decide which records in a file's content are plain data, and list their attributes; no name is ever looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..spec import ITEM_SIZES, TensorSpec
from .inert import LEAVES, Call, Global, as_text, children, flat

_MOST = 20

_PLAIN = (LEAVES - {Global}) | {TensorSpec}
"""Types of values that hold no call and no name."""

_INSTANCES = ("copyreg._reconstructor", "copyreg.__newobj__", "copy_reg._reconstructor")
"""How protocols 0 and 1 write an instance: (class, object, None)."""


def _names(modules: str, names: str) -> set[str]:
    return {f"{module}.{name}" for module in modules.split() for name in names.split()}


DATA = frozenset(
    {"argparse.Namespace", "types.SimpleNamespace", "uuid.UUID"}
    | {"pickle.key"}  # what the reader of pickles itself makes of an unusual key
    | {"torch.device", "torch.Size", "torch.serialization._get_layout", *(f"torch.{dtype}" for dtype in ITEM_SIZES)}
    | _names("pathlib pathlib._local", "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath")
    | _names("io _io", "BytesIO StringIO")
    | _names("collections", "OrderedDict defaultdict deque Counter")
    | _names("datetime", "date datetime time timedelta timezone")
    | _names("builtins __builtin__", "bool bytearray bytes complex dict float frozenset int list object range set")
    | _names("builtins __builtin__", "slice str tuple long unicode xrange")
    | _names("numpy", "dtype ndarray")
    | _names("numpy", "bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 intc uintc longlong ulonglong")
    | _names("numpy", "float16 float32 float64 longdouble complex64 complex128 clongdouble str_ bytes_ datetime64")
    | _names("numpy.core.multiarray numpy._core.multiarray", "_reconstruct scalar")
    | _names("numpy.core.numeric numpy._core.numeric", "_frombuffer")
    | set(_INSTANCES)
)
"""Classes whose instances are values, and functions that build one."""


def foreign_calls(content: Any, also: Callable[[str], bool] = lambda path: False) -> list[str]:
    """List the calls and names in a content that are not known to be plain data, as text.

    At most 20 are listed, with a last entry that counts the others. Known are the classes of `DATA`, and every class
    whose name ends in Config, made without arguments: in any module, its record is only a set of attributes. Quantized
    and other unusual tensors are foreign: they stay calls because no tensor spec can describe them. An empty list means
    that the content may be loaded. `also` tells of further classes, by their full name, that they are data.
    """
    found: dict[str, None] = {}
    seen: set[int] = set()
    pending = [content]
    more = 0
    while pending:
        value = pending.pop()
        held = children(value)
        if held is None:
            if isinstance(value, Global) and not (_is_data(value) or also(value.path)):
                if len(found) < _MOST:
                    found[as_text(value)] = None
                else:
                    more += value.path not in found
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Call):
            # the name that is called is judged with its call; those it is given are, when it is foreign
            known = _makes_data(value) or (isinstance(value.callable, Global) and also(value.callable.path))
            if not known and len(found) < _MOST:
                found[as_text(value)] = None
            elif not known:
                more += 1
            called = [] if isinstance(value.callable, Global) else [value.callable]
            args = value.args if known else [a for a in value.args if not isinstance(a, Global)]
            held = [*called, *args, value.state, value.items]
        pending.extend([inner for inner in reversed(held) if type(inner) not in _PLAIN and not flat(inner, _PLAIN)])
    return [*found, *([f"{more} more calls and names"] if more else [])]


def attributes(value: Any) -> dict[str, Any] | None:
    """The attributes, by name, of an object's inert record; a dict is returned unchanged; None when there are no names.

    A class that keeps its attributes in slots has them in the second part of its state. A frozen dataclass with slots
    writes values without names, and one that relied on the defaults of its class writes nothing at all.
    """
    if isinstance(value, dict):
        return value
    if not isinstance(value, Call):
        return None
    state = value.state
    if type(state) is dict:
        return state if {*map(type, state)} <= {str} else None
    if state is None and len(value.args) == 1:
        state = value.args[0]  # made with keywords alone
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    dicts = [part for part in parts if isinstance(part, dict)]
    named = {name: item for part in dicts for name, item in part.items()}
    if not dicts or len(dicts) != sum(part is not None for part in parts):
        return None
    return named if all(isinstance(name, str) for name in named) else None


def _makes_data(call: Call) -> bool:
    """Whether a call is known to build a value, provided that its arguments are values."""
    if not isinstance(call.callable, Global):
        return False
    if call.callable.path in _INSTANCES:
        return bool(call.args) and isinstance(call.args[0], Global) and _is_data(call.args[0])
    return _is_data(call.callable) and not (_is_config(call.callable) and call.args)


def _is_data(name: Global) -> bool:
    return name.path in DATA or _is_config(name)


def _is_config(name: Global) -> bool:
    return name.path.endswith("Config")
