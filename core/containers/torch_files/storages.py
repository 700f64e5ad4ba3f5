"""Tensor specs from the pickle of a torch file, whichever container holds it.

The documentation of torch.serialization describes how torch writes tensors, storages and references to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import CheckpointDamaged, CheckpointError
from ..blocks import naturals
from ..pickles.foreign import is_module
from ..pickles.inert import LEAVES, Call, DtypeName, Global, as_name, as_text, flat
from ..pickles.reader import ParsedPickle, parse_pickle
from ..pickles.reductions import Reductions, as_size
from ..spec import DTYPES, ITEM_SIZES, LONGEST_NAME, MOST_DIMENSIONS, TensorSpec, reach
from .arrays import BUILDERS, Array, array_of
from .zip_directory import Record

LARGEST_PICKLE = 1 << 28
"""Bytes of a pickle: structure and names; ten thousand tensors take about two million."""


_BYTES_OF_TENSOR = 50
"""Bytes of a pickle to each tensor that it may make: the shortest that torch writes takes sixty."""

_TENSORS_OF_ANY = 20_000
"""Tensors that a pickle of any length may make."""


@dataclass(slots=True, eq=False, repr=False)
class TorchArchive:
    """An opened torch file: its content with a TensorSpec for each tensor, and the tensors by their path in it."""

    container: str  # "zip" or "stream"
    where: str
    content: Any
    tensors: dict[str, TensorSpec]
    unused: list[Any]  # calls whose results are not in the content: how code is hidden in a sound file
    records: dict[str, Record] = field(default_factory=dict)  # of a zip, without the archive's folder: "data/0"
    odd: list[str] = field(default_factory=list)  # parts that torch.save does not write, a sentence each
    arrays: dict[str, Array] = field(default_factory=dict)  # the tensors within the pickle, by what their specs name


class Storage(Call):
    """The memory of one or more tensors, seen as elements of one type; by itself it is a record like any other."""

    __slots__ = ("dtype", "key", "nbytes", "start")
    changes = False  # torch would give it other memory

    def __init__(self, kind: Global, key: str, numel: int, start: int = 0) -> None:
        super().__init__(kind, (key, numel))
        self.key = key
        self.dtype, item = _STORAGES[kind.path]  # no dtype for bytes, whose type each tensor specifies
        self.nbytes = numel * item
        self.start = start  # in bytes, within the storage of this key; above 0 only for a view


class TensorLoader:
    """Builds tensor specs while a pickle is read; `place` adds where in the file their storages are."""

    def __init__(self, where: str, source: str = "data.pkl", prefix: str = "data/", unpack: bool = False) -> None:
        self.where = where
        self.source = source  # the name of the pickle in messages
        self.prefix = prefix  # precedes the key of a storage in messages
        self.storages: dict[str, Storage] = {}
        self.specs: list[TensorSpec] = []
        self.most = _TENSORS_OF_ANY
        self.names: set[str] = set()  # of classes and functions in the pickle
        self.arrays: dict[str, Array] = {}
        self.packed: dict[str, str] = {}  # storages that are deflated, by the names of their records
        self.builders: Reductions = {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.typed_tensor,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": _of_device,
            **(dict.fromkeys(BUILDERS, self.array) if unpack else {}),
        }

    def read(self, data: bytes, start: int = 0) -> ParsedPickle:
        """Read the pickle that begins at byte `start`; offsets in its specs count from the beginning of the storage."""
        self.storages, self.specs, self.names = {}, [], set()
        self.most = _TENSORS_OF_ANY + (len(data) - start) // _BYTES_OF_TENSOR
        return parse_pickle(
            data,
            f"{self.where}: {self.source}",
            start,
            persistent=self.storage,
            resolve=self.resolve,
            reductions={
                **self.builders,
                "torch._utils._rebuild_parameter": _first,
                "torch._utils._rebuild_parameter_with_state": self.parameter,
                "torch._tensor._rebuild_from_type_v2": self.subclass,
                "torch.Size": as_size,
            },
        )

    def place(self, offsets: Mapping[str, int]) -> None:
        """Turn the offsets within storages into offsets in the file; `offsets` has the start of each storage."""
        for spec in self.specs:
            spec.offset += offsets[spec.storage]
            spec.file = self.packed.get(spec.storage, "")

    def needs_more(self, size: int) -> str:
        """A sentence about the size of the tensors, if they alone are larger than a file that was cut off."""
        needed = sum(storage.nbytes for storage in self.storages.values())
        return f" Its tensors alone need {needed} bytes." if needed > size else ""

    def refuse_big_endian(self) -> CheckpointError:
        """Make the error for a file whose bytes are in the other order."""
        return CheckpointError(
            f"{self.where}: written on a big-endian machine, this program reads little-endian files. "
            "Load and save it again with torch."
        )

    def shown(self, key: str) -> str:
        """The name of a storage in a message."""
        return f"{self.prefix}{as_name(key, 40)}"

    def resolve(self, name: Global) -> Any:
        """The names of dtypes become text."""
        self.names.add(name.path)
        found = name.path.startswith("torch.") and name.path.removeprefix("torch.") in ITEM_SIZES
        return DtypeName(name.path) if found else name

    def storage(self, identity: Any) -> Any:
        """The storage of a persistent id: ("storage", torch.FloatStorage, key, device, number of elements)."""
        if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
            raise CheckpointDamaged(f"{self.where}: a reference {as_text(identity, 80)}, expected one to a storage.")
        _, kind, key, _, numel = identity
        if not (isinstance(kind, Global) and isinstance(key, str) and naturals((numel,))):
            raise CheckpointDamaged(f"{self.where}: a malformed reference to a storage: {as_text(identity, 80)}.")
        if kind.path not in _STORAGES:
            return Call(kind, (key, numel))
        read, nul, _ = key.partition("\0")
        if nul:
            raise CheckpointDamaged(
                f"{self.where}: {self.source} names {self.shown(key)}, which torch reads as {self.shown(read)}."
            )
        storage = Storage(kind, key, numel)
        found = self.storages.setdefault(key, storage)
        if found.nbytes != storage.nbytes:
            raise CheckpointDamaged(
                f"{self.where}: {self.source} gives {self.shown(key)} both {found.nbytes} and {storage.nbytes} bytes."
            )
        if found.dtype != storage.dtype and storage.nbytes:  # torch takes the first of the two for every tensor
            raise CheckpointDamaged(
                f"{self.where}: {self.source} gives {self.shown(key)} both the dtype {found.dtype or 'uint8'} and "
                f"{storage.dtype or 'uint8'}."
            )
        return found if found.dtype == storage.dtype else storage  # once, however often it is referred to

    def tensor(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
    ) -> Any:
        """A tensor in a typed storage; one whose bytes are to be conjugated or negated stays a Call."""
        if metadata or not isinstance(storage, Storage) or storage.dtype is None:
            return NotImplemented
        return self.spec(storage, storage.dtype, offset, shape, strides)

    def typed_tensor(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any,
        hooks: Any,
        dtype: Any,
        metadata: Any = None,
    ) -> Any:
        """A tensor of a type that came after typed storages."""
        name = dtype.removeprefix("torch.") if isinstance(dtype, DtypeName) else None
        if metadata or not isinstance(storage, Storage) or name not in ITEM_SIZES:
            return NotImplemented
        return self.spec(storage, name, offset, shape, strides)

    def array(self, record: Any, dtype: Any, *_: Any) -> Any:
        """A tensor of a device without storages, which is an array in the pickle."""
        found = array_of(record, dtype)
        if found is None:
            return NotImplemented
        name = f"{self.source}/{len(self.arrays)}"
        self.arrays[name] = found
        nbytes = math.prod(found.shape) * ITEM_SIZES[found.dtype]
        return TensorSpec("", found.dtype, found.shape, found.strides, 0, nbytes, name, name)

    def parameter(self, data: Any, requires_grad: Any, hooks: Any, state: Any) -> Any:
        """A parameter with attributes of its own is its tensor."""
        self.check_attributes(state)
        return data

    def check_attributes(self, state: Any) -> None:
        """Refuse attributes of a tensor that replace its values: torch sets each by its name."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict) and (names := sorted(_VALUES.intersection(part))):
                raise CheckpointDamaged(
                    f"{self.where}: {self.source} gives a tensor the attribute {names[0]}, which replaces its values."
                )

    def subclass(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor with attributes of its own; of another class than torch's two it stays a Call."""
        self.check_attributes(state)
        build = self.builders.get(function.path) if isinstance(function, Global) else None
        plain = isinstance(kind, Global) and kind.path in ("torch.Tensor", "torch.nn.parameter.Parameter")
        return build(*args) if build and plain and isinstance(args, tuple) else NotImplemented

    def spec(self, storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> TensorSpec:
        """Check a tensor's geometry against its storage."""
        numbers = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
        if not numbers or len(shape) > MOST_DIMENSIONS or not naturals((offset, *shape, *strides)):
            raise CheckpointDamaged(
                f"{self.where}: a tensor in {self.shown(storage.key)} of shape {as_text(shape, 60)}, "
                f"strides {as_text(strides, 60)}, offset {as_text(offset, 30)}: expected as many strides as sizes, "
                "all whole numbers of at least 0."
            )
        item = ITEM_SIZES[dtype]
        nbytes, last = math.prod(shape) * item, (offset + reach(shape, strides)) * item
        if last > storage.nbytes or nbytes >= 1 << 63:
            raise CheckpointDamaged(
                f"{self.where}: a tensor {dtype} of shape {as_text(shape, 60)}, strides {as_text(strides, 60)}, offset "
                f"{offset} ends at byte {last} of {self.shown(storage.key)}, which has {storage.nbytes}."
            )
        if len(self.specs) > self.most:
            raise CheckpointDamaged(
                f"{self.where}: {self.source} makes over {self.most} tensors, too many for its length."
            )
        spec = TensorSpec("", dtype, shape, strides, storage.start + offset * item, nbytes, storage.key)
        self.specs.append(spec)
        return spec


_VALUES = {"data", "real", "imag", "__class__", "__dict__"}
"""Attributes of a tensor that change what it is."""


def _first(data: Any, *_: Any) -> Any:
    """A parameter is its tensor."""
    return data


def _of_device(tensor: Any, dtype: Any, *_: Any) -> Any:
    """A tensor of a device is the one that was copied from it, of its dtype."""
    same = isinstance(tensor, TensorSpec) and dtype == f"torch.{tensor.dtype}"
    return tensor if same else NotImplemented


_STORAGES: dict[str, tuple[str | None, int]] = {  # dtype and bytes of an element
    "torch.storage.UntypedStorage": (None, 1),
    "torch.UntypedStorage": (None, 1),
    **{f"torch.{word}Storage": (dtype, size) for dtype, (size, _, word, _) in DTYPES.items() if word},
    # quantized numbers have no value without their scale: their tensors stay records
    "torch.QInt8Storage": (None, 1),
    "torch.QUInt8Storage": (None, 1),
    "torch.QInt32Storage": (None, 4),
    "torch.QUInt4x2Storage": (None, 1),
    "torch.QUInt2x4Storage": (None, 1),
}


_WITHOUT = LEAVES | {Storage}
"""Types of values in which there is no tensor."""

_USUAL_NAME = 100
"""Characters of a name that cost nothing."""

_ROOM_FOR_LONG_NAMES = 1_000_000
"""Characters beyond that in all names together: 4 KB could ask for a list of 180 MB."""


def name_tensors(content: Any, where: str) -> dict[str, TensorSpec]:
    """Name each tensor by the path to it; the same tensor found twice has a spec under each name."""
    tensors: dict[str, TensorSpec] = {}
    room = _ROOM_FOR_LONG_NAMES

    def walk(value: Any, path: str) -> None:
        nonlocal room
        path = path[: LONGEST_NAME + 1]  # or a long key in front of many values would be copied for each of them
        if isinstance(value, TensorSpec):
            if path in tensors or len(path) > LONGEST_NAME:
                problem = "two tensors are called" if path in tensors else "a tensor has the endless name"
                raise CheckpointError(f"{where}: {problem} {as_text(path, 80)}.")
            room -= max(0, len(path) - _USUAL_NAME)
            if room < 0:
                raise CheckpointError(
                    f"{where}: after {len(tensors)} tensors their names have over {_ROOM_FOR_LONG_NAMES} characters "
                    f"too many, such as {as_text(path, 80)}. They share parts, which every list would write out."
                )
            if not value.name:
                value.name = path
            tensors[path] = value if value.name == path else replace(value, name=path)
            return
        before = f"{path}." if path else ""
        if isinstance(value, dict):
            for key, item in value.items():
                if type(item) not in _WITHOUT and not flat(item, _WITHOUT):
                    walk(item, before + (key if isinstance(key, str) else as_text(key)))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if type(item) not in _WITHOUT and not flat(item, _WITHOUT):
                    walk(item, f"{before}{i}")
        elif isinstance(value, Call):
            if is_module(value):
                for name, item in _in_module(value.state).items():
                    walk(item, before + name)
                return
            for inner, inside in ((value.args, f"{before}args"), (value.items, f"{before}items"), (value.state, path)):
                if inner:
                    walk(inner, inside)

    walk(content, "")
    return tensors


def _in_module(state: dict[str, Any]) -> dict[str, Any]:
    """What a module holds, by attribute and in the order of its state dict, without buffers that are not in one."""
    hidden = state.get("_non_persistent_buffers_set")
    held: dict[str, Any] = {}
    for part in ("_parameters", "_buffers", "_modules"):
        there = state.get(part)
        held |= there if isinstance(there, dict) else {}
    held |= {name: item for name, item in state.items() if not name.startswith("_") and name not in held}
    gone = hidden if isinstance(hidden, set) else set()
    return {name: item for name, item in held.items() if isinstance(name, str) and name not in gone}
