"""Settings: what a run does, by the names of its flags; the one place that decides which source wins."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..bundle.training_state import TrainingState
from ..console.commandline import above_or_zero, below_one, count, duration, positive, seed_number
from ..errors import CheckpointMismatch, InputError
from .schedule import KINDS, Schedule
from .skips import Skips, step_ranges


def _setting(default: Any, kind: Callable[[str], Any] | tuple[str, ...] | None, text: str) -> Any:
    """A field with its flag's type (or choices) and its line in --help; None for a flag that is written by hand."""
    return field(default=default, metadata={"kind": kind, "help": text})


def _is_a(kind: Callable[[str], Any] | tuple[str, ...] | None, value: Any) -> bool:
    """Whether a recorded value has the type of a setting; whether the number is possible is checked with the others."""
    if isinstance(kind, tuple):
        return value in kind if isinstance(value, str) else False
    if kind is None or isinstance(value, bool):
        return kind is None and isinstance(value, bool)
    if kind is step_ranges:
        return isinstance(value, str) and _parses(kind, value)
    is_whole = isinstance(value, int) and abs(value) < 1 << 63
    return is_whole or (isinstance(value, float) and math.isfinite(value) and kind not in (count, seed_number))


def _parses(kind: Callable[[str], Any], word: str) -> bool:
    try:
        kind(word)
    except argparse.ArgumentTypeError:
        return False
    return True


