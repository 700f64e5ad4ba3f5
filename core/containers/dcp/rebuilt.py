"""Rebuild a lost `.metadata` of a DCP folder when that is exact: from one of equal layout, or from names in order.

The files themselves still show where each item begins and ends, and the dtype and shape of each tensor. What is lost
are the names, and the position of each block in its tensor. Both follow when every item of every file is accounted for:
either by another folder of the same program on the same number of ranks, or by the names and whole shapes of a model in
the order of its modules, in which each rank writes its part. Anything else is refused, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ...console.words import listed_names
from ...errors import CheckpointMismatch
from ..container import Container, listing, member, reading
from ..open import open_container
from ..pickles.inert import as_name
from ..spec import TensorSpec
from ..torch_files.items import Items, find_items
from .folder import SUFFIX, is_dcp, metadata_names, metadata_of
from .metadata import METADATA, Entry, Metadata, Place

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredItem:
    """An item of a file: its bytes and, of a tensor, its dtype and shape."""

    offset: int
    length: int
    dtype: str | None
    shape: Shape

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}" if self.dtype else "a value"


def rebuild(path: Path, like: Path) -> Metadata:
    """Make the metadata of a folder that lost it, modelled on another DCP folder or a file whose tensors are in order.

    Raises: CheckpointDamaged when a file has bytes that belong to no item; CheckpointMismatch when `like` does not
        account for every item, or is ambiguous.
    """
    found = items_of(path)
    if is_dcp(like) and METADATA in listing(like):
        entries = _after_layout(path, found, like)
        how = f"{METADATA} was missing: rebuilt after {like}, whose items have the same shapes in the same order"
    else:
        entries = _after_order(path, found, like)
        how = f"{METADATA} was missing: rebuilt from the names and shapes of {like}, in their order"
    count = sum(map(len, found.values()))
    return Metadata(entries, [], [f"{how}; all {count} items in {len(found)} files are accounted for."])


def items_of(path: Path) -> dict[str, list[StoredItem]]:
    """Find every item of every file, in the order of their bytes.

    Raises: CheckpointDamaged when some bytes belong to no item.
    """
    found: dict[str, list[StoredItem]] = {}
    items = Items()
    for name in sorted((name for name in listing(path) if name.endswith(SUFFIX)), key=_rank):
        where = str(path / name)
        with reading(member(path, name, where)) as file:
            found[name] = []
            for offset, length in find_items(file, where):
                content = items.open(file, offset, length, f"{where}: the item at byte {offset}").content
                dtype, shape = (content.dtype, content.shape) if isinstance(content, TensorSpec) else (None, ())
                found[name].append(StoredItem(offset, length, dtype, shape))
    return found


def _rank(name: str) -> tuple[int, str]:
    """Files in the order of the ranks that wrote them."""
    digits = name.removeprefix("__").split("_")[0]
    return int(digits) if digits.isdecimal() and len(digits) < 10 else -1, name


def _after_layout(path: Path, found: dict[str, list[StoredItem]], like: Path) -> list[Entry]:
    """The entries of another folder, located in the files of this one."""
    metadata, _ = metadata_of(like)
    theirs = metadata.by_file()
    found = {name: mine for name, mine in found.items() if mine}  # a rank without rows writes an empty file, or none
    if theirs.keys() != found.keys():
        raise _unlike(path, like, f"found the files {_some(found)}, expected {_some(theirs)}")
    for name, mine in found.items():
        if len(mine) != len(theirs[name]):
            raise _unlike(path, like, f"{name}: found {len(mine)} items, expected {len(theirs[name])}")
    moved: dict[int, Place] = {}
    for name, mine in found.items():
        for number, (item, (place, entry)) in enumerate(zip(mine, theirs[name], strict=True)):
            if (item.dtype, item.shape) != (entry.dtype, place.shape if entry.dtype else ()):
                wanted = f"{entry.dtype} {place.shape}" if entry.dtype else "a value"
                shown = as_name(entry.name)
                raise _unlike(path, like, f"{name}: item {number} is {item}, expected {shown}, {wanted}")
            moved[id(place)] = replace(place, offset=item.offset, length=item.length)
    return [replace(entry, places=[moved[id(place)] for place in entry.places]) for entry in metadata.entries]


def _unlike(path: Path, like: Path, reason: str) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"{path / METADATA}: missing, and {like} has another layout: {reason}. --metadata_from names a folder that the "
        "same program wrote on as many ranks, or a torch file of the model (its tensors in the order of the modules)."
    )


def _after_order(path: Path, found: dict[str, list[StoredItem]], like: Path) -> list[Entry]:
    """Make entries from names and whole shapes in the order of modules: rows in equal parts, or whole on one rank."""
    reference = open_container(like)
    if any(held in reference.kind for held in ("safetensors", "Hugging Face")):
        raise CheckpointMismatch(
            f"{like}: found {reference.kind}, expected a torch file or DCP folder: safetensors lists tensors in an "
            f"order of its own, and {path} can be rebuilt only from names in the order of the modules."
        )
    if list(found) != [f"__{rank}_0{SUFFIX}" for rank in range(len(found))]:
        raise CheckpointMismatch(
            f"{path / METADATA}: missing, found the files {_some(found)}, expected one of each rank (__0_0{SUFFIX}, "
            f"__1_0{SUFFIX}, ...). --metadata_from names a folder that the same program wrote on as many ranks."
        )
    faults = []
    for by_size in (False, True):  # a program on GPUs writes small tensors first, equal ones in their order
        try:
            return _matched(found, reference, by_size)
        except CheckpointMismatch as fault:
            faults.append(str(fault))
    raise CheckpointMismatch(
        f"{path / METADATA}: missing, and {like} does not account for every item: {faults[0]}. --metadata_from names a "
        "folder that the same program wrote on as many ranks, such as that of another step."
    )


def _matched(found: dict[str, list[StoredItem]], reference: Container, by_size: bool) -> list[Entry]:
    files = list(found)
    # an empty part, of a tensor with fewer rows than there are ranks, is of no one's elements
    queues = {file: [item for item in found[file] if 0 not in item.shape] for file in files}
    if values := sum(item.dtype is None for items in queues.values() for item in items):
        raise CheckpointMismatch(f"{values} items are values, whose names are lost")
    specs = list(reference.tensors.values())
    if by_size:
        return _sorted_rows(queues, specs)
    at = dict.fromkeys(files, 0)
    entries = []
    for spec in specs:
        ways = _ways(spec, files, queues, at)
        if len(ways) != 1:
            shown = as_name(spec.name)
            heads = ", ".join(str(queues[f][at[f]]) if at[f] < len(queues[f]) else "nothing" for f in files[:4])
            problem = "fits nowhere" if not ways else "fits in several ways"
            raise CheckpointMismatch(f"{shown} {spec.shape} {problem}, the files go on with {heads}")
        entries.append(_entry(spec, ways[0]))
        for file in dict.fromkeys(place.file for place in ways[0][0]):
            at[file] += 1
    left = {file: len(queues[file]) - at[file] for file in files if at[file] < len(queues[file])}
    if left:
        raise CheckpointMismatch(f"{sum(left.values())} items are left over in {_some(left)}")
    return entries


Way = tuple[list[Place], str]
"""Where the blocks of a tensor are, and its dtype."""


def _ways(spec: TensorSpec, files: list[str], queues: dict[str, list[StoredItem]], at: dict[str, int]) -> list[Way]:
    """Ways in which the next items of the files can form a tensor: as rows, or whole in one file."""
    if 0 in spec.shape:
        return [([], spec.dtype)]
    heads = {file: queues[file][at[file]] for file in files if at[file] < len(queues[file])}
    found: dict[tuple[str, ...], Way] = {}
    rows = {file: box for file, box in _rows(spec.shape, files).items() if 0 not in box[1]}
    for wanted in (rows, *({file: ((0,) * len(spec.shape), spec.shape)} for file in files)):
        fits = wanted and all(file in heads and heads[file].shape == shape for file, (_, shape) in wanted.items())
        dtypes = {heads[file].dtype for file in wanted} if fits else set()
        if len(dtypes) == 1 and (dtype := dtypes.pop()):
            places = [Place(b, s, file, heads[file].offset, heads[file].length) for file, (b, s) in wanted.items()]
            found[tuple(wanted)] = (places, dtype)
    return list(found.values())


def _rows(shape: Shape, files: list[str]) -> dict[str, tuple[Shape, Shape]]:
    """The part of each rank: ceil(n / ranks) rows, the last ones fewer or none."""
    if not shape:
        return {}
    step = -(-shape[0] // len(files))
    boxes = {}
    for rank, file in enumerate(files):
        first = min(rank * step, shape[0])
        rows = min(step, shape[0] - first)
        boxes[file] = ((first, *[0] * (len(shape) - 1)), (rows, *shape[1:]))
    return boxes


def _sorted_rows(queues: dict[str, list[StoredItem]], specs: list[TensorSpec]) -> list[Entry]:
    """Make entries when each rank wrote its rows of all tensors sorted by size, equal ones in order."""
    files = list(queues)
    places: dict[str, list[Place]] = {spec.name: [] for spec in specs}
    dtypes: dict[str, set[str | None]] = {spec.name: set() for spec in specs}
    for file in files:
        mine = [(spec, *_rows(spec.shape, files).get(file, ((), spec.shape))) for spec in specs]
        mine = [one for one in mine if 0 not in one[2]]
        mine.sort(key=lambda one: math.prod(one[2]))
        if [shape for _, _, shape in mine] != [item.shape for item in queues[file]]:
            raise CheckpointMismatch(f"{file}: its {len(queues[file])} items are not these tensors by their size")
        for (spec, begin, shape), item in zip(mine, queues[file], strict=True):
            places[spec.name].append(Place(begin, shape, file, item.offset, item.length))
            dtypes[spec.name].add(item.dtype)
    if any(len(held) != 1 for held in dtypes.values()) or len(set().union(*dtypes.values())) != 1:
        raise CheckpointMismatch("its tensors have different dtypes, and their order by size is not known")
    return [_entry(spec, (places[spec.name], next(iter(dtypes[spec.name])) or "")) for spec in specs]


def _entry(spec: TensorSpec, way: Way) -> Entry:
    return Entry(spec.name, (spec.name,), way[1], spec.shape, way[0])


def _some(names: Iterable[str]) -> str:
    return listed_names(sorted(names), 4)


def lost(path: Path) -> bool:
    """Whether a folder has `.distcp` files and no `.metadata`."""
    return path.is_dir() and is_dcp(path) and not metadata_names(listing(path))


def sibling(path: Path) -> Path | None:
    """The neighbour of a step's folder that has the same layout: that of the average, or of the model."""
    other = {"model_sharded": "ema_sharded", "ema_sharded": "model_sharded"}.get(path.name)
    there = path.parent / other if other else None
    return there if there and there.is_dir() and METADATA in listing(there) else None
