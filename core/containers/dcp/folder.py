"""Open a folder of torch.distributed.checkpoint: `.metadata`, and `.distcp` files of torch zips end to end.

Each block of a tensor and each value is a torch zip of its own; `.metadata` has its file, offset and length. The
directories of these zips are read too: they record where in the zip the tensor is, and its CRC32.

With use_collectives=False each rank writes a `.metadata` of its own, `__0.metadata`, ..., and with
SerializationFormat.SAFETENSORS each `.distcp` is a safetensors file, whose DCP_SHARDING_INFO places its parts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from ...console.commands import typed
from ...console.words import listed_names
from ...errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from ..blocks import blocks_fault, read_whole, spec_of_blocks
from ..container import Check, Container, is_plain, listing, member, reading
from ..joined import join
from ..pickles.foreign import foreign_calls
from ..pickles.inert import as_name, as_text
from ..safetensors import is_safetensors, open_safetensors
from ..spec import Chunk, TensorSpec
from ..torch_files.items import Items, find_items
from ..torch_files.storages import LARGEST_PICKLE, TorchArchive
from .metadata import METADATA, Entry, Metadata, Place, merge_metadata, read_metadata

SUFFIX = ".distcp"

_LOCAL = re.compile(r"__(\d{1,6})\.metadata")
_HEAD = 16  # bytes
_FABRIC, _META = "meta.pt", "meta"


def is_dcp(path: Path) -> bool:
    """Whether a folder is one of torch.distributed.checkpoint, or what is left of one without its `.metadata`."""
    return path.is_dir() and any(name == METADATA or name.endswith(SUFFIX) for name in listing(path))


def open_dcp(path: Path, rebuilt: Metadata | None = None, opened: Mapping[str, BinaryIO] | None = None) -> Container:
    """Read the contents of a DCP folder: each tensor with its blocks, and values as inert content, nested as saved.

    `rebuilt` replaces a lost `.metadata` (core/containers/dcp/rebuilt.py); `opened` has the folder's files if they are
    already open.

    Raises: CheckpointNotFound when it is not one, CheckpointDamaged when files are missing, cut off or contradict
        `.metadata`, CheckpointError for what cannot be read here.
    """
    names = listing(path) if opened is None else opened
    if rebuilt is not None:
        folder = _Folder(path, rebuilt, {})
    elif opened is not None:
        data = read_whole(opened[METADATA], LARGEST_PICKLE, str(path / METADATA))
        folder = _Folder(path, read_metadata(data, str(path / METADATA)), {METADATA: len(data)}, opened)
    elif _are_safetensors(path, names):
        return _open_safetensors(path, names)
    elif metadata_names(names):
        folder = _Folder(path, *metadata_of(path))
    else:
        raise _without_metadata(path, [name for name in names if name.endswith(SUFFIX)])
    folder.read_items()
    folder.put_entries()
    whole = folder.whole
    surplus = [name for name in names if name.endswith(SUFFIX) and name not in whole.files and not folder.is_local]
    whole.notes += [f"{name}: {METADATA} names nothing in it. It may be of another save." for name in surplus]
    count = sum(name.endswith(SUFFIX) for name in whole.files)
    whole.kind, whole.foreign = f"DCP folder, {count} file{'s' * (count != 1)}", list(folder.foreign)
    if opened is None and _FABRIC in names and not whole.content.keys() & {_META}:
        _add_meta(whole)
    return whole


def _add_meta(whole: Container) -> None:
    """Add what Lightning's Fabric saved beside the shards: whatever of the state is not sharded."""
    from ..torch_files.container import open_torch_single

    try:
        join(whole, open_torch_single(member(whole.path, _FABRIC, str(whole.path))), _META)
    except CheckpointError as error:
        whole.caveats.append(f"its {_FABRIC} is left out: {error}")


def metadata_names(names: Iterable[str]) -> list[str]:
    """Of the names in a folder `.metadata`, or, where each rank wrote its own, `__0.metadata`, `__1.metadata`, ..."""
    names = list(names)
    local = {int(match[1]): name for name in names if (match := _LOCAL.fullmatch(name))}
    return [METADATA] if METADATA in names else [local[rank] for rank in sorted(local)]


def metadata_of(path: Path) -> tuple[Metadata, dict[str, int]]:
    """Read the `.metadata` of a folder, or those of all ranks; returns it with the size of each file in bytes.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointError as `read_metadata`.
    """
    parts, sizes = [], {}
    for name in metadata_names(listing(path)) or [METADATA]:
        where = str(path / name)
        with reading(member(path, name, where)) as file:
            data = read_whole(file, LARGEST_PICKLE, where)
        parts.append(read_metadata(data, where))
        sizes[name] = len(data)
    return (parts[0] if METADATA in sizes else merge_metadata(parts, str(path))), sizes