@dataclass(frozen=True)
class Settings:
    """What a run does; a training state records the fields up to `warmup_iters`, in this order."""

    lr_schedule: str = _setting("constant", KINDS, "learning rate after warm-up (default: constant)")
    lr_decay_iters: int | None = _setting(
        None, count, "step at which a cosine is lowest; independent of --max_iters"
    )  # steps
    min_lr: float | None = _setting(
        None, above_or_zero, "learning rate at which a cosine ends (default: a tenth of --learning_rate)"
    )  # per update
    weight_decay: float | None = _setting(0.1, above_or_zero, "weight decay of matrices")  # per unit of learning rate
    grad_clip: float = _setting(
        1.0, above_or_zero, "clip gradients to this norm; 0 for no clipping"
    )  # L2 norm of all gradients
    gradient_accumulation_steps: int = _setting(1, count, "batches per optimizer step")  # micro-steps
    ema: float = _setting(
        0.0, below_one, "decay of an average of the weights that is saved with them, such as 0.999; 0 for none"
    )
    eval_interval: int = _setting(250, count, "steps between evaluations (default: 250)")  # steps
    eval_iters: int = _setting(20, count, "batches per evaluation (default: 20)")  # batches
    save_interval: int | None = _setting(None, count, "steps between saves (default: --eval_interval)")  # steps
    save_every_minutes: float | None = _setting(
        None, positive, "also save when the last save was this many minutes ago"
    )  # minutes
    lose_at_most: float | None = _setting(
        None, duration, "also save as often as it takes to lose at most this much work when killed: 30s, 5m, 1h"
    )  # seconds
    skip_steps: str | None = _setting(
        None,
        step_ranges,
        "leave out the batches of steps A to B, both included (120:125,300:310): the steps go on with those after them",
    )  # batches
    seed: int = _setting(1337, seed_number, "seed of data order, dropout and initialization (default: 1337)")
    max_iters: int = _setting(1500, count, "optimizer steps in all")  # steps
    learning_rate: float = _setting(
        1e-3, positive, "peak learning rate of AdamW; for flex_* of Muon, the others in proportion"
    )  # per update
    warmup_iters: float = _setting(
        0.0, above_or_zero, "steps of linear warm-up, or a fraction of --lr_decay_iters"
    )  # steps, or below 1 a fraction
    dtype: str = _setting(
        "fp32",
        ("fp32", "bf16", "fp16"),
        "arithmetic of the forward pass; weights stay fp32 (flex_*: except embeddings)",
    )
    compile: bool = _setting(False, None, "use torch.compile")
    max_failed_saves: int = _setting(
        3, count, "end the run after this many failed saves in a row (default: 3)"
    )  # saves
    strict_resume: bool = _setting(False, None, "refuse to continue when the resume is not exact")

    @classmethod
    def resolve(
        cls,
        flags: Mapping[str, Any],
        recorded: Mapping[str, Any],
        preset: Mapping[str, Any] | None = None,
        trained: int = 0,
    ) -> Settings:
        """Resolve the settings: a flag wins over the run so far, which wins over the preset of its kind.

        What skip_steps leaves out is added to what the run leaves out already, after `trained` steps.

        Raises: CheckpointMismatch naming a recorded setting of another type, which no flag replaces, or a batch to be
            left out that the run has trained on.
        """
        for f in fields(cls):
            value = recorded.get(f.name)
            replaced = f.name in flags and f.name != "skip_steps"
            if value is not None and not replaced and not _is_a(f.metadata["kind"], value):
                raise CheckpointMismatch(
                    f"training.{f.name} in the checkpoint's training state is {str(value)[:80]!r}, which is no such "
                    f"setting. Correct it there, or give --{f.name}."
                )
        told = {**(preset or {}), **recorded, **flags}
        if more := flags.get("skip_steps"):
            told["skip_steps"] = str(Skips.parse(recorded.get("skip_steps")).adding(Skips.parse(more), trained))
        return cls(**{f.name: told[f.name] for f in fields(cls) if f.name in told})

    def check(self) -> None:
        """Raise InputError when a number is impossible."""
        counts = ("eval_interval", "eval_iters", "max_iters", "gradient_accumulation_steps", "save_interval")
        for name in (*counts, "max_failed_saves"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1.")
        if self.lose_at_most is not None and not self.lose_at_most > 0:
            raise InputError(f"lose_at_most is {self.lose_at_most}, expected a number of seconds above 0.")

    def recorded(self, so_far: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The settings that a training state keeps for the continued run; those of the machine are left out.

        The arithmetic of a run that began in another program was recorded by that program, and stays recorded.
        """
        here = {"dtype", "compile", "max_failed_saves", "strict_resume"} - ({"dtype"} & (so_far or {}).keys())
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in here}

    def is_done(self, state: TrainingState, so_far: Mapping[str, Any]) -> bool:
        """Whether a checkpoint has all steps, and the evaluation of the last one where its run was to end there."""
        step = state.step or 0
        stopped_before_it = so_far.get("max_iters") == step and state.commit_id is not None and state.val_loss is None
        return step > self.max_iters or (step == self.max_iters and not stopped_before_it)

    def changes(self, recorded: Mapping[str, Any]) -> list[str]:
        """Report the settings that differ from the run so far."""
        known = {f.name for f in fields(self)} - {"max_iters"}
        return [
            f"{name}: {old} so far, {getattr(self, name)} from now on"
            for name, old in recorded.items()
            if name in known and old is not None and getattr(self, name) != old
        ]

    def schedule(self) -> Schedule:
        """Make the learning rate of each step; a fraction of warm-up is one of lr_decay_iters, never of max_iters.

        Raises: InputError when the numbers do not fit together.
        """
        warmup, decay = self.warmup_iters, self.lr_decay_iters
        if 0 < warmup < 1:
            if decay is None:
                raise InputError(f"--warmup_iters {warmup} is a fraction of --lr_decay_iters, which is not given.")
            warmup = warmup * decay
        return Schedule(self.lr_schedule, self.learning_rate, round(warmup), decay, self.min_lr)


_DECISIVE = ("lr_schedule", "warmup_iters", "grad_clip", "gradient_accumulation_steps", "dtype")
"""Settings that decide an update besides the learning rate and what the optimizer's own groups record."""


def origin_of(state: TrainingState, so_far: Mapping[str, Any], settings: Settings) -> list[str]:
    """Report where the settings are from, in the first run that continues a checkpoint of another program."""
    shown = ", ".join(f"{name} {value}" for name, value in so_far.items())
    if so_far and state.training is None:
        return [f"continuing with the settings of the program that wrote it, unless a flag overrides them: {shown}"]
    program = (state.extra or {}).get("program")
    if not so_far or not program or state.certificate is not None:
        return []
    lines = [f"continuing with the settings that {program} recorded, unless a flag overrides them: {shown}"]
    if missing := [f"{name} {getattr(settings, name)}" for name in _DECISIVE if name not in so_far]:
        lines.append(f"WARNING: {program} recorded no {', '.join(missing)}: these are this program's own")
    return lines
