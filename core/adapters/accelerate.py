"""accelerate: all that an Accelerator has prepared, saved and loaded through a CheckpointManager in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch

from ..checkpoint import CheckpointManager
from ..errors import InputError
from ..loading.also import also_restored
from ..loading.live import fill_live
from ..networks.stateful import AllGenerators
from ..networks.wrappers import as_module
from ..training.ranks import WorldRanks
from .framework import SAVED_BY, framework, refuse_others

NAME = "accelerate"
SHARDS = {"FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"}
"""Kinds of training in which no process has a whole model."""


class Position:
    """Where a loop is in its batches: an entry of `also`."""

    def __init__(self, loader: Any, accelerator: Any) -> None:
        self.loader, self.accelerator = loader, accelerator
        self.epoch = self.batch = 0
        self.began: dict[str, Any] = {}  # the generators at the beginning of the epoch: its order is drawn from them

    def state_dict(self) -> dict[str, Any]:
        """The epoch, how many of its batches the loop has had, and what its order is drawn from."""
        own = {"epoch": self.epoch, "batch": self.batch, "began": self.began}
        return {**own, "accumulated": self.accelerator.step, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there.

        Raises: ValueError where the batches are others.
        """
        if state["order"] != self._order():
            raise ValueError(f"its loader had {state['order']}, here are {self._order()}")
        self.epoch, self.batch, self.began = state["epoch"], state["batch"], state["began"]
        self.accelerator.step = state["accumulated"]

    def batches(self, skip_first_batches: Any) -> Iterator[Any]:
        """Go through the rest of the epoch, and on to the next one."""
        skipped, now = self.batch, AllGenerators().state_dict()
        if skipped:
            self._draw_again()
        else:
            own = {name: generator.get_state() for name, generator in self._generators().items()}
            self.began = {"all": AllGenerators().state_dict(), "own": own}
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(self.epoch)
        for batch in skip_first_batches(self.loader, skipped) if skipped else self.loader:
            if skipped:  # the order is drawn: go on with the generators as they were saved
                AllGenerators().load_state_dict(now)
                skipped = 0
            self.batch += 1
            yield batch
        if skipped:
            AllGenerators().load_state_dict(now)
        self.epoch, self.batch = self.epoch + 1, 0

    def _order(self) -> str:
        if self.loader is None or not hasattr(self.loader.dataset, "__len__"):
            return "no known length"
        size = getattr(self.loader, "total_batch_size", self.loader.batch_size)
        return f"{len(self.loader.dataset)} samples in batches of {size}"

    def _generators(self) -> dict[str, torch.Generator]:
        sampler = self.loader.get_sampler() if hasattr(self.loader, "get_sampler") else self.loader.sampler
        found = {"loader": self.loader.generator, "sampler": getattr(sampler, "generator", None)}
        found["ranks"] = getattr(self.loader, "synchronized_generator", None)  # of a sampler that accelerate has shared
        return {name: one for name, one in found.items() if one is not None}

    def _draw_again(self) -> None:
        AllGenerators().load_state_dict(self.began["all"])
        for name, generator in self._generators().items():  # accelerate's own sampler makes its one later, by the epoch
            generator.set_state(self.began["own"][name])