def _are_safetensors(path: Path, names: Iterable[str]) -> bool:
    first = next((name for name in names if name.endswith(SUFFIX)), None)
    if first is None:
        return False
    with reading(member(path, first, str(path))) as file:
        return is_safetensors(file.read(_HEAD))


def _open_safetensors(path: Path, names: Iterable[str]) -> Container:
    """Join the safetensors files of all ranks; `.metadata`, which has other offsets than they, is not needed."""
    from ..torch_shards import Piece, join_pieces, offsets_of

    whole = Container("", path, {}, {}, {})
    pieces: dict[str, list[Piece]] = {}
    for name in (name for name in names if name.endswith(SUFFIX)):
        part = open_safetensors(member(path, name, str(path)))
        begins = offsets_of(part, str(path / name))
        whole.files[name] = part.files[name]
        whole.checks += [replace(check, file=name) for check in part.checks]
        for held, spec in part.tensors.items():
            spec.file, spec.storage = name, f"{name}/{spec.storage}"
            pieces.setdefault(held, []).append(Piece(spec, begins.get(held)))
    whole.tensors = {held: join_pieces(held, found, str(path), None) for held, found in pieces.items()}
    whole.content = dict(whole.tensors)
    whole.kind = f"DCP folder, {len(whole.files)} file{'s' * (len(whole.files) != 1)} of safetensors"
    return whole


def _without_metadata(path: Path, names: list[str]) -> CheckpointError:
    """Make the error for a folder without `.metadata`."""
    if not names:
        return CheckpointNotFound(f"{path}: not a DCP folder: it has no {METADATA} and no *{SUFFIX} files.")
    count = 0
    for name in names:
        with reading(member(path, name, str(path))) as file:
            count += len(find_items(file, str(path / name)))
    return CheckpointDamaged(
        f"{path / METADATA}: missing. The {SUFFIX} files ({len(names)}) hold {count} whole items, but only {METADATA} "
        "has their names and their positions in their tensors. Copy it from where the folder was written, or let "
        f"{typed('convert_checkpoints.py')} rebuild it: --metadata_from names the folder of another step that the same "
        "program wrote on as many ranks, or a torch file of the model (its tensors in the order of the modules)."
    )


