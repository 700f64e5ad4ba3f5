"""Saved means loadable: a step that `load` could not give back is refused before a byte of it is written.

The pickle of each file is read as a load reads it. It may name only what the project's own reader and
`torch.load(weights_only=True)` both give back; when it names anything else, each value is tried alone to find the one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..console.words import listed_names
from ..containers.pickles.inert import DEPTH, Call, Global, as_name, as_text, children
from ..containers.spec import DTYPES, ITEM_SIZES
from ..containers.torch_files.storages import TensorLoader, name_tensors
from ..errors import CheckpointError, InputError
from ..networks.state_dict import unusual
from .torch_file import records_of

_RECORDS = {"__builtin__.complex", "torch.device", "torch.serialization._get_layout"}
"""Calls that our reader shows as records, and a load makes."""

_NAMES = (
    _RECORDS
    | {f"torch.{dtype}" for dtype in ITEM_SIZES}
    | {f"torch.{word}Storage" for _, _, word, _ in DTYPES.values() if word}
    | {f"torch._utils.{name}" for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")}
    | {"torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_parameter_with_state"}
    | {"torch.storage.UntypedStorage", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.Size"}
    | {"collections.OrderedDict", "_codecs.encode", "__builtin__.set", "__builtin__.bytearray"}
)
"""Classes and functions that a pickle may name; those of Python by their names in protocol 2."""

_LONGEST_INT = 8 * 255 - 1
"""Bits of a whole number in the opcode that torch reads."""

_SHALLOW = 20
"""Levels of a content that is not read back: far fewer than a load takes, also where they hold each other."""

_SMALL = 1 << 60
"""Whole numbers below this are short for every reader."""

_SHORT_NAME = 100
"""Characters of a tensor's path."""

_ALWAYS = {type(None), bool, float, str}
"""Types of which every value comes back."""


def refuse_unloadable(file: str, content: Any, data_pkl: bytes) -> None:
    """Read the pickle of a file that is to be written, and refuse what a load would not give back.

    Raises: InputError naming the file and the path in it.
    """
    if fault := _fault(data_pkl, file):
        raise unloadable(file, content, fault)


def is_plain(content: Any) -> bool:
    """Whether a content is a tree of dicts, lists, tuples, tensors and simple values, as almost every one is.

    All of these come back: to read the pickle as well would take ten times as long.
    """
    level, names, tensors = [("", content)], set[str](), 0
    for _ in range(_SHALLOW):
        inner: list[tuple[str, Any]] = []
        for path, value in level:
            kind = type(value)
            if kind is dict:
                if not all(type(key) is str or _is_small(key) for key in value):
                    return False
                inner.extend((f"{path}.{key}", item) for key, item in value.items())
            elif kind is list or kind is tuple:
                inner.extend((f"{path}.{i}", item) for i, item in enumerate(value))
            elif kind is torch.Tensor or kind is torch.nn.Parameter:
                if vars(value) or unusual(value) or len(path) > _SHORT_NAME:
                    return False
                names.add(path)
                tensors += 1
            elif kind not in _ALWAYS and not _is_small(value):
                return False
        level = inner
    return not level and len(names) == tensors


def _is_small(value: Any) -> bool:
    return type(value) is int and -_SMALL < value < _SMALL


def unloadable(file: str, content: Any, why: str) -> InputError:
    """Make the error for a content that does not come back: it names the first value that does not, else `why`."""
    found = _first_fault(content, "", 0)
    return InputError(
        f"{f'{file}: {found}' if found else why.removesuffix('.')}, which `load` could not give back. Expected are "
        "tensors, numbers, texts and bytes, in dicts, lists, tuples and sets: leave it out, or save what it is made of."
    )


def _first_fault(value: Any, path: str, depth: int) -> str | None:
    """Say what the first value is that does not come back, and its path."""
    if not isinstance(value, (Mapping, list, tuple)):
        return None if _comes_back(value) else f"{as_name(path) or 'its content'} is {_described(value)}"
    if depth >= DEPTH:
        return f"{as_name(path)} is nested deeper than {DEPTH} levels, or contains itself"
    before = f"{path}." if path else ""
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        here = before + (key if isinstance(key, str) else as_text(key))
        if isinstance(value, Mapping) and not _comes_back({key: None}):
            return f"{as_name(path) or 'its content'} has the key {as_text(key, 60)} of type {_type_name(key)}"
        if fault := _first_fault(item, here, depth + 1):
            return fault
    return None


def _comes_back(value: Any) -> bool:
    """Whether a value comes back by itself."""
    if type(value) in _ALWAYS:
        return True
    try:
        return _fault(records_of(value)[0][1], "") is None
    except Exception:  # the method of any class may have been called
        return False


def _fault(data_pkl: Any, where: str) -> str | None:
    """Say why a load would not give back what a pickle holds; None where it does."""
    loader = TensorLoader(where)
    try:
        content = loader.read(data_pkl).value
        name_tensors(content, where)
    except CheckpointError as error:
        return str(error)
    if strange := loader.names - _NAMES:
        return f"{where}: its pickle names {listed_names(sorted(strange), 3, show=as_name)}"
    pending, seen = [content], set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, (Call, Global)) and getattr(getattr(value, "callable", None), "path", "") not in _RECORDS:
            return f"{where}: it holds {as_text(value, 80)}"
        if type(value) is int and value.bit_length() > _LONGEST_INT:
            return f"{where}: it holds a whole number of {value.bit_length()} bits"
        held = () if isinstance(value, Call) else children(value)
        if held and id(value) not in seen:
            seen.add(id(value))
            pending.extend(held)
    return None


def _described(value: Any) -> str:
    """Say what a value is that does not come back."""
    if isinstance(value, torch.Tensor):
        return unusual(value) or f"a tensor with attributes ({listed_names(sorted(vars(value)), 3, show=as_name)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"a {'class' if isinstance(value, type) else 'function'} ({value.__module__}.{value.__qualname__})"
    if type(value) is int:
        return f"a whole number of {value.bit_length()} bits, of which {_LONGEST_INT} can be read"
    if type(value) is bytes:
        return "empty bytes"
    return "a set with such values" if type(value) is set else f"of type {_type_name(value)}"


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
