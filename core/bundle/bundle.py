"""One bundle: open it whole, check it, write its files. Which step is newest and which are kept is up to the folder."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..config.gpt import GPTConfig
from ..containers.dcp.metadata import METADATA
from ..containers.json_files import parse_json, read_json
from ..errors import CheckpointDamaged, CheckpointMismatch, CheckpointNotFound
from ..families.fused import recognise
from .commit import CONFIG, MODEL, ModelFolder, OpenStep
from .evolution import Evidence, evolve, old_settings
from .folder import step_folder
from .names import missing_model
from .parts import WEIGHTS_KEYS, Part, ShardedFile, TorchFile, files_of, folder_of
from .storage import DISK, Storage
from .training_state import STATE, TrainingState, check_version, unseal

OPTIMIZER = "optimizer.pt"
TOKENIZER = "tokenizer.json"
EMA = "ema.pt"
ALSO = "also.pt"

ALL_PARTS = (MODEL, TOKENIZER, OPTIMIZER, EMA, ALSO)
FOR_INFERENCE = (MODEL, TOKENIZER)
"""The files that a load verifies: only those that it reads."""


@dataclass
class Bundle:
    """One step on disk, its files open: nothing that happens to the folder later changes what is read.

    A single-file checkpoint is a bundle too: all of its parts lie in that one file, the `single`.
    """

    folder: Path
    state: TrainingState
    config_values: dict[str, Any]
    tokenizer: dict[str, Any] | None
    files: dict[str, BinaryIO]
    weights: Part
    optimizer: Part | None
    single: str | None = None
    ema: Part | None = None
    also: Part | None = None

    @functools.cached_property
    def evidence(self) -> Evidence:
        """What the header of the weights shows: their family, and their shapes under this project's names.

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
        """The config, with missing fields filled in from the weights; None for a module that is not a GPT.

        Raises: CheckpointMismatch for a wrong type or an impossible value, and as `evidence`.
        """
        if self.config_values.get("model_class", "GPT") != "GPT":
            return None
        return evolve(self.config_values, self.evidence, str(self.path(CONFIG)))

    @property
    def step(self) -> int:
        """Optimizer updates made; 0 where no training state records them."""
        return self.state.step or 0

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its run, by the names of flags; for an old program, those that its optimizer state shows."""
        recorded = self.state.training
        if recorded or self.optimizer is None or self.config is None:
            return recorded or {}
        return old_settings(self.optimizer.content)

    def refuse_partial(self) -> None:
        """Raise CheckpointMismatch for a step that holds only what was trained, and so is no model by itself."""
        if self.state.frozen:
            raise CheckpointMismatch(
                f"{self.path(MODEL)}: holds only what was trained; {len(self.state.frozen)} frozen tensors are not in "
                "it. Make the module with its base, and fill it with CheckpointManager.load (docs/own_loop.md)."
            )

    @property
    def is_sharded(self) -> bool:
        """Whether its weights lie in shards."""
        return isinstance(self.weights.source, ShardedFile)

    @property
    def torch_parts(self) -> dict[str, Part]:
        """Its torch files, or the folders of shards in their place, by the names of the files."""
        parts = {MODEL: self.weights, OPTIMIZER: self.optimizer, EMA: self.ema, ALSO: self.also}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}

    @property
    def has_optimizer(self) -> bool:
        """Whether an optimizer state belongs to this step."""
        return self.optimizer is not None and self.state.has_optimizer

    def averaged(self) -> Bundle:
        """This step with its averaged weights in place of the plain ones; it shares the open files.

        Raises: CheckpointNotFound when none was kept.
        """
        if self.ema is None:
            raise CheckpointNotFound(
                f"{self.path(EMA)}: step {self.step} has no average of its weights: it was trained without --ema."
            )
        return replace(self, weights=self.ema)

    def path(self, name: str) -> Path:
        """The path of a file of this bundle, for messages."""
        return self.folder / (self.single or name)

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class KeptStep:
    """One older step in a model's folder; its state is empty where it cannot be read."""

    step: int
    path: Path
    state: TrainingState

    @property
    def order(self) -> int:
        """Its place among the commits of its branch."""
        return self.state.order if self.state else self.step

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return self.state.size or sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())


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


def _open_step(place: ModelFolder, step: int) -> OpenStep:
    with contextlib.suppress(CheckpointDamaged):
        opened = place.open_newest()
        if opened.state.step == step:
            return opened
        opened.close()
    return place.open_kept(place.path / step_folder(step))


_ALONE = f" {MODEL} alone does not show its model: write model.config.to_dict() as {CONFIG} beside it."


def _bundle(opened: OpenStep, folder: Path) -> Bundle:
    weights, optimizer = _part(opened, MODEL, WEIGHTS_KEYS), _part(opened, OPTIMIZER)
    if CONFIG not in opened.files or weights is None:
        names = ModelFolder(folder).storage.names(folder)
        there = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
        if not folder.exists():
            raise missing_model(folder)
        raise CheckpointNotFound(
            f"{folder}: no checkpoint here. Looked for {CONFIG} + {MODEL} (bundle), latest.pt or final.pt (single "
            f"file); found {there}.{_ALONE if weights is not None else ''}"
        )
    where = str(opened.folder / CONFIG)
    try:
        values = _read_json(opened, CONFIG)
    except CheckpointDamaged as error:
        # People edit this file: a mistake in it is for them to correct, not damage to walk back from.
        raise CheckpointMismatch(f"{error} Correct it, or copy that of a kept step.") from error
    check_version(values, where)
    tokenizer = _read_json(opened, TOKENIZER) if TOKENIZER in opened.files else None
    ema, also = _part(opened, EMA), _part(opened, ALSO)
    files = opened.files
    return Bundle(opened.folder, opened.state, values, tokenizer, files, weights, optimizer, ema=ema, also=also)


def _part(opened: OpenStep, name: str, keys: tuple[str, ...] = ()) -> Part | None:
    """The torch file of this name, or the folder of shards in its place."""
    if name in opened.files:
        return Part(TorchFile(opened.files[name], opened.folder / name), keys)
    folder = folder_of(name)
    files = {file.removeprefix(f"{folder}/"): opened.files[file] for file in files_of(name, opened.files)}
    return Part(ShardedFile(files, opened.folder / folder)) if METADATA in files else None


def _read_json(opened: OpenStep, name: str) -> dict[str, Any]:
    return read_json(opened.files[name], str(opened.folder / name))


def newest_tokenizer(folder: Path) -> dict[str, Any] | None:
    """Read the tokenizer.json of a model's newest step, or one that lies beside a config.json without weights."""
    with contextlib.suppress(FileNotFoundError):
        return parse_json(ModelFolder(folder).read(TOKENIZER), str(folder / TOKENIZER))
    return None


def history(folder: Path, storage: Storage = DISK) -> list[KeptStep]:
    """List the kept steps of a model, in the order in which they were committed."""
    kept = []
    for step, path in ModelFolder(folder, storage).kept_steps().items():
        state = TrainingState()
        with contextlib.suppress(FileNotFoundError, CheckpointDamaged):
            state = unseal(storage.read(path / STATE), str(path / STATE))
        kept.append(KeptStep(step, path, state))
    return sorted(kept, key=lambda step: step.order)
