"""One bundle: open it whole, check it, write its files. What is newest and what is kept is the folder's business."""

from __future__ import annotations

import contextlib
import functools
import os
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..config.gpt import GPTConfig
from ..containers.checksum import crc32_file, crc32_range
from ..containers.dcp.metadata import METADATA
from ..containers.json_files import dump_json, parse_json
from ..containers.torch_files.file import open_torch_file
from ..containers.torch_files.stream import TorchStream
from ..containers.torch_files.zip import TorchZip
from ..errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointNotFound
from ..families.recognise import recognise
from .commit import CONFIG, MODEL, ModelFolder, Opened
from .evolution import Evidence, evolve
from .folder import shown
from .lineage import order
from .parts import WEIGHTS_KEYS, Part, TorchFile
from .sharded_part import ShardedFile, files_of, folder_of
from .storage import DISK, Output, Storage
from .tokenizer_state import proves_itself
from .training_state import STATE, check_version, seal, unseal

OPTIMIZER = "optimizer.pt"
TOKENIZER = "tokenizer.json"
EMA = "ema.pt"

ALL_PARTS = (MODEL, TOKENIZER, OPTIMIZER, EMA)
FOR_INFERENCE = (MODEL, TOKENIZER)
"""The files that a load verifies: those it reads, and no others."""


@dataclass
class Bundle:
    """One step on disk, its files open: nothing that happens to the folder later changes what is read.

    A single-file checkpoint is a bundle too, of which every part lies in that one file, the `single`.
    """

    folder: Path
    state: dict[str, Any]
    config_values: dict[str, Any]
    tokenizer: dict[str, Any] | None
    files: dict[str, BinaryIO]
    weights: Part
    optimizer: Part | None
    single: str | None = None
    ema: Part | None = None

    @functools.cached_property
    def evidence(self) -> Evidence:
        """What the header of the weights shows: their family, and their shapes under our names.

        Raises: CheckpointDamaged when it cannot be read, CheckpointMismatch when its tensors do not fit together.
        """
        where, shapes = self.weights.source.path, self.weights.shapes
        try:
            plan = recognise(shapes)
            return Evidence(plan, plan.shapes(shapes))
        except CheckpointMismatch as error:
            raise CheckpointMismatch(f"{where}: {error}.") from error

    @functools.cached_property
    def config(self) -> GPTConfig | None:
        """The config, what it lacks filled in from the weights; None for a module that is no GPT.

        Raises: CheckpointMismatch for a wrong type or an impossible value, and as `evidence`.
        """
        if self.config_values.get("model_class", "GPT") != "GPT":
            return None
        return evolve(self.config_values, self.evidence, str(self.path(CONFIG)))

    @property
    def step(self) -> int:
        """Optimizer updates made; 0 where no training state says."""
        return int(self.state.get("step", 0))

    @property
    def is_sharded(self) -> bool:
        """Whether its weights lie in shards."""
        return isinstance(self.weights.source, ShardedFile)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}

    @property
    def has_optimizer(self) -> bool:
        """Whether an optimizer state belongs to this step."""
        return self.optimizer is not None and self.state.get("optimizer_file", OPTIMIZER) is not None

    def averaged(self) -> Bundle:
        """This step with the average of its weights in their place; its files are the same open ones.

        Raises: CheckpointNotFound when none was kept.
        """
        if self.ema is None:
            raise CheckpointNotFound(
                f"{self.path(EMA)}: step {self.step} has no average of its weights: it was trained without --ema."
            )
        return replace(self, weights=self.ema)

    def path(self, name: str) -> Path:
        """Where a file of this bundle is found by name, for messages."""
        return self.folder / (self.single or name)

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Kept:
    """One older step in a model's folder; its state is empty where it cannot be read."""

    step: int
    path: Path
    state: dict[str, Any]

    @property
    def order(self) -> int:
        """Its place among the commits of its branch."""
        return order({"step": self.step, **self.state})


def open_bundle(folder: Path, step: int | None = None, storage: Storage = DISK) -> Bundle:
    """Open the newest committed bundle of a model's folder, or one of its kept steps, or a folder that is a bundle.

    Raises: CheckpointNotFound when no bundle is here, CheckpointDamaged when a listed file is missing or a JSON file
    cannot be read, CheckpointMismatch for an impossible config or a newer format.
    """
    place = ModelFolder(folder, storage)
    opened = place.open_newest() if step is None else _open_step(place, step)
    try:
        return _bundle(opened, folder)
    except BaseException:
        opened.close()
        raise


