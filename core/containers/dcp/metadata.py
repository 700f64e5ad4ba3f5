"""Read `.metadata`, where a DCP folder keeps the name, shape and place of every item in it.

It is a pickle of torch.distributed.checkpoint.metadata.Metadata; its classes are those of torch's metadata.py and
filesystem.py in that package; older torch had some of them elsewhere. Nothing in it is trusted without the files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

from ...errors import CheckpointDamaged, CheckpointError
from ..blocks import naturals
from ..pickles.foreign import DATA, attributes
from ..pickles.inert import Call, Global, as_name, as_text
from ..pickles.reader import parse_pickle
from ..pickles.reductions import Reductions, as_size
from ..spec import ITEM_SIZES, LONGEST_NAME, MOST_DIMENSIONS
from .dtensor import class_name, foreign_within, is_distributed

METADATA = ".metadata"

_DENSITY = 3
"""What a `.metadata` makes for each of its bytes, as `Allowance` weighs it: 2.5, of five records for each tensor."""

_DEEPEST = 32  # levels of the nested state dict


@dataclass(slots=True, eq=False, repr=False)
class Place:
    """A block of a tensor, or a value, and the bytes of the torch zip that holds it."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(slots=True, eq=False, repr=False)
class Entry:
    """One name in a DCP folder: a tensor in blocks, or, without a dtype, a value in one torch zip."""

    name: str
    path: tuple[str | int, ...]  # where it was in the nested state dict
    dtype: str | None
    shape: tuple[int, ...]
    places: list[Place]


@dataclass(slots=True, eq=False, repr=False)
class Metadata:
    """The content of a `.metadata`, checked as far as possible without the other files."""

    entries: list[Entry]
    foreign: list[str]  # names in it besides the classes of every `.metadata`
    notes: list[str]

    def by_file(self) -> dict[str, list[tuple[Place, Entry]]]:
        """List the places of each file in the order of their bytes, with the entry of each."""
        found: dict[str, list[tuple[Place, Entry]]] = {}
        for entry in self.entries:
            for place in entry.places:
                found.setdefault(place.file, []).append((place, entry))
        return {file: sorted(places, key=lambda pair: pair[0].offset) for file, places in found.items()}


def merge_metadata(parts: list[Metadata], where: str) -> Metadata:
    """Join what each rank says of its own items (`__0.metadata`, ...); `where` is their folder.

    A block that several ranks have counts once, and so does a value: the first rank's.

    Raises: CheckpointDamaged when two ranks give one name another dtype or shape.
    """
    entries: dict[str, Entry] = {}
    known: dict[str, set[str]] = {}  # blocks as texts, whose hashes cannot be predicted
    for part in parts:
        for entry in part.entries:
            first = entries.setdefault(entry.name, entry)
            if (first.dtype, first.shape) != (entry.dtype, entry.shape):
                raise CheckpointDamaged(
                    f"{where}: {as_name(entry.name)} is {entry.dtype} {entry.shape} in {entry.places[0].file}, and "
                    f"{first.dtype} {first.shape} in {first.places[0].file}. The ranks are of different saves."
                )
            mine = known.setdefault(entry.name, set())
            fresh = {f"{place.begin} {place.shape}": place for place in entry.places}
            if first is not entry and entry.dtype:
                first.places += [place for block, place in fresh.items() if block not in mine]
            mine.update(fresh)
    foreign = dict.fromkeys(call for part in parts for call in part.foreign)
    notes = [note for part in parts for note in part.notes]
    values = sum(entry.dtype is None for entry in entries.values())
    if len(parts) > 1 and values:
        notes.append(f"its {values} values that are no tensors are those of the first of {len(parts)} ranks.")
    return Metadata(list(entries.values()), list(foreign), notes)


def read_metadata(data: bytes, where: str) -> Metadata:
    """Read the bytes of a `.metadata`; `where` is its path, for messages.

    Raises: CheckpointDamaged when it is not a sound pickle or contradicts itself, CheckpointError when it is a pickle
        of something else, or describes items that this program cannot read.
    """
    named: dict[str, None] = {}

    def resolve(name: Global) -> Any:
        named[name.path] = None
        return name

    reductions: Reductions = {"torch.Size": as_size, "torch.serialization._get_layout": _layout}
    parsed = parse_pickle(data, where, resolve=resolve, reductions=reductions, density=_DENSITY)
    root = attributes(parsed.value) if isinstance(parsed.value, Call) else None
    if root is None or not isinstance(root.get("state_dict_metadata"), dict):
        raise CheckpointError(
            f"{where}: a pickle of {as_text(parsed.value, 60)}, expected a Metadata of torch.distributed.checkpoint "
            "with state_dict_metadata."
        )
    storage = root.get("storage_data")
    if not isinstance(storage, dict):
        raise CheckpointError(
            f"{where}: its storage_data is {as_text(storage, 60)}, expected the file of each item. "
            "Another storage than files wrote it."
        )
    reader = _Reader(where, _stored(storage, where))
    paths = root.get("planner_data")
    entries = [
        reader.entry(name, value, paths.get(name) if isinstance(paths, dict) and isinstance(name, str) else None)
        for name, value in root["state_dict_metadata"].items()
    ]
    notes = []
    if surplus := reader.stored.keys() - reader.used:
        notes.append(f"{len(surplus)} stored items belong to no tensor or value: {as_text(sorted(surplus))}.")
    if behind := len(data) - parsed.end:
        notes.append(f"{METADATA}: {behind} bytes stand behind the end of its pickle, and were not read.")
    usual = all(name in DATA or is_distributed(name) for name in named)
    foreign = [] if usual else foreign_within([parsed.value, *parsed.unused])
    return Metadata(entries, foreign, notes)


