"""One bundle: open it whole, check it, write its files. What is newest and what is kept is the folder's business."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from core.checksum import crc32_file, crc32_range
from core.commit import CONFIG, MODEL, ModelFolder, Opened
from core.config import GPTConfig
from core.containers.torch_file import open_torch_file
from core.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointNotFound
from core.evolution import Evidence, evolve
from core.families.recognise import recognise
from core.lineage import order
from core.part import WEIGHTS_KEYS, Part, TorchFile
from core.storage import DISK, Output, Storage
from core.training_state import STATE, check_version, dump_json, parse_json, seal, unseal

OPTIMIZER = "optimizer.pt"
TOKENIZER = "tokenizer.json"


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
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}

    @property
    def has_optimizer(self) -> bool:
        """Whether an optimizer state belongs to this step."""
        return self.optimizer is not None and self.state.get("optimizer_file", OPTIMIZER) is not None

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
    if CONFIG not in opened.files or MODEL not in opened.files:
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
    weights = Part(TorchFile(opened.files[MODEL], opened.folder / MODEL), WEIGHTS_KEYS)
    optimizer = opened.files.get(OPTIMIZER)
    moments = Part(TorchFile(optimizer, opened.folder / OPTIMIZER)) if optimizer else None
    return Bundle(opened.folder, opened.state, values, tokenizer, opened.files, weights, moments)


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


def verify(bundle: Bundle, names: tuple[str, ...] = (MODEL, TOKENIZER, OPTIMIZER)) -> list[str]:
    """Check files of a bundle against their checksums, and return a sentence for each that was replaced since.

    A replaced file is whole by its own checksums but not the recorded one. Files of old bundles, which recorded
    nothing, are checked by the CRC32 that each zip record carries.

    Raises: CheckpointDamaged naming the tensor, with both checksums.
    """
    if bundle.single:
        verify_records(bundle.files[bundle.single], bundle.path(bundle.single))
        return []
    recorded = bundle.state.get("integrity", {}).get("files", {})
    replaced = []
    for name in names:
        if name not in bundle.files or (name == TOKENIZER and name not in recorded):
            continue
        file, path = bundle.files[name], bundle.path(name)
        size = os.fstat(file.fileno()).st_size
        if name in recorded:
            expected = recorded[name]
            crc = f"{crc32_file(file.fileno(), size):08x}" if size == expected["size"] else None
            if crc == expected["crc32"]:
                continue
            if name == TOKENIZER:
                raise CheckpointDamaged(
                    f"{path} is damaged ({size} bytes, CRC32 {crc or 'not compared'}; "
                    f"recorded {expected['size']} bytes, {expected['crc32']})."
                )
            verify_records(file, path)
            replaced.append(
                f"{path}: whole, but not the file that was saved at step {bundle.step} "
                f"({size} bytes; recorded {expected['size']}). It was replaced, and is used as it is."
            )
        else:
            verify_records(file, path)
    return replaced


def verify_records(file: BinaryIO, path: Path) -> None:
    """Check every record of a torch file against the CRC32 in its directory; the old stream format recorded none.

    Raises: CheckpointDamaged naming the tensors whose bytes differ.
    """
    try:
        archive = open_torch_file(file, str(path))
    except CheckpointError as error:
        raise CheckpointDamaged(str(error)) from error
    for record in archive.records.values():
        if not (record.stored and record.crc32):
            continue
        found = crc32_range(file.fileno(), record.offset, record.offset + record.size)
        if found != record.crc32:
            key = record.name.rpartition("/data/")[2]
            names = [t.name for t in archive.tensors.values() if t.storage == key] or [record.name]
            raise CheckpointDamaged(
                f"{path}: {', '.join(names[:3])} is damaged (CRC32 {found:08x}, recorded {record.crc32:08x})."
            )


Writer = Callable[[Output], str | None]
"""Writes the content of a file, and returns the digest of its tensors where it has any."""


def write_bundle(folder: ModelFolder, stage: Path, state: dict[str, Any], files: dict[str, Writer | dict]) -> None:
    """Write the files of one step into a staged folder, each durable, the training state with their checksums last."""
    recorded = {}
    for name, content in files.items():
        tensors = None
        with folder.storage.create(stage / name) as output:
            if isinstance(content, dict):
                output.write(dump_json(content))
            else:
                tensors = content(output)
        recorded[name] = {"size": output.size, "crc32": f"{output.crc32:08x}"}
        if tensors is not None:
            recorded[name]["tensors"] = tensors
    folder.storage.write(stage / STATE, seal({**state, "integrity": {"files": recorded}}))