def _open_step(place: ModelFolder, step: int) -> Opened:
    with contextlib.suppress(CheckpointDamaged):
        opened = place.open_newest()
        if opened.state.get("step") == step:
            return opened
        opened.close()
    return place.open_step(step)


def _bundle(opened: Opened, folder: Path) -> Bundle:
    weights, optimizer = _part(opened, MODEL, WEIGHTS_KEYS), _part(opened, OPTIMIZER)
    if CONFIG not in opened.files or weights is None:
        names = ModelFolder(folder).storage.names(folder)
        there = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
        raise CheckpointNotFound(
            f"{folder}: no checkpoint here. Looked for {CONFIG} + {MODEL} (bundle), latest.pt or final.pt (single "
            f"file); found {there}."
            if folder.exists()
            else f"{folder}: no such folder."
        )
    where = str(opened.folder / CONFIG)
    try:
        values = _read_json(opened, CONFIG)
    except CheckpointDamaged as error:
        # People edit this file: a slip of theirs is theirs to mend, not damage to walk back from.
        raise CheckpointMismatch(f"{error} Mend it, or copy the one of a kept step.") from error
    check_version(values, where)
    tokenizer = _read_json(opened, TOKENIZER) if TOKENIZER in opened.files else None
    ema = _part(opened, EMA)
    return Bundle(opened.folder, opened.state, values, tokenizer, opened.files, weights, optimizer, ema=ema)


def _part(opened: Opened, name: str, keys: tuple[str, ...] = ()) -> Part | None:
    """The torch file of this name, or the folder of shards in its place."""
    if name in opened.files:
        return Part(TorchFile(opened.files[name], opened.folder / name), keys)
    folder = folder_of(name)
    files = {file.removeprefix(f"{folder}/"): opened.files[file] for file in files_of(name, opened.files)}
    return Part(ShardedFile(files, opened.folder / folder)) if METADATA in files else None


def _read_json(opened: Opened, name: str) -> dict[str, Any]:
    file = opened.files[name]
    file.seek(0)
    return parse_json(file.read(), str(opened.folder / name))


def history(folder: Path, storage: Storage = DISK) -> list[Kept]:
    """List the kept steps of a model, in the order they were committed in."""
    kept = []
    for step, path in ModelFolder(folder, storage).kept_steps().items():
        state: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, CheckpointDamaged):
            state = unseal(storage.read(path / STATE), str(path / STATE))
        kept.append(Kept(step, path, state))
    return sorted(kept, key=lambda step: step.order)


def verify(bundle: Bundle, names: tuple[str, ...] = ALL_PARTS) -> list[str]:
    """Check files of a bundle against their checksums, and return a sentence for each that was replaced since.

    A replaced file is whole by its own checksums but not the recorded one. Files of old bundles, which recorded
    nothing, are checked by the CRC32 that each zip record carries. Of a single file the parts that go by these names
    are checked.

    Raises: CheckpointDamaged naming the tensor, with both checksums.
    """
    if bundle.single:
        unused = bundle.optimizer if OPTIMIZER not in names else None
        verify_records(bundle.files[bundle.single], bundle.path(bundle.single), _storages_alone(unused, bundle.weights))
        return []
    recorded = bundle.state.get("integrity", {}).get("files", {})
    replaced = []
    for name in [file for part in names for file in files_of(part, bundle.files)]:
        if name not in bundle.files:
            continue
        file, path, expected = bundle.files[name], bundle.path(name), recorded.get(name)
        if expected is None:
            if name != TOKENIZER and "/" not in name:
                verify_records(file, path)
            continue
        size = os.fstat(file.fileno()).st_size
        crc = f"{crc32_file(file.fileno(), size):08x}" if size == expected["size"] else None
        if crc == expected["crc32"]:
            continue
        found = (
            f"{size} bytes; recorded {expected['size']}"
            if crc is None
            else f"CRC32 {crc}, recorded {expected['crc32']}"
        )
        if "/" in name:
            raise _damaged_shard(bundle, name, found)
        if name == TOKENIZER:
            if not proves_itself(bundle.tokenizer):
                raise CheckpointDamaged(f"{path} is damaged ({found}).")
            same = False
        else:
            same = expected.get("tensors") == tensors_digest(verify_records(file, path))
        replaced.append(f"{path}: {_what_differs(crc, same, expected)} ({found}). It is used as it is.")
    return replaced


