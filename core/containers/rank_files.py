"""Open a folder in which each rank saved its part: model_rank00000.pt, model_rank00001.pt, ... with DTensors in them.

verl's names are model_world_size_2_rank_0.pt, model_world_size_2_rank_1.pt; those of others end in rank_0.pth, ...

A DTensor, or a ShardedTensor of FSDP1, records which part of the whole its rank has. Any other value exists once for
each rank; the first is used.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..console.words import listed_names
from ..errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from .blocks import blocks_fault, spec_of_blocks
from .container import Check, Container, listing, member, reading
from .dcp.dtensor import Shard, foreign_within, shards_of
from .joined import join, read_json
from .pickles.inert import Call, as_name
from .spec import Chunk, TensorSpec
from .torch_files.container import record_checks
from .torch_files.file import open_torch_file
from .torch_files.storages import TorchArchive
from .trees import map_paths

_RANK_FILE = re.compile(r"(\w+)_(?:rank(?=\d{5}\.)|world_size_(\d{1,5})_rank_)(\d{1,5})\.pt")
_OTHER = re.compile(r"(.+?)()[._]rank_?(\d{1,5})\.(?:pt|pth|bin|ckpt)")
"""Names that files of another kind may have too: they are parts where nothing else in the folder could be the model."""

_GRID = re.compile(r"(?:^|[._-])(?:rank|[mtp]p)[._-]?\d")
"""In a stem: the files are of a grid of ranks (tp_rank_0_pp_rank_1.pt), which cut tensors in other ways."""

_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_OPTIMIZER = "optim"
_CONFIG = "huggingface/config.json"
"""Where verl leaves the config of the model."""

_MOST_NAMED = 5


class PlainParts(CheckpointError):
    """Files of ranks that differ, and do not say which part of the whole each has."""


def rank_files(folder: Path) -> dict[str, dict[int, str]]:
    """The files that ranks saved into a folder, by their content ("model", "optimizer") and rank.

    Raises: CheckpointNotFound when they are of several saves.
    """
    names = [name for name, size in listing(folder).items() if size is not None]
    matches = [match for name in names if (match := _RANK_FILE.fullmatch(name))]
    if not matches:
        matches = [match for name in names if (match := _OTHER.fullmatch(name)) and not _GRID.search(match[1])]
        others = len(matches) < sum(name.endswith(_WEIGHTS) for name in names)
        if others or not any(int(match[3]) == 0 for match in matches):
            return {}
    found: dict[str, dict[int, str]] = {}
    sets: dict[str, dict[str, None]] = {}  # of files that are alike but for a count, by the names without it
    for match in matches:
        stem = match[1]
        found.setdefault(stem, {})[int(match[3])] = match[0]
        sets.setdefault(re.sub(r"\d+", "0", stem), {})[_of_all_ranks(match[0])] = None
    for alike in sets.values():
        if len(alike) > 1:
            raise CheckpointNotFound(
                f"{folder}: holds {len(alike)} sets of rank files, {listed_names(sorted(alike), _MOST_NAMED)}. Move "
                "the files of all but one to another folder."
            )
    return found


def _of_all_ranks(name: str) -> str:
    """The name of a rank's file with a * in the place of its rank."""
    return _renamed(name, lambda rank: "*")


def _renamed(name: str, other: Callable[[str], str]) -> str:
    match = _RANK_FILE.fullmatch(name) or _OTHER.fullmatch(name)
    assert match
    return name[: match.start(3)] + other(match[3]) + name[match.end(3) :]