def _key(name: str, begin: tuple[int, ...] | None) -> str:
    """The key of an item: its name and where it begins in its tensor, if it is a block of one.

    The key is text, because its hash cannot be predicted: thousands of tuples crafted to have one hash would be slow.
    """
    return f"{name} {begin}"


def _stored(storage: dict[Any, Any], where: str) -> dict[str, tuple[str, int, int]]:
    """The file, offset and length of each item, by its key."""
    stored: dict[str, tuple[str, int, int]] = {}
    for index, info in storage.items():
        key, place = attributes(index) or {}, attributes(info) or {}
        name, begin = key.get("fqn"), key.get("offset")
        file, offset, length = place.get("relative_path"), place.get("offset"), place.get("length")
        numbers = (offset, length)
        if not isinstance(name, str) or not (begin is None or _is_place(begin)) or not naturals(numbers):
            raise CheckpointDamaged(
                f"{where}: an item {as_text(index, 120)} at {as_text(info, 120)}, expected a name, and a file, offset "
                "and length, all whole numbers of at least 0."
            )
        if not isinstance(file, str):
            raise CheckpointDamaged(f"{where}: {as_name(name)} is in a file called {as_text(file, 40)}.")
        if transforms := place.get("transform_descriptors"):
            raise CheckpointError(
                f"{where}: {as_name(name)} was written through {as_text(transforms, 60)}, which this program "
                "cannot undo. Load and save it again with torch, without extensions."
            )
        if (item := _key(name, begin)) in stored:
            raise CheckpointDamaged(f"{where}: {as_name(name)} at {begin} is stored twice.")
        stored[item] = (file, numbers[0], numbers[1])
    return stored


class _Reader:
    """Joins the entry of a name in state_dict_metadata with its locations in storage_data."""

    def __init__(self, where: str, stored: dict[str, tuple[str, int, int]]) -> None:
        self.where, self.stored = where, stored
        self.used: set[str] = set()

    def entry(self, name: Any, value: Any, path: Any) -> Entry:
        if not isinstance(name, str) or len(name) > LONGEST_NAME:
            raise CheckpointDamaged(f"{self.where}: an item called {as_text(name, 80)}, expected a short text.")
        where = f"{self.where}: {as_name(name)}"
        kind = class_name(value)
        if kind == "BytesStorageMetadata":
            return Entry(name, _path(name, path), None, (), [self.place(name, None, (), where)])
        if kind != "TensorStorageMetadata":
            raise CheckpointError(f"{where} is {as_text(value, 80)}, expected a tensor or a value.")
        says = attributes(value) or {}
        dtype, shape, chunks = _dtype(says.get("properties")), says.get("size"), says.get("chunks")
        if dtype is None:
            raise CheckpointError(
                f"{where} has the properties {as_text(says.get('properties'), 120)}, which no dense tensor of a known "
                "dtype has."
            )
        if not isinstance(shape, tuple) or not _shape(shape, ITEM_SIZES[dtype]) or not isinstance(chunks, list):
            raise CheckpointDamaged(f"{where} has the shape {as_text(shape, 80)} in blocks {as_text(chunks, 80)}.")
        places: dict[str, Place] = {}
        for chunk in chunks:
            box = attributes(chunk) or {}
            begin, size = box.get("offsets"), box.get("sizes")
            if not _is_place(begin) or not _is_place(size) or len(begin) != len(shape) or len(size) != len(shape):
                raise CheckpointDamaged(f"{where} has a block {as_text(chunk, 120)}, its shape is {as_text(shape)}.")
            there = places.get(at := str(begin))
            if there is not None and 0 not in size and 0 not in there.shape and there.shape != size:
                raise CheckpointDamaged(f"{where} has two blocks at {begin}: {there.shape} and {size}.")
            if there is not None and 0 not in there.shape:
                continue  # what each rank has, or an empty shard that begins where a full one does
            places[at] = self.place(name, begin, size, where)
        return Entry(name, _path(name, path), dtype, shape, list(places.values()))

    def place(self, name: str, begin: tuple[int, ...] | None, size: tuple[int, ...], where: str) -> Place:
        item = _key(name, begin)
        found = self.stored.get(item)
        if found is None:
            at = "" if begin is None else f" at {begin}"
            raise CheckpointDamaged(f"{where}{at} is nowhere in storage_data: it cannot be found.")
        self.used.add(item)
        return Place(begin or (), size, *found)


def _path(name: str, path: Any) -> tuple[str | int, ...]:
    """The path of an item in its state dict; planners that do not flatten record none, or something else."""
    whole = isinstance(path, tuple) and 0 < len(path) < _DEEPEST
    return path if whole and all(isinstance(key, str) or naturals((key,)) for key in path) else (name,)


def _dtype(properties: Any) -> str | None:
    """The dtype in TensorProperties, whose state is (dtype, layout, requires_grad, memory format, pin_memory)."""
    state = getattr(properties, "state", None)
    if isinstance(state, dict):  # before it had a state of its own
        state = (state.get("dtype"), state.get("layout"))
    if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[0], Global):
        return None
    dtype = state[0].path.removeprefix("torch.")
    return dtype if dtype in ITEM_SIZES and state[1] == "torch.strided" else None


def _shape(shape: tuple[Any, ...], item: int) -> bool:
    return _is_place(shape) and item * math.prod(max(size, 1) for size in shape) < 1 << 63


def _is_place(numbers: Any) -> TypeGuard[tuple[int, ...]]:
    """Whether a value has one whole number per dimension; a longer one could be shared thousands of times."""
    return isinstance(numbers, tuple) and len(numbers) <= MOST_DIMENSIONS and naturals(numbers)


def _layout(name: Any) -> Any:
    """How the elements of a tensor lie, by its name."""
    return name if isinstance(name, str) else NotImplemented