def _what_differs(crc: str | None, same: bool, expected: Mapping[str, Any]) -> str:
    """Say what a file is that is whole, but not the recorded one; without a CRC32 it has another size."""
    if same and crc is not None:
        return "every tensor is bit for bit what was saved, but a byte in its headers or its padding is not"
    if same:
        return "written anew since it was saved, with every tensor bit for bit the same"
    if crc is not None and "tensors" not in expected and "size" in expected:
        return "whole, but not the file that was saved: it was replaced, or a bit flipped between its tensors"
    return "whole, but not the file that was saved: it was replaced"


def _storages_alone(unused: Part | None, used: Part) -> set[str]:
    """The storages of a part that another part of the same file does not share."""
    return (
        {t.storage for t in unused.tensors.values()} - {t.storage for t in used.tensors.values()} if unused else set()
    )


def _damaged_shard(bundle: Bundle, name: str, found: str) -> CheckpointDamaged:
    folder, _, file = name.partition("/")
    names: list[str] = []
    for part in (bundle.weights, bundle.optimizer):
        if part is not None and isinstance(part.source, ShardedFile) and part.source.path.name == folder:
            with contextlib.suppress(CheckpointError):  # it is too damaged to say where
                names = part.source.damaged(file)
    what = f"{', '.join(names[:3])} is damaged" if names else "damaged"
    return CheckpointDamaged(f"{shown(bundle.path(name))}: {what} ({found}).")


def verify_records(file: BinaryIO, path: Path, unused: Container[str] = ()) -> TorchZip | TorchStream:
    """Check every record of a torch file against the CRC32 in its directory, but for storages that are not used.

    The old stream format recorded none. Returns the header.

    Raises: CheckpointDamaged naming the tensors whose bytes differ.
    """
    try:
        archive = open_torch_file(file, str(path))
    except CheckpointError as error:
        raise CheckpointDamaged(str(error)) from error
    for record in archive.records.values():
        key = record.name.rpartition("/data/")[2]
        if not (record.stored and record.crc32) or key in unused:
            continue
        found = crc32_range(file.fileno(), record.offset, record.offset + record.size)
        if found != record.crc32:
            names = [t.name for t in archive.tensors.values() if t.storage == key] or [record.name]
            raise CheckpointDamaged(
                f"{path}: {', '.join(names[:3])} is damaged (CRC32 {found:08x}, recorded {record.crc32:08x})."
            )
    return archive


def tensors_digest(archive: TorchZip | TorchStream) -> str:
    """CRC32 of the CRC32s of the storages of a torch file, in their order: what `integrity` records as `tensors`."""
    digest = 0
    for record in archive.records.values():
        if "/data/" in record.name:
            digest = zlib.crc32(record.crc32.to_bytes(4, "little"), digest)
    return f"{digest:08x}"


class InBlocks(Protocol):
    """A file that is written block by block: memory, where its bytes begin in the file, how many they are."""

    size: int

    def blocks(self) -> Iterator[tuple[memoryview, int, int]]:
        """Give the blocks in order, each for the duration of a turn."""

    @property
    def recorded(self) -> dict[str, Any]:
        """What the training state says of the file, once it is written."""


Writer = Callable[[Output], str | None]
"""Writes a file, and returns the digest of its tensors where it has any."""

Content = Writer | InBlocks | dict[str, Any]
"""What a file of a step is made of; a dict becomes JSON."""


def write_bundle(folder: ModelFolder, stage: Path, state: dict[str, Any], files: Mapping[str, Content]) -> None:
    """Write the files of one step into a staged folder, each durable, the training state with their checksums last."""
    recorded = {name: write_file(folder.storage, stage / name, content) for name, content in files.items()}
    folder.storage.write(stage / STATE, seal({**state, "integrity": {"files": recorded}}))


def write_file(storage: Storage, path: Path, content: Content) -> dict[str, Any]:
    """Write a new file, durably, and return what the training state says of it."""
    if not isinstance(content, dict) and not callable(content):
        with storage.create_blocks(path, content.size) as file:
            for block, start, length in content.blocks():
                file.write(block, start, length)
        return content.recorded
    digest = None
    with storage.create(path) as output:
        if isinstance(content, dict):
            output.write(dump_json(content))
        else:
            digest = content(output)
    entry = {"size": output.size, "crc32": f"{output.crc32:08x}"}
    return entry if digest is None else {**entry, "tensors": digest}
