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
from ..errors import CheckpointError, CheckpointNotFound, InputError
from ..loading.also import also_restored
from ..loading.live import fill_live
from ..loading.restore import load_optimizers
from ..networks.stateful import AllGenerators
from ..training.ranks import WorldRanks
from .framework import SAVED_BY, framework, refuse_others
from .lightning_io import checkpoint_io
from .lightning_loaders import difference

NAME = "Lightning's Trainer"

LEFT_OUT = ("state_dict", "optimizer_states", "hparams_type", "datamodule_hparams_type")
"""Entries of Lightning's dict that also.pt has not: model.pt and optimizer.pt have them, or they are classes."""


class LightningCheckpoints:
    """The callback without Lightning's base class: `lightning_checkpoints` makes it, and describes it."""

    def __init__(self, name: str, base_dir: str | Path, every: int | None, settings: dict[str, Any]) -> None:
        self._arguments, self._settings, self._every = (name, base_dir), settings, every
        self._manager = CheckpointManager(name, base_dir, **settings)  # of one process, until the ranks have joined
        self._state: dict[str, Any] = {}  # Lightning's dict without weights and optimizers, and the generators
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
        refuse_others(bundle, NAME, "load the weights alone with CheckpointManager.load and a loop of your own")
        with also_restored(bundle, {"lightning": self._state}, manager.ranks.world, manager.say, strict=True):
            fill_live(bundle, module, None, manager.say, module.strict_loading)
        manager.went_on_from(bundle, module)
        self._step = bundle.step
        if manager.ranks.world.is_first:
            manager.say(f"{self.folder}: going on from step {bundle.step}")
        return {**self._state["trainer"], "state_dict": module.state_dict(), "optimizer_states": []}

    # the hooks of Lightning's Callback, in the order in which they are called

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the manager, and put this in front of the Trainer's CheckpointIO."""
        self._manager = CheckpointManager(*self._arguments, ranks=WorldRanks.joined(), **self._settings)
        trainer.strategy.checkpoint_io = checkpoint_io(self.folder, self.load, trainer)
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
        if self._manager.ranks.world.is_first and (line := difference(loop)):
            self._manager.say(f"{self.folder}: {line}")
        if self._opened is None:
            return
        begins = self._state["at_epoch_end"] and not loop.restarting  # Lightning loads no loader's state then
        if begins:
            states = self._state["trainer"]["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
            loop._combined_loader._load_state_dicts(states)
            iter(loop._data_fetcher)  # takes the state, which is at the end of the epoch that is over
        AllGenerators().load_state_dict(self._state["generators"])
        if begins:
            iter(loop._data_fetcher)
        self._opened, self._state = None, {}

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
        ends = trainer.should_stop or trainer.fit_loop.epoch_progress.current.processed == trainer.max_epochs
        self._due |= trainer.global_step > self._step and (ends or self._every is None)
        slow = any(one.reduce_on_plateau and one.interval == "epoch" for one in trainer.lr_scheduler_configs)
        if slow and trainer.global_step > self._step:  # else Lightning does not step them in an epoch that was resumed
            trainer.fit_loop._restarting = False
        if self._due and (ends or not slow):  # it steps them after this hook, and not at all after a resume from here
            self._save(trainer, at_epoch_end=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Finish the save that is being written; the error that ended training is raised, not one of the save."""
        try:
            self._close()
        except CheckpointError as error:
            self._manager.say(str(error))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Finish the save that is being written, and let other processes write; a finished run is as it ended."""
        if self._opened is not None:  # it did not begin to train
            AllGenerators().load_state_dict(self._state["generators"])
        self._close()

    def _close(self) -> None:
        with self._opened or contextlib.nullcontext():
            self._opened = None
            self._manager.close()

    def _save(self, trainer: Any, at_epoch_end: bool = False) -> None:
        connector = trainer._checkpoint_connector  # Trainer.save_checkpoint would give the dict to the first rank only
        kept = {name: value for name, value in connector.dump_checkpoint(False).items() if name not in LEFT_OUT}
        self._state = {"trainer": kept, "generators": AllGenerators().state_dict(), "at_epoch_end": at_epoch_end}
        self._manager.save(
            trainer.lightning_module,
            _one_or_all(trainer.optimizers),
            step=trainer.global_step,
            metrics=self._measured[1] if self._measured[0] == trainer.global_step else None,
            extra={SAVED_BY: NAME},
            also={"lightning": self._state},
        )
        self._step, self._due, self._state = trainer.global_step, False, {}


def _one_or_all(optimizers: list[Any]) -> Any:
    """The optimizers as the manager takes them: a single one has no name."""
    return optimizers[0] if len(optimizers) == 1 else optimizers or None


def lightning_checkpoints(
    name: str, base_dir: str | Path = "checkpoints", *, every: int | None = None, **settings: Any
) -> Any:
    """Make a Lightning callback that saves through a CheckpointManager: each `every` steps, or None for each epoch.

    `Trainer(callbacks=checkpoints)`, then `trainer.fit(module, loader, ckpt_path=checkpoints.ckpt_path)`: the first
    time, and after each stop. `settings` are those of the CheckpointManager. The last step of a run is always saved.

    Raises: InputError where Lightning is not installed.
    """
    callbacks = framework("lightning.pytorch.callbacks")
    if every is not None and every < 1:
        raise InputError(f"every is {every}, expected a number of steps of at least 1, or None for each epoch.")
    return type("ManagedCheckpoints", (LightningCheckpoints, callbacks.Checkpoint), {})(name, base_dir, every, settings)