class _Folder:
    """A DCP folder while it is read."""

    def __init__(
        self, path: Path, metadata: Metadata, sizes: dict[str, int], opened: Mapping[str, BinaryIO] | None = None
    ) -> None:
        self.path, self.metadata, self.opened = path, metadata, opened
        self.is_local = bool(sizes) and METADATA not in sizes  # each rank wrote its own: copies are no item of ours
        self.whole = Container("", path, {}, {}, {}, notes=list(metadata.notes))
        for name, size in sizes.items():
            self.whole.files[name] = size
            self.whole.checks.append(Check(name, 0, size, None, ("names, shapes and places of all items",)))
        self.foreign = dict.fromkeys(metadata.foreign)
        self.items: dict[tuple[str, int], TorchArchive] = {}  # by file and offset

    def read_items(self) -> None:
        """Open every item, file by file in the order of their bytes."""
        by_file, items = self.metadata.by_file(), Items()
        missing = [name for name in by_file if is_plain(name) and not self.has(name)]
        if missing:
            count = sum(len(by_file[name]) for name in missing)
            raise CheckpointDamaged(
                f"{self.path / METADATA}: {len(missing)} of its {len(by_file)} files are missing, with {count} items: "
                f"{as_text(sorted(missing))}. Copy them again."
            )
        for name, places in sorted(by_file.items()):
            self.read_file(name, places, items)

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name) if self.opened is None else name in self.opened

    def reading(self, name: str) -> AbstractContextManager[BinaryIO]:
        if self.opened is not None:
            return nullcontext(self.opened[name])
        return reading(member(self.path, name, str(self.path / METADATA)))

    def read_file(self, name: str, places: list[tuple[Place, Entry]], items: Items) -> None:
        """Open the items of one file."""
        where = str(self.path / name)
        end = between = 0
        with self.reading(name) as file:
            size = self.whole.files[name] = file.seek(0, os.SEEK_END)
            for place, entry in places:
                shown = f"{where}: {as_name(entry.name)}"
                begin, between = place.offset, between + place.offset - end
                if begin < end:
                    raise CheckpointDamaged(f"{shown} begins at byte {begin}, the item before it ends at {end}.")
                end = begin + place.length
                if end > size:
                    raise CheckpointDamaged(
                        f"{shown} ends at byte {end} by {METADATA}, the file at {size}. It was cut off, or is of "
                        "another save."
                    )
                self.items[name, begin] = items.open(file, begin, place.length, shown)
        if between + size - end and not self.is_local:
            self.whole.notes.append(f"{name}: {between + size - end} of its {size} bytes belong to no item.")

    def put_entries(self) -> None:
        """Give each entry its spec or value, nested as saved."""
        branches: dict[tuple[str | int, ...], dict[str | int, Any]] = {(): {}}
        for entry in self.metadata.entries:
            for depth, key in enumerate(entry.path):
                branch, under = branches[entry.path[:depth]], entry.path[: depth + 1]
                last = depth + 1 == len(entry.path)
                if key in branch and (last or under not in branches):
                    raise CheckpointDamaged(
                        f"{self.path / METADATA}: {as_name(entry.name)} belongs at {as_text(entry.path, 80)}, where "
                        "something else is."
                    )
                if last:
                    branch[key] = self.tensor(entry) if entry.dtype else self.value(entry)
                elif key not in branch:
                    branch[key] = branches[under] = {}
        for at, branch in reversed(branches.items()):  # the innermost first
            if at and branch.keys() == set(range(len(branch))):
                branches[at[:-1]][at[-1]] = [branch[i] for i in range(len(branch))]
        self.whole.content = branches[()]

    def tensor(self, entry: Entry) -> Any:
        """The spec of a tensor from its blocks, or a record when they are not plain tensors."""
        assert entry.dtype
        if fault := blocks_fault(entry.shape, [(place.begin, place.shape) for place in entry.places]):
            if self.is_local:
                here = listed_names([name for name in self.whole.files if not name.endswith(SUFFIX)], 5)
                fault += f". It has what {here} tell of; copy the files of all ranks into the folder"
            raise CheckpointDamaged(f"{self.path / METADATA}: {as_name(entry.name)}: {fault}.")
        chunks = []
        for place in entry.places:
            item = self.items[place.file, place.offset]
            spec = item.content
            if item.unused or not isinstance(spec, TensorSpec):
                self.foreign |= dict.fromkeys(foreign_calls([spec, *item.unused]))
            if not isinstance(spec, TensorSpec):
                self.whole.notes.append(f"{as_name(entry.name)} is {as_text(spec, 80)}, not a plain tensor: left out.")
                return spec
            if (spec.dtype, spec.shape) != (entry.dtype, place.shape):
                raise CheckpointDamaged(
                    f"{self.path / place.file}: {as_name(entry.name)} at {place.begin} is {spec.dtype} {spec.shape}, "
                    f"{METADATA} says {entry.dtype} {place.shape}."
                )
            self.check(place.file, item, {f"data/{spec.storage}": (entry.name,)})
            chunks.append(Chunk(place.file, spec.offset, spec.nbytes, place.begin, place.shape, spec.strides))
        return self.named(spec_of_blocks(entry.name, entry.dtype, entry.shape, chunks, entry.name))

    def value(self, entry: Entry) -> Any:
        """The content of a torch zip of anything else; tensors in it are named after it."""
        (place,) = entry.places
        item = self.items[place.file, place.offset]
        names: dict[str, tuple[str, ...]] = {}
        for path, spec in item.tensors.items():
            spec.name = f"{entry.name}.{path}" if path else entry.name
            record = f"data/{spec.storage}"
            names[record] = (*names.get(record, ()), spec.name)
            spec.file, spec.storage = place.file, f"{entry.name}/{spec.storage}"
            self.named(spec)
        self.foreign |= dict.fromkeys(foreign_calls([item.content, *item.unused]))
        self.check(place.file, item, names)
        return item.content

    def named(self, spec: TensorSpec) -> TensorSpec:
        if spec.name in self.whole.tensors:
            raise CheckpointDamaged(f"{self.path / METADATA}: two tensors are called {as_text(spec.name, 80)}.")
        self.whole.tensors[spec.name] = spec
        return spec

    def check(self, file: str, item: TorchArchive, names: dict[str, tuple[str, ...]]) -> None:
        """List the records of an item that hold tensors; the others were checked when it was opened."""
        for short, held in names.items():
            record = item.records[short]
            self.whole.checks.append(Check(file, record.offset, record.size, record.checksum, held))