def open_rank_files(path: Path) -> Container:
    """Read the files of all ranks: each tensor complete, in blocks; everything else from the first rank.

    Tensors keep their names, with the prefix `model.` or `optimizer.` when there are several kinds of files.

    Raises: CheckpointNotFound when there are none, CheckpointDamaged when the files of needed ranks are missing or
        contradict each other, CheckpointError for parts that cannot be assembled here.
    """
    found = rank_files(path)
    if not found:
        raise CheckpointNotFound(f"{path}: no rank files here, expected model_rank00000.pt and the like.")
    parts, notes = {}, []
    for stem, names in found.items():
        try:
            parts[stem] = open_ranks(path, stem, names)
        except PlainParts as error:
            if len(found) == 1 or not stem.startswith(_OPTIMIZER):
                raise
            notes.append(f"not joined: {error}")
    if len(found) == 1:
        (whole,) = parts.values()
        _add_config(whole)
        return whole
    counts = sorted({len(names) for names in found.values()})
    whole = Container(f"files of {' or '.join(map(str, counts))} ranks", path, {}, {}, {}, notes=notes)
    for stem, part in parts.items():
        join(whole, part, stem)
    _add_config(whole)
    return whole


def _add_config(whole: Container) -> None:
    """Add the config that lies in a folder beside the files."""
    if isinstance(whole.content, dict) and "config" not in whole.content and (whole.path / _CONFIG).is_file():
        whole.content["config"] = read_json(whole.path, _CONFIG, whole.files)


def open_ranks(path: Path, stem: str, names: dict[int, str]) -> Container:
    """Read the files of one kind; `names` has the file of each rank."""
    ranks = _Ranks(path, stem)
    for rank in sorted(names):
        ranks.read(rank, names[rank])
    return ranks.joined()


