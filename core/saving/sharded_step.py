"""One step of a sharded model on its way into a model's folder: each rank writes its shards, the first one commits."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bundle.bundle import EMA, OPTIMIZER
from ..bundle.commit import CONFIG, MODEL, ModelFolder, entries
from ..bundle.folder import top_state
from ..bundle.output import Output
from ..bundle.parts import folder_of
from ..bundle.retention import tidy_up
from ..bundle.storage import failed_call
from ..bundle.training_state import STATE, seal
from ..bundle.write import write_file
from ..bundle.writing import lock
from ..console.words import size_text
from ..containers.dcp.metadata import METADATA, read_metadata
from ..containers.dcp.writer import WrittenItem, file_of, metadata
from ..errors import CheckpointError, InputError, SaveFailed
from ..networks.distributed import World
from ..networks.state_dict import local, plain
from ..networks.wrappers import Optimizers, optimizers_by_name
from .block_memory import Memory
from .shards import Shard, averages_of, image_of, moments_of, placed, weights_of
from .step import StepContent, StepSave


class ShardedStepSave(StepSave):
    """A step on every rank. `world` is the writing thread's own communication with the other ranks."""

    def __init__(self, world: World, place: ModelFolder, content: StepContent) -> None:
        self.world = world
        self._shards: dict[str, list[Shard]] = {}
        super().__init__(place, content)
        self._told["optimizer_file"] = self._told["optimizer_file"] and folder_of(OPTIMIZER)

    def _take(
        self, module: nn.Module, optimizer: Optimizers | None, ema: Mapping[str, torch.Tensor] | None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        first, name = self.world.is_first, file_of(self.world.rank)
        parts = {MODEL: weights_of(module, first)}
        if optimizer is not None:
            optimizers = optimizers_by_name(optimizer)
            if optimizers is None or optimizers.keys() != {""}:
                raise InputError(
                    f"optimizer is of type {type(optimizer).__name__}, expected one optimizer where the model is in "
                    "shards. Nothing was written."
                )
            parts[OPTIMIZER] = moments_of(optimizers[""], module, first)
        if ema is not None:
            parts[EMA] = averages_of(ema, first)
        contents: dict[str, Any] = {}
        live: dict[str, torch.Tensor] = {}
        for part, shards in parts.items():
            file = f"{folder_of(part)}/{name}"
            contents[file] = functools.partial(
                image_of, folder_of(part), shards
            )  # in the writer's thread: it takes 18 ms for 124M
            self._shards[file] = shards
            tensors = {f"{part}: {shard.name}": shard.value for shard in shards}
            live |= {n: plain(local(value), n) for n, value in tensors.items() if isinstance(value, torch.Tensor)}
            if len(tensors) < len(shards):
                twice = Counter(shard.name for shard in shards).most_common(1)[0][0]
                raise InputError(f"{part}: two entries are called {twice}. Rename one; nothing was written.")
        return contents, live

    def lock(self, say: Callable[[str], None]) -> contextlib.ExitStack:
        """Take no lock here: the first rank's thread takes it, and reports the outcome to the others."""
        return contextlib.ExitStack()

    def write(self, memory: Memory, say: Callable[[str], None]) -> None:
        """Write this rank's shards; the first rank commits the step when all have. Returns when it is committed.

        The first rank takes the lock. A failure on one rank is reported to all, so that none waits for another.

        Raises: SaveFailed, on all ranks, naming the one that failed.
        """
        started, step, said = time.perf_counter(), self.step, None
        with contextlib.ExitStack() as held:
            with contextlib.closing(self.snapshot):
                laid, fault = _attempt(lambda: self._start_copy(memory))
                stage, refused = _attempt(lambda: self._make_stage(held, say)) if self.world.is_first else (None, None)
                stage, refused, theirs = self.world.from_first((stage, refused, step))
                if theirs != step:
                    refused = f"found step {step} in its place, expected {theirs} as on rank 0"
                written, lists, fault = None, None, fault or refused
                if not fault:
                    files, lists = laid
                    written, fault = _attempt(lambda: self._write_own(Path(stage), files))
            reports = self.world.to_first((written, lists, fault))
            if self.world.is_first:
                said, fault = _attempt(lambda: self._commit_all(stage, reports, started, say))
            said, fault = self.world.from_first((said, fault))
        if fault:
            raise self._refused(fault)
        say(said)

    def _start_copy(self, memory: Memory) -> tuple[dict[str, Any], dict[str, list[WrittenItem]]]:
        """Lay out the files of this rank, return where its shards lie in them, and begin to copy."""
        files, name = self.snapshot.plan(), file_of(self.world.rank)
        self.snapshot.start(memory)
        self.snapshot.refuse_unloadable()
        return dict(files), {file: placed(shards, files[file].image, name) for file, shards in self._shards.items()}

    def _make_stage(self, held: contextlib.ExitStack, say: Callable[[str], None]) -> str:
        held.enter_context(lock(self.place, say))
        self.place.recover()
        stage = held.enter_context(self.place.staging())
        for folder in entries(self._shards):
            self.place.storage.make_folder(stage / folder)
        return os.fspath(stage)

    def _write_own(self, stage: Path, files: Mapping[str, Any]) -> dict[str, Any]:
        """Write the files of this rank, durably; one without a shard writes none."""
        storage = self.place.storage
        recorded = {name: write_file(storage, stage / name, file) for name, file in files.items() if file.size}
        self.snapshot.finish()
        return recorded

    def _commit_all(self, staged: str | None, reports: list[Any], started: float, say: Callable[[str], None]) -> str:
        """Commit what all ranks have written, or discard it; returns the line to report."""
        faults = [f"rank {rank}: {fault}" for rank, (_, _, fault) in enumerate(reports) if fault]
        if staged is None:
            raise SaveFailed(faults[0])
        with self.place.removed_unless_committed(Path(staged)):
            if faults:
                raise SaveFailed(faults[0])
            if not (files := self._commit_stage(Path(staged), reports)):
                return self._already_saved()
        self.place.roll_forward()
        state = top_state(self.place)
        tidy_up(self.place, self.retention, state, say)
        size, seconds = sum(entry["size"] for entry in files.values()), time.perf_counter() - started
        return (
            f"saved step {state.step} to {self.place.path} in shards of {len(reports)} ranks "
            f"({size_text(size)}, {seconds:.2f} s)"
        )

    def _commit_stage(self, stage: Path, reports: list[Any]) -> dict[str, Any] | None:
        """Complete a staged step and make it the newest; returns its files, None where the newest is this very step."""
        storage = self.place.storage
        recorded: dict[str, Any] = {}
        items: dict[str, list[WrittenItem]] = {}
        for written, lists, _ in reports:
            recorded |= written
            for file, shards in lists.items():
                items.setdefault(file.partition("/")[0], []).extend(shards)
        for folder, shards in items.items():
            name = f"{folder}/{METADATA}"
            read_metadata(data := metadata(shards), name)  # which raises where a load would
            recorded[name] = write_file(storage, stage / name, _writer(data))
        for name, text in {**self._texts, CONFIG: self._with_edits(self._texts[CONFIG])}.items():
            recorded[name] = write_file(storage, stage / name, text)
        if self._before_commit is not None:
            self._before_commit()
        state, top = self._state(), top_state(self.place)
        if top.step == state.step and {**top.files, CONFIG: None} == {**recorded, CONFIG: None}:
            storage.remove_tree(stage)
            return None
        storage.write(stage / STATE, seal(state, recorded))
        self.place.commit(stage)
        return recorded


def _writer(data: bytes) -> Callable[[Output], None]:
    def write(output: Output) -> None:
        output.write(data)

    return write


def _attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """Call a function, and return its failure instead of raising it: the other ranks have to hear of it."""
    try:
        return work(), None
    except OSError as error:
        return None, f"{error.filename or 'writing'}: {failed_call(error)}"
    except CheckpointError as error:
        return None, str(error).removesuffix(".")
