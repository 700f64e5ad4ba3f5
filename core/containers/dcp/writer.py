"""Lay out a DCP folder without torch: each block of a tensor and each value a torch zip, `.metadata` that places them.

`.metadata` is a pickle of torch.distributed.checkpoint.metadata.Metadata. It is written opcode by opcode, with the
classes by their names, so that no torch is needed; torch's own reader is what the tests read it with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..torch_files.layout import CallRecord, GlobalRecord, Pieces, Sink, pickled, write_torch_file


def file_of(rank: int) -> str:
    """Name the file of a rank."""
    return f"__{rank}_0.distcp"


FILE = file_of(0)

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"

_SIZE = GlobalRecord("torch", "Size")
_STRIDED = CallRecord(GlobalRecord("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = CallRecord(GlobalRecord(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))

Shape = tuple[int, ...]
Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class WrittenItem:
    """A written item: its path in the nested state dict, the location of its bytes and, for a tensor, dtype and shape.

    A block of a tensor also records its own shape and where it begins in the tensor.
    """

    name: str
    path: Keys
    offset: int
    length: int
    dtype: str | None = None
    shape: Shape = ()
    file: str = FILE
    begin: Shape | None = None
    block: Shape | None = None


class _Part:
    """A sink whose bytes are counted from where an item begins: the offsets in its zip are its own."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.size = sink, 0

    def write(self, data: bytes | memoryview) -> int:
        self.size += len(data)
        return self.sink.write(data)


def write_item(sink: Sink, content: Any, storages: Iterable[Pieces] = ()) -> int:
    """Append the torch zip of a value, or of a `TensorRecord` and its bytes in pieces; returns its length."""
    part = _Part(sink)
    write_torch_file(part, pickled(content), storages)
    return part.size


def flattened(value: Any, is_tensor: Callable[[Any], bool], path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield every item with its path, as torch.distributed.checkpoint flattens a state dict.

    A list is a single item unless it contains a dict or a tensor, at any depth of nested lists.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flattened(item, is_tensor, (*path, key))
    elif isinstance(value, list) and not _is_whole(value, is_tensor):
        for number, item in enumerate(value):
            yield from flattened(item, is_tensor, (*path, number))
    else:
        yield path, value


def _is_whole(value: Any, is_tensor: Callable[[Any], bool]) -> bool:
    if isinstance(value, list):
        return all(_is_whole(item, is_tensor) for item in value)
    return not isinstance(value, Mapping) and not is_tensor(value)


def metadata(items: Iterable[WrittenItem]) -> bytes:
    """Write the `.metadata` of items, as torch.distributed.checkpoint reads it; blocks of a tensor have its name."""
    blocks: dict[str, list[WrittenItem]] = {}
    for item in items:
        blocks.setdefault(item.name, []).append(item)
    root = {
        "state_dict_metadata": {name: _described(parts) for name, parts in blocks.items()},
        "planner_data": {name: parts[0].path for name, parts in blocks.items()},
        "storage_data": dict(_stored(part, n) for parts in blocks.values() for n, part in enumerate(parts)),
        "storage_meta": None,
    }
    return pickled(_record(_METADATA, "Metadata", root))


def _described(parts: list[WrittenItem]) -> CallRecord:
    item = parts[0]
    if item.dtype is None:
        return _record(_METADATA, "BytesStorageMetadata", {})
    properties = (GlobalRecord("torch", item.dtype), _STRIDED, False, _CONTIGUOUS, False)
    chunks = [{"offsets": _size(_begin(part)), "sizes": _size(part.block or part.shape)} for part in parts]
    says = {
        "properties": _record(_METADATA, "TensorProperties", properties),
        "size": _size(item.shape),
        "chunks": [_record(_METADATA, "ChunkStorageMetadata", chunk) for chunk in chunks],
    }
    return _record(_METADATA, "TensorStorageMetadata", says)


def _begin(item: WrittenItem) -> Shape:
    return item.begin or (0,) * len(item.shape)


def _stored(item: WrittenItem, number: int) -> tuple[CallRecord, CallRecord]:
    begin = None if item.dtype is None else _size(_begin(item))
    index = {"fqn": item.name, "offset": begin, "index": None if item.dtype is None else number}
    place = {"relative_path": item.file, "offset": item.offset, "length": item.length}
    return _record(_METADATA, "MetadataIndex", index), _record(_FILESYSTEM, "_StorageInfo", place)


def _record(module: str, name: str, state: Mapping[str, Any] | tuple[Any, ...]) -> CallRecord:
    return CallRecord(GlobalRecord(module, name), None, state)


def _size(shape: Shape) -> CallRecord:
    return CallRecord(_SIZE, (shape,))
