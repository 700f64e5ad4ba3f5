"""One step on its way into a model's folder: captured as it is now, written during training, committed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import filecmp
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..bundle.bundle import ALSO, EMA, OPTIMIZER, TOKENIZER, history
from ..bundle.choice import seen_files
from ..bundle.commit import CONFIG, MODEL, ModelFolder
from ..bundle.folder import top_state
from ..bundle.retention import Retention, tidy_up
from ..bundle.storage import failed_call
from ..bundle.training_state import FIELDS, STATE, TrainingState, time_of, unseal
from ..bundle.write import Content, write_bundle
from ..bundle.writing import lock
from ..config.fields import FORMAT_VERSION
from ..config.gpt import EDITABLE, GPTConfig, same_architecture
from ..config.modded import ModdedConfig
from ..console.words import size_text
from ..containers.json_files import dump_json, parse_json, without_infinities
from ..containers.trees import map_leaves
from ..data.tokenizer import Tokenizer
from ..errors import CheckpointDamaged, InputError, SaveFailed
from ..networks.frozen import Frozen
from ..networks.state_dict import changed_by_step, copy_others, export_optimizers, export_state_dict, plain
from ..networks.wrappers import Modules, Optimizers, as_module, class_names, optimizers_by_name, unwrap
from .block_memory import Memory
from .loadable import unloadable
from .snapshot import Snapshot, SnapshotFile


def whole_step(step: object) -> int:
    """Return a step as a Python int: a whole number of at least 0, also of NumPy.

    Raises: InputError for anything else; True is not 1, and 1.0 is not a count.
    """
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
        raise InputError(f"step is {step!r}, expected a whole number of at least 0: the optimizer steps completed.")
    return int(step)


@dataclasses.dataclass(frozen=True)
class StepContent:
    """What a caller passes to be saved as a step."""

    model: Modules
    optimizer: Optimizers | None
    step: int
    tokenizer: Tokenizer | Mapping[str, Any] | None = None  # the model's own unless given
    metrics: Mapping[str, float] | None = None
    extra: Mapping[str, Any] | None = None
    ema: Mapping[str, torch.Tensor] | None = None  # averages under the names of the weights
    also: dict[str, Any] | None = None  # states of other objects; they may share memory with them
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further entries of the training state
    retention: Retention = dataclasses.field(default_factory=Retention)
    frozen: Frozen | None = None  # where frozen parameters are left out
    before_commit: Callable[[], None] | None = None  # called when the files are written, in the writer's thread


class StepSave:
    """A step of any module. Made in the loop, where it copies all except what the optimizer's step changes.

    The optimizer's step has to wait for `snapshot`; without an optimizer, the caller has to.

    Raises: InputError when metrics or extra cannot be written.
    """

    def __init__(self, place: ModelFolder, content: StepContent) -> None:
        self.place, self.step = place, content.step
        self._before_commit = content.before_commit
        self.retention = content.retention
        module = as_module(content.model)
        self._told = _told(content)
        self._frozen = content.frozen.of(module) if content.frozen is not None else {}
        if self._frozen:
            self._told["frozen"] = self._frozen
        self._texts = {CONFIG: _config_of(module)}
        if tokenizer := content.tokenizer or getattr(module, "tokenizer", None):
            self._texts[TOKENIZER] = dict(tokenizer) if isinstance(tokenizer, Mapping) else tokenizer.state()
        contents, live = self._take(module, content.optimizer, content.ema)
        if content.also is not None:
            contents[ALSO] = copy_others(content.also, frozenset(), {}, ALSO)
        self.snapshot = Snapshot(contents, live)

    def lock(self, say: Callable[[str], None]) -> contextlib.ExitStack:
        """Wait for a write of this process that is under way, and become the only writer, from the loop on.

        The thread that writes the step enters the result, and closes it at the end.

        Raises: CheckpointLocked, SaveFailed.
        """
        return lock(self.place, say)

    def _take(
        self, module: nn.Module, optimizer: Optimizers | None, ema: Mapping[str, torch.Tensor] | None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The content of each file, and the tensors in it that are copied later."""
        optimizers = optimizers_by_name(optimizer)
        if optimizers is None and not isinstance(optimizer, (Mapping, type(None))):
            raise InputError(
                f"optimizer is of type {type(optimizer).__name__}, expected an optimizer, a dict or list of "
                'optimizers, or a dict of states by name, such as {"adam": adam.state_dict()}. Nothing was written.'
            )
        contents: dict[str, Any] = {MODEL: export_state_dict(module, self._frozen)}
        if optimizer is not None:
            contents[OPTIMIZER] = optimizer if optimizers is None else export_optimizers(optimizers, module)
        if ema is not None:
            contents[EMA] = {name: plain(tensor, f"{EMA}: {name}") for name, tensor in ema.items()}
        stable = None
        if optimizers is not None:
            stable = changed_by_step(*optimizers.values()) | {t.untyped_storage()._cdata for t in (ema or {}).values()}
        live: dict[str, torch.Tensor] = {}
        for name, content in contents.items():
            try:
                contents[name] = copy_others(content, stable, live, name)
            except RecursionError as error:
                raise unloadable(name, content, str(error)) from error
        return contents, live

    def write(self, memory: Memory, say: Callable[[str], None]) -> None:
        """Write, commit and roll forward, and prune the older steps; the caller holds the lock.

        Raises: SaveFailed when it could not be committed, or OSError when only what follows the commit failed.
        """
        started, step = time.perf_counter(), self.step
        with contextlib.closing(self.snapshot):
            files = self._begin_copy(memory)
            self.place.recover()
            state = self._state()
            texts = {**self._texts, CONFIG: self._with_edits(self._texts[CONFIG])}
            if not self._commit(state, {**files, **texts}, sum(file.size for file in files.values())):
                say(self._already_saved())
                return
        size = sum(entry.stat().st_size for entry in os.scandir(self.place.committed))
        self.place.roll_forward()
        seconds = time.perf_counter() - started
        say(f"saved step {step} to {self.place.path} ({size_text(size)}, {seconds:.2f} s)")
        tidy_up(self.place, self.retention, state, say)

    def _begin_copy(self, memory: Memory) -> dict[str, SnapshotFile]:
        """Lay out the files and begin to copy; what `load` could not give back is refused before a byte is written."""
        try:
            files = self.snapshot.plan()
            self.snapshot.start(memory)
            self.snapshot.refuse_unloadable()
        except InputError as error:
            raise self._refused(str(error).removesuffix(".")) from error
        return files

    def _state(self) -> TrainingState:
        """The training state of this step, with its descent from the steps in the folder."""
        told, top, kept = self._told, top_state(self.place), history(self.place.path)
        state = TrainingState.from_dict({name: told[name] for name in ("step", "optimizer_file")}).committed(
            self.place.newest_id(),
            **top.descent(step.state for step in kept),
            saved_at=time_of(),
            best=self.retention.better(self.retention.best_of(top, kept), told["step"], told),
            retention=self.retention.recorded(),
        )
        config = self._texts[CONFIG]
        if config.get("model_class", "GPT") == "GPT":
            known = GPTConfig.from_dict(config)
            architecture = known.without_neutral(known.architecture())
            state = state.having(architecture=architecture, format_version=known.format_version)
        if seen := seen_files(self.place.path, top.legacy or []):
            state = state.having(legacy=seen)
        return state.having(**told)

    def _with_edits(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config, with the edits of a person in the config.json at the top."""
        with contextlib.suppress(FileNotFoundError, CheckpointDamaged):
            top = parse_json(self.place.read(CONFIG), CONFIG)
            if same_architecture(top, config):
                return {**config, **{name: top[name] for name in EDITABLE if name in top}}
        return config

    def _commit(self, state: TrainingState, files: Mapping[str, Content], size: int) -> bool:
        """Stage the files and make them the newest step; False when the newest step has these very bytes."""
        try:
            free = self.place.storage.free(self.place.path)
            if free is not None and free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with self.place.staging() as stage:
                write_bundle(self.place, stage, state, files)
                self.snapshot.finish()
                if self._before_commit is not None:
                    self._before_commit()
                if self._is_newest(stage):
                    self.place.storage.remove_tree(stage)
                    return False
                self.place.commit(stage)
        except OSError as error:
            raise self._failed(error, size) from error
        except SaveFailed as error:
            raise self._refused(str(error).removesuffix(".")) from error
        return True

    def _is_newest(self, stage: Path) -> bool:
        top, staged = top_state(self.place), unseal(self.place.storage.read(stage / STATE), STATE)
        same = (top.step, top.optimizer_file) == (staged.step, staged.optimizer_file)
        files, held = ({n: v for n, v in state.files.items() if n != CONFIG} for state in (staged, top))
        return (
            same
            and top.integrity is not None
            and files == held
            and all(filecmp.cmp(stage / name, self.place.path / name, shallow=False) for name in files)
        )

    def _already_saved(self) -> str:
        """Record, durably, what the caller says anew of a step that is saved already; returns the line to report."""
        told = {name: value for name, value in self._told.items() if name not in ("step", "optimizer_file")}
        changed = _record(self.place, told)
        recorded = f"; recorded anew: {', '.join(changed)}" if changed else ""
        return f"step {self.step} is already saved in {self.place.path}{recorded}"

    def _failed(self, error: OSError, needed: int) -> SaveFailed:
        sizes = f"{size_text(needed)} needed"
        with contextlib.suppress(OSError):
            room = self.place.storage.room(self.place.path)
            sizes += f", {room}" if room else ""
        return self._refused(f"{failed_call(error)} ({sizes})")

    def _refused(self, why: str) -> SaveFailed:
        top = top_state(self.place)
        stays = f"Step {top.step} is intact." if top.step is not None else "Nothing was saved before."
        return SaveFailed(f"{self.place.path}: save of step {self.step} failed: {why}. {stays}")


def add_metrics(place: ModelFolder, step: int, metrics: Mapping[str, float]) -> None:
    """Record metrics of the newest step after it was saved, durably; the caller holds the lock.

    Raises: InputError when another step is the newest, or a name is not free.
    """
    top = top_state(place)
    if top.step != step or top.commit_id is None:
        raise InputError(f"{place.path}: the newest step is {top.step}, expected {step}.")
    if clash := FIELDS & metrics.keys():
        raise InputError(f"metrics: {', '.join(sorted(clash))} cannot be names of metrics.")
    _record(place, _plain_numbers(metrics))


def _record(place: ModelFolder, values: Mapping[str, Any]) -> list[str]:
    """Put values into the training state at the top, durably, and return the names of those that are new."""
    top, kept = top_state(place), history(place.path)
    changed = [name for name, value in values.items() if top.to_dict().get(name) != value]
    if not changed:
        return []
    state, rules = top.having(**values), Retention.of(top)
    if rules.metric[0] in changed and top.best is not None and top.best["step"] == top.step:
        best = rules.best_of(state.having(best=None), kept)  # it was the best by the value that it had
    else:
        best = rules.better(rules.best_of(top, kept), top.step or 0, values)
    place.replace_state(state.having(best=best))
    return changed


def _told(content: StepContent) -> dict[str, Any]:
    """The caller's metrics and extra of a step, as they are now."""
    step, metrics, extra = content.step, content.metrics, content.extra
    told = {"step": step, "optimizer_file": None if content.optimizer is None else OPTIMIZER, **content.facts}
    if optimizers := optimizers_by_name(content.optimizer):
        told["optimizer_class"] = class_names(optimizers)
    if clash := (FIELDS | told.keys()) & (metrics or {}).keys():
        names = ", ".join(sorted(clash))
        raise InputError(f"metrics: {names} means something else in the training state. Use another name.")
    told |= dict(metrics or {})
    try:
        told |= {"extra": without_infinities(_plain_numbers(extra))} if extra else {}
        return json.loads(dump_json(_plain_numbers(told)))
    except (InputError, RecursionError) as error:
        raise InputError(f"metrics or extra of step {step}: {error} Tensors and objects go into `also`.") from error


def _plain_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with Python's numbers in the place of NumPy's."""
    return map_leaves(lambda value: value.item() if isinstance(value, np.generic) else value, values)


def refuse_unwritable(folder: Path, module: nn.Module) -> None:
    """Refuse what the first save of a model could not write: a value in its config, or in its tokenizer.

    Raises: InputError naming the file and the entry.
    """
    module = unwrap(module)
    tokenizer = getattr(module, "tokenizer", None)
    for name, values in ((CONFIG, _config_of(module)), (TOKENIZER, tokenizer.state() if tokenizer else {})):
        try:
            dump_json(values)
        except InputError as error:
            raise InputError(f"{folder / name}: {error} Correct it; nothing was trained.") from error


def _config_of(module: nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if isinstance(config, GPTConfig):
        return config.to_dict()
    if isinstance(config, ModdedConfig):
        return config.to_dict(type(module).__qualname__)
    return {"model_class": type(module).__qualname__, "format_version": FORMAT_VERSION}
