"""Read the file format of torch before version 1.6: five pickles, then the storages one after another.

The pickles are a magic number, a version, facts about the machine, the content, and the keys of the storages; each
storage is an int64 count of elements and their bytes. `torch.save(..., _use_new_zipfile_serialization=False)` still
writes it. Only the pickles and the counts are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, BinaryIO

from ...errors import CheckpointDamaged, CheckpointError
from ..blocks import read_at
from ..pickles.inert import as_text
from ..pickles.reader import ParsedPickle, PickleCutOff, parse_pickle
from .storages import LARGEST_PICKLE, Storage, TensorLoader, TorchArchive, name_tensors

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001

_LONGEST_MAGIC = 64
_FIRST_READ = 1 << 20
_COUNT = 8  # bytes of the count before each storage


def open_torch_stream(file: BinaryIO, where: str, unpack: bool = False) -> TorchArchive:
    """Read the pickles of a stream file; `where` is its path, for messages, and `unpack` is as for a zip.

    Raises: CheckpointDamaged when it is cut off or contradicts itself, CheckpointError for another kind of file.
    """
    head = _Head(file, where)
    _check_magic(head.data, where)
    head.next("magic number")
    protocol, system = head.next("version"), head.next("description of the machine")
    if protocol != PROTOCOL:
        raise CheckpointError(
            f"{where}: a stream file of version {as_text(protocol, 40)}, this program reads {PROTOCOL}. "
            "Load and save it again with the torch that wrote it."
        )
    loader = _Loader(where, "content", "storage ", unpack)
    order = system.get("little_endian") if isinstance(system, dict) else None
    if order is False:
        raise loader.refuse_big_endian()
    if order is not True:
        raise CheckpointDamaged(f"{where}: {as_text(system, 80)} does not say the order of bytes (little_endian).")
    content = head.next("content", loader.read, loader)
    keys = head.next("list of storages", loader=loader)
    loader.place(_storage_offsets(file, head, loader, keys))
    return TorchArchive("stream", where, content, name_tensors(content, where), head.unused, arrays=loader.arrays)


def _check_magic(data: bytes, where: str) -> None:
    """Refuse a pickle that does not begin with torch's magic number.

    Raises: CheckpointDamaged for another number, CheckpointError for a pickle of anything else.
    """
    try:
        magic = parse_pickle(data[:_LONGEST_MAGIC], where).value
    except PickleCutOff as error:
        if len(data) < _LONGEST_MAGIC:
            raise CheckpointDamaged(f"{where}: cut off after {len(data)} bytes, within its first pickle.") from error
        magic = None
    except CheckpointDamaged:
        magic = None
    if type(magic) is not int:
        raise CheckpointError(
            f"{where}: a pickle without the magic number of torch ({MAGIC:#x}): torch.save did not write it. "
            "Load it with the program that wrote it, and save it with torch.save: "
            f"model = pickle.load(open({where!r}, 'rb')); torch.save(model.state_dict(), 'weights.pt')."
        )
    if magic != MAGIC:
        raise CheckpointDamaged(f"{where}: its magic number is {magic:#x}, expected {MAGIC:#x}.")


class _Head:
    """The beginning of a file, extended as far as its pickles require."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.file, self.where = file, where
        self.size = file.seek(0, os.SEEK_END)
        self.data = read_at(file, 0, min(self.size, _FIRST_READ), where)
        self.position = 0
        self.unused: list[Any] = []

    def next(
        self, what: str, read: Callable[[bytes, int], ParsedPickle] | None = None, loader: TensorLoader | None = None
    ) -> Any:
        """Read the pickle at the current position and move behind it; a read that ends too soon gets more bytes."""
        while True:
            try:
                if read:
                    parsed = read(self.data, self.position)
                else:
                    parsed = parse_pickle(self.data, f"{self.where}: {what}", self.position)
            except PickleCutOff as error:
                self.grow(what, loader, error)
            else:
                self.position = parsed.end
                self.unused += parsed.unused
                return parsed.value

    def grow(self, what: str, loader: TensorLoader | None, error: PickleCutOff) -> None:
        """Read up to four times as many bytes of the file.

        Raises: CheckpointDamaged when there are no more, or too many.
        """
        if len(self.data) == self.size:
            hint = loader.needs_more(self.size) if loader else ""
            raise CheckpointDamaged(
                f"{self.where}: cut off after {self.size} bytes: the pickle of its {what} does not end.{hint}"
            ) from error
        if len(self.data) >= LARGEST_PICKLE:
            raise CheckpointDamaged(
                f"{self.where}: the pickle of its {what} does not end within the first {LARGEST_PICKLE} bytes, "
                "which are all that is read."
            ) from error
        self.data = read_at(self.file, 0, min(4 * len(self.data), self.size, LARGEST_PICKLE), self.where)


