"""Decide which records in a file's content are plain data, and list their attributes; no name is ever looked up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from ..spec import ITEM_SIZES, TensorSpec
from .inert import LEAVES, Call, Cycle, Global, New, as_text, children

_MOST = 20

_PLAIN = (LEAVES - {Global, Cycle}) | {TensorSpec}
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


_RECORDS = frozenset(
    _names("decimal", "Decimal")
    | _names("fractions", "Fraction")
    | _names("functools", "partial")
    | _names("builtins __builtin__", "abs all any len max min object pow print round sorted sum")
    | _names("builtins", "Ellipsis NotImplemented")
)
"""Names of Python's own library that stand for values in the configs of programs, and act on nothing."""

_VALUES = ("math", "typing")
"""Its modules whose names all do."""

_PYTHON = sys.stdlib_module_names | {"__builtin__", "commands", "copy_reg"}

_ACTING = {"builtins", "ctypes", "importlib", "marshal", "nt", "os", "pickle", "posix", "pty", "runpy", "shutil"}
_ACTING |= {"socket", "subprocess", "sys"}
"""Modules that no class of a program is in, though a name may lead through another module into one of them."""

_GETATTR = (Global("builtins", "getattr"), Global("__builtin__", "getattr"))

_METHODS = ("__setstate__", "add", "append", "extend")
"""Attributes of an object that unpickling would call."""

BUILDERS = ("torch._utils._rebuild_", "torch._tensor._rebuild_")
"""How the names of the functions begin that make tensors of the kinds which are not read."""


class Finding(str):
    """A call or name beyond plain data, as text.

    It is a record when nothing but a value of a program's own class, or a function by its name, can be meant: the rest
    of the file is used without it. Anything else may be there to act on whoever unpickles the file.
    """

    is_record = False


def is_module(value: Any) -> TypeGuard[Call]:
    """Whether a value is the record of a module of torch: an object with parameters and modules."""
    state = value.state if isinstance(value, Call) else None
    return type(state) is dict and all(isinstance(state.get(part), dict) for part in ("_parameters", "_modules"))


def foreign_calls(
    content: Any, also: Callable[[str], bool] = lambda path: False, dropped: Sequence[Any] = ()
) -> list[str]:
    """List the calls and names in a content that are not known to be plain data, each as a `Finding`.

    At most 20 are listed, with a last entry that counts the others. Known are the classes of `DATA`, and every class
    whose name ends in Config, made without arguments: in any module, its record is only a set of attributes. Quantized
    and other unusual tensors are foreign: they stay calls because no tensor spec can describe them. An empty list means
    that the content may be loaded. `also` tells of further classes, by their full name, that they are data. What was
    `dropped` is in no content: it was made for its effect, and none of it is a record.
    """
    found: dict[str, bool] = {}  # whether it is a record
    more: list[bool] = []

    def add(value: Any, is_record: bool) -> None:
        text = f"{as_text(value.callable)}(...)" if is_module(value) else as_text(value)
        if len(found) < _MOST or (text in found and isinstance(value, Global)):
            found[text] = found.get(text, True) and is_record
        else:
            more.append(is_record)

    seen: set[int] = set()
    behind = list(dropped)
    pending, is_held = [behind, content], True
    while pending:
        value = pending.pop()
        is_held = is_held and value is not behind
        held = children(value)
        if held is None:
            if isinstance(value, Global) and is_foreign(value) and not also(value.path):
                add(value, is_held and _is_record(value))
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Call):
            for method in _methods(value.state):
                add(method, False)
            # the name that is called is judged with its call; those it is given are, when it is foreign
            known = not is_foreign(value) or also(_called(value))
            if not known:
                add(value, is_held and _is_record(value))
            called = [] if known or isinstance(value.callable, Global) else [value.callable]
            args = value.args if known else [a for a in value.args if not isinstance(a, Global)]
            held = [*called, *args, value.state, value.items]
        pending.extend([inner for inner in reversed(held) if type(inner) not in _PLAIN])
    findings = [*map(Finding, found), *([Finding(f"{len(more)} more calls and names")] if more else [])]
    for finding, is_record in zip(findings, [*found.values(), all(more)], strict=False):
        finding.is_record = is_record
    return list(findings)


