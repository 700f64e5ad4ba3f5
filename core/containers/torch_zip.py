"""Read what a `.pt` zip holds from its directory and `data.pkl` alone: no torch, no weights, nothing executed.

The zip is PKWARE's APPNOTE 4.3 with its 64-bit extension; which records a torch file has is told in
docs of torch.serialization and in the docstring of `core/containers/torch_zip_writer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from core.containers.inert import Call, Global, as_text
from core.containers.pickles import read_pickle
from core.containers.spec import ITEM_SIZES, TensorSpec, reach
from core.containers.zip_directory import Record, read_at, read_directory, read_head
from core.errors import CheckpointDamaged, CheckpointError

_LARGEST_PICKLE = 1 << 28
"""Bytes of data.pkl: structure and names; ten thousand tensors take about two million."""

_MOST_DIMENSIONS = 64
_LONGEST_NAME = 1000


@dataclass(slots=True)
class Storage:
    """The memory of one or more tensors: a record of the zip, seen as elements of one type."""

    key: str
    dtype: str | None  # None for bytes, whose type each tensor says
    nbytes: int


class TorchZip:
    """An opened torch file: its records, its content with a TensorSpec for each tensor, and the tensors by name."""

    def __init__(self, where: str, records: dict[str, Record], content: Any, tensors: dict[str, TensorSpec]) -> None:
        self.where = where
        self.records = records
        self.content = content
        self.tensors = tensors

    @classmethod
    def open(cls, file: BinaryIO, where: str) -> TorchZip:
        """Read the directory and data.pkl of a torch file; `where` is its path, for messages.

        `records` go by their name without the archive's folder ("data/0"), `tensors` by the path to them in the
        content, joined with dots.

        Raises: CheckpointDamaged when it is cut off or contradicts itself, CheckpointError for another kind of file.
        """
        records = read_directory(file, where, _least_size)
        if "data.pkl" not in records:
            raise CheckpointError(
                f"{where}: a zip without data.pkl, so not one that torch.save wrote; it holds "
                f"{as_text(sorted(records)[:5])}."
            )
        order = _read(file, records["byteorder"], where) if "byteorder" in records else b"little"
        if order == b"big":
            raise CheckpointError(
                f"{where}: written on a big-endian machine, this program reads little-endian files. "
                "Load and save it again with torch."
            )
        if order != b"little":
            raise CheckpointDamaged(f"{where}: its byteorder is {as_text(order)}, expected little or big.")
        content = _Loader(where, records).read(_read(file, records["data.pkl"], where))
        return cls(where, records, content, _name_tensors(content, where))


def _read(file: BinaryIO, record: Record, where: str) -> bytes:
    if not record.stored:
        raise CheckpointDamaged(
            f"{where}: {record.name} is compressed; torch stores it plainly. Unpack and save again."
        )
    if record.size > _LARGEST_PICKLE:
        raise CheckpointDamaged(f"{where}: {record.name} has {record.size} bytes, at most {_LARGEST_PICKLE} are read.")
    return read_at(file, record.offset, record.size, where)


def _least_size(file: BinaryIO, size: int, where: str) -> str:
    """How large a file without directory must have been: data.pkl stands first and says what its tensors need."""
    loader = _Loader(where, None)
    try:
        name, begin = read_head(file, 0, where)
        if not name.endswith(b"/data.pkl"):
            return ""
        loader.read(read_at(file, begin, min(size - begin, _LARGEST_PICKLE), where))
    except CheckpointError:  # cut off within data.pkl: nothing more is known
        return ""
    needed = sum(storage.nbytes for storage in loader.storages.values())
    return f" Its tensors alone need {needed} bytes." if needed > size - begin else ""


class _Loader:
    """Builds tensor specs while data.pkl is read."""

    def __init__(self, where: str, records: dict[str, Record] | None) -> None:
        self.where = where
        self.records = records  # None: the file is cut off, sizes are only added up
        self.storages: dict[str, Storage] = {}

    def read(self, data: bytes) -> Any:
        """Read data.pkl."""
        return read_pickle(
            data,
            f"{self.where}: data.pkl",
            persistent=self.storage,
            resolve=_resolve,
            reductions={
                "torch._utils._rebuild_tensor": self.tensor,
                "torch._utils._rebuild_tensor_v2": self.tensor,
                "torch._utils._rebuild_tensor_v3": self.typed_tensor,
                "torch._utils._rebuild_parameter": _first,
                "torch._utils._rebuild_parameter_with_state": _first,
                "torch._tensor._rebuild_from_type_v2": self.subclass,
                "torch.Size": _size,
            },
        )

    def storage(self, identity: Any) -> Storage | Call:
        """The storage of a persistent id: ("storage", torch.FloatStorage, key, device, number of elements)."""
        if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
            raise CheckpointDamaged(f"{self.where}: a reference {as_text(identity, 80)}, expected one to a storage.")
        _, kind, key, _, numel = identity
        if not (isinstance(kind, Global) and isinstance(key, str) and type(numel) is int and numel >= 0):
            raise CheckpointDamaged(f"{self.where}: a malformed reference to a storage: {as_text(identity, 80)}.")
        if kind.path not in _STORAGES:
            return Call(kind, (key, numel))
        dtype = _STORAGES[kind.path]
        nbytes = numel * (ITEM_SIZES[dtype] if dtype else 1)
        if self.records is not None:
            record = self.records.get(f"data/{key}")
            if record is None:
                raise CheckpointDamaged(f"{self.where}: {_shown(key)} is missing, its tensors cannot be read.")
            if record.size != nbytes or not record.stored:
                raise CheckpointDamaged(
                    f"{self.where}: {as_text(record.name)[1:-1]} has {record.size} bytes, data.pkl says {nbytes}."
                )
        found = self.storages.setdefault(key, Storage(key, dtype, nbytes))
        if found.nbytes != nbytes:
            raise CheckpointDamaged(
                f"{self.where}: data.pkl gives {_shown(key)} both {found.nbytes} and {nbytes} bytes."
            )
        return found if found.dtype == dtype else Storage(key, dtype, nbytes)

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
        name = dtype.removeprefix("torch.") if isinstance(dtype, str) else None
        if metadata or not isinstance(storage, Storage) or name not in ITEM_SIZES:
            return NotImplemented
        return self.spec(storage, name, offset, shape, strides)

    def subclass(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor with attributes of its own; of another class than torch's two it stays a Call."""
        builders: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.typed_tensor,
        }
        build = builders.get(function.path) if isinstance(function, Global) else None
        plain = isinstance(kind, Global) and kind.path in ("torch.Tensor", "torch.nn.parameter.Parameter")
        return build(*args) if build and plain and isinstance(args, tuple) else NotImplemented

    def spec(self, storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> TensorSpec:
        """Check a tensor's geometry against its storage."""
        numbers = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
        if not numbers or len(shape) > _MOST_DIMENSIONS or not _natural(offset, *shape, *strides):
            raise CheckpointDamaged(
                f"{self.where}: a tensor in {_shown(storage.key)} of shape {as_text(shape, 60)}, "
                f"strides {as_text(strides, 60)}, offset {as_text(offset, 30)}: expected as many strides as sizes, "
                "all whole numbers from 0."
            )
        item = ITEM_SIZES[dtype]
        nbytes, last = item, (offset + reach(shape, strides)) * item
        for size in shape:
            nbytes *= size
        if last > storage.nbytes or nbytes >= 1 << 63:
            raise CheckpointDamaged(
                f"{self.where}: a tensor {dtype} of shape {as_text(shape, 60)}, strides {as_text(strides, 60)}, offset "
                f"{offset} ends at byte {last} of {_shown(storage.key)}, which has {storage.nbytes}."
            )
        start = self.records[f"data/{storage.key}"].offset if self.records is not None else 0
        return TensorSpec("", dtype, shape, strides, start + offset * item, nbytes, storage.key)


def _shown(key: str) -> str:
    return f"data/{as_text(key, 40)[1:-1]}"


def _first(data: Any, *_: Any) -> Any:
    """A parameter is its tensor."""
    return data


def _size(sizes: Any = ()) -> Any:
    return sizes if isinstance(sizes, tuple) else NotImplemented


def _natural(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _resolve(name: Global) -> Any:
    """The names of dtypes become text."""
    return name.path if name.path.removeprefix("torch.") in ITEM_SIZES else name


_STORAGES: dict[str, str | None] = {
    "torch.storage.UntypedStorage": None,
    "torch.UntypedStorage": None,
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
}


def _name_tensors(content: Any, where: str) -> dict[str, TensorSpec]:
    """Name each tensor by the path to it; the same tensor found twice has a spec under each name."""
    tensors: dict[str, TensorSpec] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, TensorSpec):
            if path in tensors or len(path) > _LONGEST_NAME:
                problem = "two tensors are called" if path in tensors else "a tensor has the endless name"
                raise CheckpointError(f"{where}: {problem} {as_text(path, 80)}.")
            if not value.name:
                value.name = path
            tensors[path] = value if value.name == path else replace(value, name=path)
            return
        before = f"{path}." if path else ""
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, before + (key if isinstance(key, str) else as_text(key)))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                walk(item, f"{before}{i}")
        elif isinstance(value, Call):
            walk(value.args, f"{before}args")
            walk(value.items, f"{before}items")
            walk(value.state, path)

    walk(content, "")
    return tensors