class _Loader(TensorLoader):
    """Tensor specs of a stream, whose references also name modules and parts of storages."""

    def read(self, data: bytes, start: int = 0) -> ParsedPickle:
        """Read the content; the views of its storages are named apart from them."""
        self.views: dict[str, tuple[Any, ...]] = {}
        parsed = super().read(data, start)
        if both := sorted(self.views.keys() & self.storages.keys()):
            raise CheckpointDamaged(f"{self.where}: {self.shown(both[0])} is also the name of a view of a storage.")
        return parsed

    def storage(self, identity: Any) -> Any:
        """The storage of ("storage", type, key, device, number of elements, view), the class of ("module", ...)."""
        if not isinstance(identity, tuple) or len(identity) != 6:
            if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
                return identity[1]  # behind it, the source text of the class
            raise CheckpointDamaged(f"{self.where}: a reference {as_text(identity, 80)}, expected one to a storage.")
        *plain, view = identity
        root = super().storage(tuple(plain))
        if not isinstance(root, Storage):
            raise CheckpointError(
                f"{self.where}: a storage of type {as_text(root.callable, 80)}, whose size is not known, "
                "so nothing behind it can be found. Load it with torch and save it again."
            )
        return root if view is None else self.view(root, view)

    def view(self, root: Storage, view: Any) -> Storage:
        """The part of a storage that very old files treat as a storage of its own: (key, first element, elements)."""
        numel = root.args[1]
        numbers = view[1:] if isinstance(view, tuple) and len(view) == 3 and isinstance(view[0], str) else ()
        if not numbers or not all(type(n) is int and 0 <= n <= numel for n in numbers) or sum(numbers) > numel:
            raise CheckpointDamaged(
                f"{self.where}: a view {as_text(view, 80)} of {self.shown(root.key)}, which has {numel} elements."
            )
        first, count = numbers
        seen = self.views.setdefault(view[0], (root.key, root.dtype, first, count))
        if seen != (root.key, root.dtype, first, count):  # torch takes the first of the two for every tensor
            raise CheckpointDamaged(
                f"{self.where}: the view {as_text(view[0], 40)} is {as_text(seen, 80)} and "
                f"{as_text((root.key, root.dtype, first, count), 80)}."
            )
        item = root.nbytes // numel if numel else 1
        return Storage(root.callable, root.key, count, first * item)


def _storage_offsets(file: BinaryIO, head: _Head, loader: TensorLoader, keys: Any) -> dict[str, int]:
    """Where the bytes of each storage begin, checked against the counts before them and the size of the file."""
    where, storages = loader.where, loader.storages
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointDamaged(f"{where}: its list of storages is {as_text(keys, 80)}, expected a list of keys.")
    if len(set(keys)) != len(keys):
        raise CheckpointDamaged(f"{where}: its list of storages names one of them twice: {as_text(keys, 80)}.")
    if missing := sorted(storages.keys() - set(keys)):
        raise CheckpointDamaged(f"{where}: {loader.shown(missing[0])} is missing, its tensors cannot be read.")
    if surplus := sorted(set(keys) - storages.keys()):
        raise CheckpointDamaged(f"{where}: no tensor is in {loader.shown(surplus[0])}, which its list of storages has.")
    end = head.position + sum(_COUNT + storages[key].nbytes for key in keys)
    if end > head.size:
        raise CheckpointDamaged(f"{where}: cut off after {head.size} bytes; its tensors end at byte {end}.")
    if end < head.size:
        raise CheckpointDamaged(
            f"{where}: has {head.size} bytes, and its tensors end at byte {end}: "
            f"{head.size - end} bytes belong to nothing."
        )
    offsets: dict[str, int] = {}
    position = head.position
    for key in keys:
        count = int.from_bytes(read_at(file, position, _COUNT, where), "little", signed=True)
        if count != storages[key].args[1]:
            raise CheckpointDamaged(
                f"{where}: {loader.shown(key)} has {count} elements by the count at byte {position}, "
                f"and {storages[key].args[1]} by its pickle."
            )
        offsets[key] = position + _COUNT
        position += _COUNT + storages[key].nbytes
    return offsets