class AcceleratorCheckpoints:
    """The checkpoints of what an Accelerator has prepared: models, optimizers, schedulers, scaler, random generators.

    `loader` is the one that trains; `batches` goes through it from where the step was saved. What was given to
    `register_for_checkpointing` is saved as well. `settings` are those of the CheckpointManager.

    Raises: InputError where accelerate is not installed, for models in shards, and for a loader with a position.
    """

    def __init__(
        self, accelerator: Any, name: str, base_dir: str | Path = "checkpoints", loader: Any = None, **settings: Any
    ) -> None:
        self._skip_first_batches = framework("accelerate").skip_first_batches
        kind = accelerator.distributed_type.name
        if kind in SHARDS:
            raise InputError(
                f"{name}: accelerate trains with {kind}, expected a whole model in each process. Save with "
                "accelerator.save_state, or shard it in a loop of your own (docs/own_loop.md)."
            )
        if getattr(loader, "use_stateful_dataloader", hasattr(loader, "load_state_dict")):
            raise InputError(
                f"{name}: the loader keeps a position of its own, expected one without. Make the Accelerator without "
                'use_stateful_dataloader, or pass such a loader to load and save: also={"loader": loader}.'
            )
        self.accelerator = accelerator
        self.manager = CheckpointManager(name, base_dir, ranks=WorldRanks.joined(), **settings)
        """The manager; it holds the writer's lock within the `with` block."""
        self._position = Position(loader, accelerator)

    def __enter__(self) -> Self:
        self.manager.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()

    def load(self, also: Mapping[str, Any] | None = None) -> int:
        """Fill all that was prepared from the newest intact step, and return it; 0 where nothing is saved.

        Every process calls it, after `accelerator.prepare`.

        Raises: CheckpointMismatch when another trainer saved the step, or other objects; nothing is changed then.
        """
        manager = self.manager
        if not manager.exists() and not manager.allow_fresh:
            self._refuse_own_folder()
        if (bundle := manager.newest_intact()) is None:
            return 0
        with bundle:
            refuse_others(bundle, NAME, "load its weights with CheckpointManager.load")
            models, optimizers = self._prepared()
            module = as_module(models)
            with also_restored(bundle, self._also(also), manager.ranks.world, manager.say, strict=True):
                fill_live(bundle, module, optimizers, manager.say, frozen=manager._frozen)
            manager.went_on_from(bundle, module)
            return bundle.step

    def save(
        self, step: int, *, also: Mapping[str, Any] | None = None, extra: Mapping[str, Any] | None = None, **more: Any
    ) -> bool:
        """Begin to commit a step, as CheckpointManager.save does; `more` are other arguments of that.

        Every process calls it, behind the step of the optimizer.

        Raises: InputError between two micro-batches of a step, whose gradients no file has.
        """
        if not self.accelerator.sync_gradients:
            raise InputError(
                f"step {step} is not done: gradients are being accumulated, which no step keeps. Save where "
                "accelerator.sync_gradients is True. Nothing was written."
            )
        models, optimizers = self._prepared()
        told = {**(extra or {}), SAVED_BY: NAME}
        return self.manager.save(models, optimizers, step=step, also=self._also(also), extra=told, **more)

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs from the one in which the step was saved, or the next where it was saved behind its batches."""
        while self._position.epoch < count:
            yield self._position.epoch

    def batches(self) -> Iterator[Any]:
        """The batches of the epoch, those that the step has not had.

        Raises: InputError where no loader was given.
        """
        if self._position.loader is None:
            raise InputError(
                "AcceleratorCheckpoints has no loader, expected one: AcceleratorCheckpoints(..., loader=loader)."
            )
        return self._position.batches(self._skip_first_batches)

    def _prepared(self) -> tuple[Any, Any]:
        """The models and optimizers; a single one has no name."""
        held = (self.accelerator._models, self.accelerator._optimizers)
        models, optimizers = (one[0] if len(one) == 1 else one for one in held)
        return models, optimizers or None

    def _also(self, also: Mapping[str, Any] | None) -> dict[str, Any]:
        one = self.accelerator
        own: dict[str, Any] = {"rng": "all", "position": self._position}
        own |= {f"scheduler_{i}": scheduler for i, scheduler in enumerate(one._schedulers)}
        own |= {f"registered_{i}": registered for i, registered in enumerate(one._custom_objects)}
        return own | ({"scaler": one.scaler} if one.scaler is not None else {}) | dict(also or {})

    def _refuse_own_folder(self) -> None:
        folder = self.manager.checkpoint_dir
        if (folder / "random_states_0.pkl").is_file():
            raise InputError(
                f"{folder}: a folder of accelerator.save_state, expected steps of a CheckpointManager. Load it with "
                "accelerator.load_state, and save under another name."
            )