def _methods(state: Any) -> list[Global | Call]:
    """The foreign values in an object's state that are called when it gets items, or another state."""
    parts = state if isinstance(state, tuple) else (state,)
    values = [part.get(name) for part in parts if isinstance(part, dict) for name in _METHODS]
    return [value for value in values if isinstance(value, (Global, Call)) and is_foreign(value)]


def _called(call: Call) -> str:
    """The full name of the class that is called, which protocol 2 writes as getattr(class, name) where it is nested."""
    held, name = call.callable, ""
    if isinstance(held, Call) and held.callable in _GETATTR and len(held.args) == 2 and isinstance(held.args[1], str):
        held, name = held.args[0], f".{held.args[1]}"
    return held.path + name if isinstance(held, Global) else ""


def is_foreign(value: Global | Call) -> bool:
    """Whether a name or call is not known to be plain data."""
    return not (_makes_data(value) if isinstance(value, Call) else _is_data(value))


def _is_record(value: Global | Call) -> bool:
    """Whether nothing but a value, or a function by its name, can be meant by a foreign name or call."""
    if isinstance(value, Global):
        return isinstance(value, Cycle) or _is_of_program(value.path)
    path, args = _called(value), value.args
    if not path or (isinstance(value.callable, Call) and not _is_record(value.callable)):
        return False
    named = [arg for arg in args if isinstance(arg, Global)]
    if not all(_is_data(name) or _is_record(name) for name in named):
        return False
    if path in _INSTANCES or path in _RECORDS or path.startswith(BUILDERS):
        return True
    if value.callable in _GETATTR:  # a member of an enum, or a nested class
        return len(args) == 2 and len(named) == 1 and isinstance(args[1], str) and not args[1].startswith("_")
    if path in ("builtins.type", "__builtin__.type"):  # the class of None
        return args == (None,)
    if path == "operator.getitem":
        return len(args) == 2 and bool(named) and named[0].path.startswith("typing.")
    return _is_of_program(path) and (isinstance(value, New) or path.rpartition(".")[2].lstrip("_")[:1].isupper())


def _is_of_program(path: str) -> bool:
    """Whether a name is none of Python's own library, apart from its values."""
    modules = path.split(".")[:-1]
    if modules[:1] and modules[0] in _PYTHON and modules[0] != "__main__":
        return path in _RECORDS or modules[0] in _VALUES
    return _ACTING.isdisjoint(modules)


def attributes(value: Any) -> dict[str, Any] | None:
    """The attributes, by name, of an object's inert record; a dict is returned unchanged; None when there are no names.

    A class that keeps its attributes in slots has them in the second part of its state. A frozen dataclass with slots
    writes values without names, and one that relied on the defaults of its class writes nothing at all. A dictionary of
    a class of its own (EasyDict, CfgNode, AttributeDict) has its entries, and a config of OmegaConf or ml_collections
    what it holds.
    """
    if isinstance(value, dict):
        return value
    if not isinstance(value, Call):
        return None
    state = value.state
    if value.items and all(isinstance(one, tuple) and len(one) == 2 and type(one[0]) is str for one in value.items):
        return dict(value.items)
    if type(state) is dict and isinstance(fields := state.get("_content", state.get("_fields")), dict):
        state = {name: _content(item) for name, item in fields.items()}
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


def _content(node: Any) -> Any:
    """The value in a node of OmegaConf, or in a reference of ml_collections."""
    state = node.state if isinstance(node, Call) else None
    held = state if type(state) is dict else {}
    return held.get("_val", held.get("_value", node))


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
