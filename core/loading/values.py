"""From the inert values of a header to live ones: tensors, dtypes, devices and all that `save` takes.

Nothing is made by a call of the file's choosing: each kind of value is made here, of arguments that were checked, and
is no larger than its record. Any other record stays one.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..console.commands import typed
from ..containers.blocks import naturals
from ..containers.pickles.collisions import fill
from ..containers.pickles.inert import ByteArray, Call, DtypeName, Global, Malformed, Size
from ..containers.spec import TensorSpec
from ..errors import CheckpointDamaged

_DEVICE = re.compile(r"[a-z]{1,20}(:\d{1,3})?")


def live(value: Any, tensor: Callable[[TensorSpec], torch.Tensor], where: str) -> Any:
    """Make a header's content live, each spec by `tensor`; `where` is the path of the file.

    Raises: CheckpointDamaged for a dict or set whose keys were made to have one hash.
    """

    def made(value: Any) -> Any:
        if isinstance(value, TensorSpec):
            return tensor(value)
        if isinstance(value, dict):
            return _filled({}, value, where, list(map(made, value.values())))
        if isinstance(value, Size):
            return torch.Size(value) if naturals(tuple(value)) else tuple(value)
        if isinstance(value, (list, tuple)):
            items = list(map(made, value))
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, (set, frozenset)):
            return type(value)(_filled(set(), value, where))
        return _simple(value)

    return made(value)


def _filled(target: Any, values: Iterable[Any], where: str, items: Sequence[Any] = ()) -> Any:
    """An empty dict with keys and items, or an empty set with values, filled."""
    found = [_simple(value) for value in values]
    try:
        fill(target, found, items)
    except Malformed as fault:
        raise CheckpointDamaged(f"{where}: {fault}. {typed('inspect_model.py')} shows the file.") from None
    return target


def _simple(value: Any) -> Any:
    """A value that holds no tensor."""
    if isinstance(value, DtypeName):
        return getattr(torch, value.removeprefix("torch."))
    if isinstance(value, ByteArray):
        return bytearray(value)
    if isinstance(value, tuple):
        return tuple(map(_simple, value))
    if type(value) is not Call or value.state is not None or value.items or not isinstance(value.callable, Global):
        return value
    make = _MADE.get(value.callable.path)
    found = make(*value.args) if make and 1 <= len(value.args) <= 2 else None
    return value if found is None else found


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex | None:
    return complex(real, imaginary) if type(real) is float and type(imaginary) is float else None


def _device(name: Any = None, index: Any = None) -> torch.device | None:
    """A device by its name, and its number of at most seven bits."""
    if not isinstance(name, str) or not _DEVICE.fullmatch(name):
        return None
    if index is not None and (type(index) is not int or not 0 <= index < 128):
        return None
    try:
        return torch.device(name) if index is None else torch.device(name, index)
    except RuntimeError:  # a kind of device that this version of torch does not know
        return None


def _layout(name: Any = None, *_: Any) -> torch.layout | None:
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    return found if isinstance(found, torch.layout) else None


def _counter(counts: Any = None, *_: Any) -> collections.Counter[Any] | None:
    simple = type(counts) is dict and all(type(n) is int and type(k) in (str, int) for k, n in counts.items())
    return collections.Counter(counts) if simple else None


def _key(value: Any, *_: Any) -> Any:
    """A key that the reader of pickles boxed: a nested tuple, whose size was checked, or a long number."""
    return _simple(value) if isinstance(value, (tuple, int)) else None


_MADE: dict[str, Callable[..., Any]] = {
    "builtins.complex": _complex,
    "__builtin__.complex": _complex,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "collections.Counter": _counter,
    "pickle.key": _key,
}
"""What makes the value of a call, from at most two arguments; None for arguments that it does not take."""
