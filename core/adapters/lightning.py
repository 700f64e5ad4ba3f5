"""Lightning's Trainer saves and resumes through a CheckpointManager.

A callback saves, because it runs on every rank and sees the live module. It puts a CheckpointIO in front of the one
that the Trainer has, which answers `trainer.fit(ckpt_path=...)` from the newest intact step. Weights and optimizers are
filled in place, by name; all else that Lightning keeps in a checkpoint lies in also.pt.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..checkpoint import CheckpointManager
from ..console.anchored import anchored
from ..console.words import listed
from ..errors import CheckpointError, CheckpointMismatch, CheckpointNotFound, InputError
from ..loading.also import also_restored
from ..loading.live import fill_live
from ..loading.restore import load_optimizers
from ..loading.tensors import read_part
from ..networks.stateful import AllGenerators
from ..training.ranks import WorldRanks

LEFT_OUT = ("state_dict", "optimizer_states", "hparams_type", "datamodule_hparams_type")
"""Entries of Lightning's dict that also.pt has not: model.pt and optimizer.pt have them, or they are classes."""


class LightningState:
    """An entry of `also`: Lightning's dict without weights and optimizers, and the random generators."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The values as they were set."""
        return self.values

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take the values of a step."""
        self.values = values


class Saver:
    """The callback without Lightning's base class: `saver` makes it, and describes it."""

    def __init__(self, name: str, base_dir: str | Path, every: int | None, settings: dict[str, Any]) -> None:
        self._arguments, self._settings, self._every = (name, base_dir), settings, every
        self._manager = CheckpointManager(name, base_dir, **settings)  # of one process, until the ranks have joined
        self._state = LightningState()
        self._step = 0  # the newest one that is in the folder
        self._due = False
        self._measured: tuple[int, dict[str, float]] = (0, {})
        self._opened: Bundle | None = None  # what the Trainer goes on from, until its optimizers are filled

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return self._manager.checkpoint_dir

    @property
    def ckpt_path(self) -> str | None:
        """What `trainer.fit(ckpt_path=...)` needs: the folder, or None as long as nothing is saved in it."""
        return str(self.folder) if self._manager.exists() else None

    def load(self, trainer: Any) -> dict[str, Any]:
        """Fill the Trainer's module from the newest intact step; return Lightning's dict. Every rank calls it.

        Raises: CheckpointNotFound, CheckpointDamaged, CheckpointMismatch when another loop saved the step.
        """
        manager, module = self._manager, trainer.lightning_module
        if (bundle := manager.newest_intact()) is None:
            raise CheckpointNotFound(f"{self.folder}: no checkpoint here. The first run has ckpt_path=None.")
        self._opened = bundle
        if "lightning" not in (read_part(bundle.also) if bundle.also is not None else {}):
            raise CheckpointMismatch(
                f"{self.folder}: step {bundle.step} was not saved by this callback, so how far a Trainer had come is "
                "unknown. Load its weights with CheckpointManager.load, and train under another name."
            )
        with also_restored(bundle, {"lightning": self._state}, manager.ranks.world, manager.say, strict=True):
            fill_live(bundle, module, None, manager.say, module.strict_loading)
        manager.went_on_from(bundle, module)
        self._step = bundle.step
        manager.say(f"{self.folder}: going on from step {bundle.step}")
        return {**self._state.values["trainer"], "state_dict": module.state_dict(), "optimizer_states": []}

    # the hooks of Lightning's Callback, in the order in which they are called

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the manager, and put this in front of the Trainer's CheckpointIO."""
        self._manager = CheckpointManager(*self._arguments, ranks=WorldRanks.joined(), **self._settings)
        trainer.strategy.checkpoint_io = checkpoint_io(self, trainer)
        if stage == "fit":
            self._manager.acquire()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Fill the optimizers, now that there are some; refuse to begin anew in a folder that has steps."""
        manager = self._manager
        if self._opened is not None:
            load_optimizers(self._opened, pl_module, _one_or_all(trainer.optimizers), manager.say)
        elif manager.newest_intact() is not None:
            raise InputError(
                f"{self.folder}: found step {manager.saved_step()}, and trainer.fit was called without it. Call "
                "trainer.fit(..., ckpt_path=saver.ckpt_path), or choose another name. Nothing was changed."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on as after the save: nothing but the batches draws random numbers from here to the first one."""
        loop = trainer.fit_loop
        for line in _differences(trainer):
            self._manager.say(f"{self.folder}: {line}")
        if self._opened is None:
            return
        begins = self._state.values["at_epoch_end"] and not loop.restarting  # Lightning loads no loader's state then
        if begins:
            states = self._state.values["trainer"]["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
            loop._combined_loader._load_state_dicts(states)
            iter(loop._data_fetcher)  # takes the state, which is at the end of the epoch that is over
        AllGenerators().load_state_dict(self._state.values["generators"])
        if begins:
            iter(loop._data_fetcher)
        self._opened, self._state.values = None, {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Save where a step is due, unless a validation or the end of the epoch follows: then save after that."""
        self._manager.raise_failed()
        step, last = trainer.global_step, self._step
        ends = trainer.received_sigterm or trainer.should_stop or step == trainer.max_steps
        self._due |= step > last and (ends or (self._every is not None and step // self._every > last // self._every))
        loop = trainer.fit_loop.epoch_loop
        followed = loop.batch_progress.is_last_batch or loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        if self._due and not followed:
            self._save(trainer)

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        """Save where a step is due within an epoch, with what was measured."""
        self._measured = trainer.global_step, {k: float(v) for k, v in trainer.callback_metrics.items()}
        if self._due and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        """Save where a step is due, or no other epoch follows."""
        ends = trainer.fit_loop.epoch_progress.current.processed == trainer.max_epochs
        self._due |= trainer.global_step > self._step and (ends or self._every is None)
        slow = any(one.reduce_on_plateau and one.interval == "epoch" for one in trainer.lr_scheduler_configs)
        if self._due and (ends or not slow):  # Lightning steps those after this, and not at all after a resume
            self._save(trainer, at_epoch_end=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Finish the save that is being written; the error that ended training is raised, not one of the save."""
        try:
            self._close()
        except CheckpointError as error:
            self._manager.say(str(error))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Finish the save that is being written, and let other processes write."""
        self._close()

    def _close(self) -> None:
        with self._opened or contextlib.nullcontext():
            self._opened = None
            self._manager.close()

    def _save(self, trainer: Any, at_epoch_end: bool = False) -> None:
        connector = trainer._checkpoint_connector  # Trainer.save_checkpoint would give the dict to the first rank only
        kept = {name: value for name, value in connector.dump_checkpoint(False).items() if name not in LEFT_OUT}
        generators, (measured, metrics) = AllGenerators().state_dict(), self._measured
        self._state.values = {"trainer": kept, "generators": generators, "at_epoch_end": at_epoch_end}
        self._manager.save(
            trainer.lightning_module,
            _one_or_all(trainer.optimizers),
            step=trainer.global_step,
            metrics=metrics if measured == trainer.global_step else None,
            also={"lightning": self._state},
        )
        self._step, self._due, self._state.values = trainer.global_step, False, {}


def _one_or_all(optimizers: list[Any]) -> Any:
    """The optimizers as the manager takes them: a single one has no name."""
    return optimizers[0] if len(optimizers) == 1 else optimizers or None


def _has_state(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _differences(trainer: Any) -> list[str]:
    """What is not exact after a resume, a line each."""
    loop = trainer.fit_loop
    lines = []
    without = sorted({type(one).__name__ for one in loop._combined_loader.flattened if not _has_state(one)})
    if without:
        lines.append(
            f"{listed(without)} keeps no position: a resume within an epoch is exact in all but the batches, which "
            "begin anew. core.data.resumable and torchdata's StatefulDataLoader have one."
        )
    return lines


def checkpoint_io(saver: Saver, trainer: Any) -> Any:
    """Make the CheckpointIO: the folder of the manager is its own, every other path goes to the one before."""
    from lightning.pytorch.plugins.io import CheckpointIO

    before = trainer.strategy.checkpoint_io
    before = getattr(before, "before", before)  # a second call of fit

    class ManagedIO(CheckpointIO):
        """Reads what a CheckpointManager has saved."""

        def __init__(self) -> None:
            self.before = before

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            if anchored(path) == saver.folder:
                raise InputError(f"{path}: the callback saves here, at its steps. Nothing was written.")
            before.save_checkpoint(checkpoint, path, storage_options)

        def load_checkpoint(
            self, path: Any, map_location: Any = None, weights_only: bool | None = None
        ) -> dict[str, Any]:
            if anchored(path) == saver.folder:
                return saver.load(trainer)
            how = {} if map_location is None else {"map_location": map_location}
            return before.load_checkpoint(path, weights_only=weights_only is not False, **how)

        def remove_checkpoint(self, path: Any) -> None:
            if anchored(path) != saver.folder:
                before.remove_checkpoint(path)

        def teardown(self) -> None:
            before.teardown()

    return ManagedIO()


def saver(name: str, base_dir: str | Path = "checkpoints", *, every: int | None = None, **settings: Any) -> Any:
    """Make a Lightning callback that saves through a CheckpointManager: every so many steps, or None for epochs.

    `trainer = Trainer(callbacks=saver)`, then `trainer.fit(module, loader, ckpt_path=saver.ckpt_path)`, the first time
    and after each stop. `settings` are those of the CheckpointManager. The last step of a run is saved as well.

    Raises: InputError where Lightning is not installed.
    """
    try:
        from lightning.pytorch.callbacks import Checkpoint
    except ImportError as error:
        raise InputError(f"The adapter for Lightning needs it ({error}): pip install lightning") from error
    if every is not None and every < 1:
        raise InputError(f"every is {every}, expected a number of steps of at least 1, or None for each epoch.")

    class ManagedSaver(Saver, Checkpoint):
        """The callback."""

    return ManagedSaver(name, base_dir, every, settings)
