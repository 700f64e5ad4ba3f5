"""Hugging Face's Trainer saves through a CheckpointManager, and resumes from what that saved.

A callback takes over the saves that Trainer's `save_strategy` asks for. One begins when all that belongs to the step is
done (log, evaluation, other callbacks): where the next step or epoch begins, or at the end. A callback cannot skip
batches, but Trainer can: `resume_folder` makes the folder that it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle.bundle import open_bundle
from ..bundle.commit import MODEL
from ..bundle.retention import best_step
from ..bundle.storage import DISK
from ..bundle.verify import verify
from ..checkpoint import CheckpointManager
from ..console.words import listed
from ..containers.json_files import with_infinities
from ..errors import InputError
from ..loading.live import fill_live
from ..loading.tensors import read_part
from ..networks.stateful import AllGenerators
from ..networks.wrappers import unwrap
from ..training.ranks import WorldRanks
from .framework import SAVED_BY, framework, of_rank, refuse_others
from .trainer_folder import draw_from, give_back, make_folder, order_of, put_weights, refuse_own_folders

NAME = "Hugging Face's Trainer"


class TrainerCheckpoints:
    """The checkpoints of a Trainer: adds a callback that saves, and makes the folder from which Trainer resumes.

    Call `trainer.train(resume_from_checkpoint=checkpoints.resume_folder())`, the first time and after each stop.
    `trainable_only` leaves out frozen parameters, as with PEFT; `settings` are those of the CheckpointManager.

    Raises: InputError where transformers is not installed, for a model in shards, and for `save_strategy="best"`.
    """

    def __init__(
        self,
        trainer: Any,
        name: str,
        base_dir: str | Path = "checkpoints",
        trainable_only: bool = False,
        **settings: Any,
    ) -> None:
        base, args = framework("transformers").TrainerCallback, trainer.args
        sharded = any(hasattr(parameter, "device_mesh") for parameter in trainer.model.parameters())
        if sharded or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError(
                f"{name}: Trainer shards the model (FSDP, DeepSpeed or tensor parallel), expected a whole one in each "
                "process. Leave Trainer's own saving on, or shard it in a loop of your own (docs/own_loop.md)."
            )
        if args.save_strategy == "best":
            raise InputError(f'{name}: save_strategy is "best", expected "steps" or "epoch": the best step is kept.')
        if (metric := args.metric_for_best_model) and (metric := metric.removeprefix("eval_")) != "loss":
            settings.setdefault("best_by", f"eval_{metric}:{'max' if args.greater_is_better else 'min'}")
        self.trainer = trainer
        self.manager = CheckpointManager(name, base_dir, ranks=WorldRanks.joined(), **settings)
        """The manager; it holds the writer's lock while Trainer trains."""
        self._folder = self.manager.checkpoint_dir.with_name(f".{name}.for_trainer")  # beside it, for hard links
        self._trainable_only, self._held, self._due = trainable_only, False, False
        self._resumed: dict[str, Any] = {}  # what Trainer does not read of the step that it resumes from
        self._epoch: dict[str, Any] = {}  # the generators at the beginning of the epoch: its order is drawn from them
        self._measured: tuple[int, dict[str, float]] = (0, {})
        events = {event: getattr(self, event) for event in dir(self) if event.startswith("on_")}
        trainer.add_callback(type("ManagedSaves", (base,), events)())

    def resume_folder(self) -> str | None:
        """Make the folder that `trainer.train(resume_from_checkpoint=...)` needs; None where nothing is saved yet.

        It has the newest intact step, large files as hard links, and lasts until the next save. Every process calls it.

        Raises: CheckpointMismatch when another trainer or model saved the step, InputError where Trainer itself saved.
        """
        self._hold()
        manager, model, world = self.manager, self.trainer.model, self.manager.ranks.world
        if not manager.exists() and not manager.allow_fresh:
            refuse_own_folders(self.trainer.args.output_dir, manager.checkpoint_dir)
        if (bundle := manager.newest_intact()) is None:
            return None
        with bundle:
            refuse_others(bundle, NAME, "load its weights with CheckpointManager.load")
            fill_live(bundle, unwrap(model), None, manager.say, frozen=manager._frozen)
            extra, states = with_infinities(bundle.state.extra or {}), read_part(bundle.also) if bundle.also else {}
            own = of_rank(states["trainer"], world.rank) | {"noise": of_rank(states["rng"], world.rank)}
            self._resumed = {**own, **extra, "optimizer": bundle.state.optimizer_class, "step": bundle.step}
            pairs = {key: (extra["order"].get(key), value) for key, value in order_of(self.trainer).items()}
            if changed := [f"{key} was {old}, is {new}" for key, (old, new) in pairs.items() if old != new]:
                manager.say(f"{manager.checkpoint_dir}: batches and noise are not exact from here: {listed(changed)}")
            if world.is_first:
                make_folder(self._folder, bundle, self.trainer, states)
            manager.went_on_from(bundle, model)
        world.from_first()
        manager.say(f"{manager.checkpoint_dir}: Trainer goes on from step {bundle.step}")
        return str(self._folder)

    def _hold(self) -> None:
        if not self._held:
            self.manager.acquire()
        self._held = True

    # the events of a TrainerCallback, in the order of their first calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give back what Trainer does not; refuse to train over steps from another state."""
        self._hold()
        trainer, resumed, found = self.trainer, self._resumed, self.manager.saved_step()
        if found is not None and state.global_step != resumed.get("step"):
            raise InputError(
                f"{self.manager.checkpoint_dir}: found step {found}, and Trainer begins at step {state.global_step}. "
                "Call trainer.train(resume_from_checkpoint=checkpoints.resume_folder()), or choose another name."
            )
        if resumed:
            give_back(trainer, resumed, self.manager.checkpoint_dir)
        if state.global_step >= state.max_steps:  # else Trainer makes one more step within an epoch
            trainer.get_batch_samples = lambda *_: ([], None)
            draw_from(resumed.get("noise"))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin a resumed epoch with the generators from which its order was drawn."""
        draw_from(self._resumed.get("epoch"))
        self._resumed = {}
        self._epoch = AllGenerators().state_dict()
        self._save_due(state, state.log_history)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the step before this one, where that is due."""
        self._save_due(state, state.log_history)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over a save that Trainer is about to make; raise the failure of the one before."""
        self.manager.raise_failed()
        self._due |= control.should_save or self.manager.wants(state.global_step)
        control.should_save = False

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> None:
        """Keep what was measured for the save of this step."""
        kept = {key: float(value) for key, value in metrics.items() if key.startswith("eval_")}
        self._measured = state.global_step, kept | ({"val_loss": kept["eval_loss"]} if "eval_loss" in kept else {})

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
        """Save the last step when training has ended, and show Trainer the best one, where it is to load that."""
        if "train_runtime" not in logs:
            return
        self._save_due(state, state.log_history[:-1])
        self.manager.wait()
        world, folder = self.manager.ranks.world, self.manager.checkpoint_dir
        if args.load_best_model_at_end and (best := world.from_first(best_step(folder) if world.is_first else None)):
            with open_bundle(folder, best) as bundle:
                if world.is_first:
                    verify(bundle, (MODEL,))
                    put_weights(self._folder, bundle, self.trainer.model)
                world.from_first()
            state.best_model_checkpoint = str(self._folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let other processes write; the last step is durable."""
        vars(self.trainer).pop("get_batch_samples", None)
        self._remove_folder()
        self._held, self._due, self._resumed = False, False, {}
        self.manager.close()

    def _remove_folder(self) -> None:
        if self.manager.ranks.world.is_first and self._folder.is_dir():
            DISK.remove_tree(self._folder)

    def _save_due(self, state: Any, log: list[Any]) -> None:
        if not self._due:
            return
        self._due, trainer, (measured, metrics) = False, self.trainer, self._measured
        trainer.store_flos()
        kind = framework("transformers.trainer_callback").ExportableState
        states = [one for one in (*trainer.callback_handler.callbacks, trainer.control) if isinstance(one, kind)]
        told = dataclasses.replace(state, log_history=log, stateful_callbacks=states)
        also = {
            "scheduler": trainer.lr_scheduler,
            "rng": "all",
            "trainer": {"epoch": self._epoch, "loss": trainer._tr_loss, "logged": trainer._globalstep_last_logged},
        }
        if getattr(trainer.accelerator, "scaler", None) is not None:
            also["scaler"] = trainer.accelerator.scaler
        self.manager.save(
            trainer.model,
            trainer.optimizer,
            step=state.global_step,
            metrics=metrics if measured == state.global_step else None,
            extra={SAVED_BY: NAME, "trainer_state": dataclasses.asdict(told), "order": order_of(self.trainer)},
            also=also,
            trainable_only=self._trainable_only,
        )
        self._remove_folder()