@dataclass
class _Part:
    """One rank's part of a tensor: a shard, or the whole tensor."""

    file: str
    shard: Shard | None
    local: TensorSpec
    crc32: int

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A key that copies on several ranks share; an empty shard may begin where a full one does."""
        return (self.shard.begin, self.local.shape) if self.shard else ((), ())

    def chunk(self) -> Chunk:
        begin, local = self.place[0], self.local
        return Chunk(self.file, local.offset, local.nbytes, begin, local.shape, local.strides)


@dataclass
class _Ranks:
    """The files of one kind while they are read."""

    path: Path
    stem: str
    parts: dict[str, list[_Part]] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    foreign: dict[str, None] = field(default_factory=dict)
    content: Any = None

    def read(self, rank: int, name: str) -> None:
        """Read the file of one rank."""
        where = str(self.path / name)
        with reading(member(self.path, name, where)) as file:
            archive = open_torch_file(file, where)
            self.sizes[name] = file.seek(0, os.SEEK_END)
        if archive.container != "zip":
            raise CheckpointError(f"{where}: torch's old stream format; expected a zip, as ranks write it.")
        shards: dict[str, list[Shard]] = {}

        def collect(held: str, call: Call) -> Any:
            if (found := shards_of(call, f"{where}: {as_name(held)}")) is not None:
                shards[held] = found
            return call

        map_paths(collect, archive.content)
        for held in archive.tensors:  # in the order of the file, which is that of the modules
            self.parts.setdefault(_owner(held, shards), [])
        in_record: dict[str, list[str]] = {}
        for held, shard in ((held, shard) for held, found in shards.items() for shard in found):
            self.add(held, name, shard, shard.local, archive)
            in_record.setdefault(f"data/{shard.local.storage}", []).append(held)
        for held, spec in archive.tensors.items():
            if _owner(held, shards) == held:
                self.add(held, name, None, spec, archive)
                in_record.setdefault(f"data/{spec.storage}", []).append(held)
                spec.file, spec.storage = name, f"{name}/{spec.storage}"
        self.checks += record_checks(archive.records, name, in_record, f"{name}: ")
        self.foreign |= dict.fromkeys(foreign_within([archive.content, *archive.unused]))
        self.content = self.content if self.files else archive.content
        self.files[rank] = name

    def add(self, name: str, file: str, shard: Shard | None, local: TensorSpec, archive: TorchArchive) -> None:
        record = archive.records[f"data/{local.storage}"]
        parts = self.parts.setdefault(name, [])
        parts.append(_Part(file, shard, local, record.crc32))
        first = parts[0]
        same = (first.shard is None) == (shard is None) and first.local.dtype == local.dtype
        if not same or (shard and first.shard and shard.shape != first.shard.shape):
            raise CheckpointDamaged(
                f"{self.path / file}: {as_name(name)} is {_described(parts[-1])}, in {first.file} it is "
                f"{_described(first)}. The files are of different saves."
            )

    def joined(self) -> Container:
        """Assemble each tensor from its parts."""
        tensors: dict[str, TensorSpec] = {}
        faults: list[str] = []
        differing: dict[str, None] = {}
        for name, parts in self.parts.items():
            if not parts:
                faults.append(f"{as_name(name)}: no rank has a part of it")
                continue
            first = parts[0]
            copies: dict[Any, _Part] = {}
            for part in parts:
                copy = copies.setdefault(part.place, part)
                if (part.crc32, part.local.shape) != (copy.crc32, copy.local.shape):
                    differing[name] = None
            if first.shard is None:
                tensors[name] = first.local
                continue
            chunks = [part.chunk() for part in copies.values()]
            shape = first.shard.shape
            if fault := blocks_fault(shape, [(chunk.begin, chunk.shape) for chunk in chunks]):
                faults.append(f"{as_name(name)}: {fault}")
            else:
                storage = f"{first.file}/{first.local.storage}"
                tensors[name] = spec_of_blocks(name, first.local.dtype, shape, chunks, storage)
        notes = self.missing(faults)
        if differing:
            names = listed_names(list(differing), _MOST_NAMED)
            sharded = any(part.shard for parts in self.parts.values() for part in parts)
            is_usual = _RANK_FILE.fullmatch(self.files[min(self.files)]) and not self.stem.startswith(_OPTIMIZER)
            if not sharded and not is_usual:
                raise PlainParts(
                    f"{self.path}: the files of {len(self.files)} ranks ({self.label}), which cannot be joined here: "
                    f"they differ in {names}, and nothing records which part of the whole each is. Join them with the "
                    "program that wrote them; if each has the whole model, copy one to a folder of its own."
                )
            notes.append(f"{self.label}: {names}: ranks have copies that differ. The first rank's count.")
        content = map_paths(
            lambda held, value: tensors.get(held, value) if isinstance(value, Call) else value, self.content
        )
        kind = f"files of {len(self.files)} rank{'s' * (len(self.files) != 1)}"
        return Container(kind, self.path, tensors, content, self.sizes, self.checks, list(self.foreign), notes)

    @property
    def label(self) -> str:
        """A pattern of the names of its files: `model_rank*.pt`."""
        return _of_all_ranks(self.files[min(self.files)])

    def missing(self, faults: list[str]) -> list[str]:
        """Note the ranks whose files are missing, or refuse when their parts are needed."""
        meshes = [part.shard.ranks for parts in self.parts.values() for part in parts if part.shard]
        world = max([*meshes, *(rank + 1 for rank in self.files)])
        count = world - len(self.files)
        gone = itertools.islice((rank for rank in range(world) if rank not in self.files), _MOST_NAMED + 1)
        first = self.files[min(self.files)]
        names = listed_names([_name_of(rank, first) for rank in gone], _MOST_NAMED, count)
        said = f"{names} missing, {len(self.files)} of {world} ranks are here"
        if faults and count:
            raise CheckpointDamaged(
                f"{self.path}: {said}. {len(faults)} tensors lack parts, first {faults[0]}. Copy all files."
            )
        if faults:
            raise CheckpointDamaged(f"{self.path}: {self.label}: {faults[0]}.")
        return [f"{said}; nothing is lost with them."] if count else []


def _name_of(rank: int, like: str) -> str:
    """The name of a rank's file, as another rank's is called."""
    return _renamed(like, lambda of: f"{rank:0{len(of) if of.startswith('0') else 1}}")


def _owner(name: str, shards: dict[str, list[Shard]]) -> str:
    """The sharded tensor whose record holds a tensor, or the tensor itself."""
    starts = (name[: match.start()] for match in re.finditer(r"\.args\.", name))
    return next((start for start in starts if start in shards), name)


def _described(part: _Part) -> str:
    if part.shard is None:
        return f"a plain {part.local.dtype} tensor"
    return f"a part of {part.local.dtype} {part.shard.shape}"
