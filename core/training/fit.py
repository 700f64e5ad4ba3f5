"""The training loop: every step is a function of (seed, step), so that a resumed run makes the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader as TorchLoader

from ..checkpoint import CheckpointManager
from ..console.signals import StopSignal
from ..data.dataloader import DataLoader
from ..inspection.notebook import table_html
from ..model import GPT, GPTFlexAttention
from ..networks.distributed import ALONE, World
from .ema import check_decay
from .loop import Loop
from .pair_loader import PairLoader, batches_of
from .schedule import Schedule
from .settings import Settings


@dataclass(frozen=True)
class FitResult:
    """How a call of `fit` ended."""

    step: int
    val_loss: float | None  # of this step
    stopped_by: str | None  # the name of the signal, or stop_after_minutes

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        loss = "not measured" if self.val_loss is None else f"{self.val_loss:.4f}"
        ended = f"stopped by {self.stopped_by}" if self.stopped_by else "done"
        return table_html("Training", [("ended", ended), ("step", f"{self.step:,}"), ("validation loss", loss)])


def fit(
    model: GPT | GPTFlexAttention,
    *,
    data_loader: DataLoader | TorchLoader[Any],
    optimizer: torch.optim.Optimizer,
    max_iters: int,
    val_loader: TorchLoader[Any] | None = None,
    checkpoint_dir: str | Path | None = None,
    manager: CheckpointManager | None = None,
    schedule: Schedule | None = None,
    eval_interval: int = 250,
    eval_iters: int = 20,
    save_interval: int | None = None,
    save_every_minutes: float | None = None,
    lose_at_most: float | None = None,
    max_failed_saves: int = 3,
    grad_clip: float = 1.0,
    gradient_accumulation_steps: int = 1,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    ema: float = 0.0,
    progress: bool = True,
    strict_resume: bool = False,
    stop: StopSignal | None = None,
    world: World = ALONE,
) -> FitResult:
    """Train from the model's step up to `max_iters` updates, with evaluations and saves on the way and at the end.

    Batches, dropout and learning rate are functions of (seed, step): N steps, a resume and M steps equal N + M steps.
    Intervals are counted in optimizer steps, `eval_iters` in batches of batch_size sequences, `save_every_minutes` in
    minutes of the wall clock; a step sees `gradient_accumulation_steps` such batches, shared among the ranks of a
    `world`. Every rank calls this with the same arguments; all of them obey a signal to one, at the end of the
    same step.

    A torch DataLoader gives pairs (x, y) of ids [B, T] ([T] or [1, T] for GPTFlexAttention), y those that follow or -1;
    each rank has one of its own, and takes `gradient_accumulation_steps` batches of it a step. From one of
    `core.data.resumable` every step is exact again after a resume. Any other begins anew in each call: a resume is
    exact in all but its batches, which one line reports and `strict_resume` refuses. The validation loss is that of the
    first `eval_iters` batches of `val_loader`; without one it is not measured.

    Without `checkpoint_dir` or `manager` nothing is saved; `save_interval` is `eval_interval` unless given. With
    `lose_at_most` it also saves as often as it takes to lose at most so many seconds of work when killed. Without a
    `schedule` the learning rate stays as the optimizer has it. SIGINT and SIGTERM finish the step, save and return,
    SIGUSR1 saves and continues; `stop` may be entered already, and may limit the time. The last step is durable when
    this returns. A failed save is reported and training continues; after `max_failed_saves` failures in a row the run
    ends. `ema` is the decay of an average of the weights, kept as `ema.pt`. `torch.float16` scales the loss; a step
    whose gradients overflow counts as a step, but makes no update. A resume is compared with the certificate of its
    step: one line reports whether it is exact, and what differs.

    Raises: TrainingDiverged when a loss or gradient is no longer finite, SaveFailed for the last of too many failed
    saves or for the save of the last step, InputError; CheckpointMismatch when `strict_resume` is set and the resume
    is not exact, before anything is changed.
    """
    settings = Settings(
        grad_clip=grad_clip,
        gradient_accumulation_steps=gradient_accumulation_steps,
        ema=ema,
        eval_interval=eval_interval,
        eval_iters=eval_iters,
        save_interval=save_interval,
        save_every_minutes=save_every_minutes,
        lose_at_most=lose_at_most,
        max_iters=max_iters,
        compile=compile,
        max_failed_saves=max_failed_saves,
        strict_resume=strict_resume,
    )
    if manager is None and checkpoint_dir is not None:
        manager = CheckpointManager.of_folder(checkpoint_dir)
    loader = batches_of(data_loader, val_loader, gradient_accumulation_steps, model)
    result = fit_with(settings, model, loader, optimizer, manager, schedule, dtype, progress, stop, world)
    if isinstance(loader, PairLoader):
        loader.close(result.step)
    return result


def fit_with(
    settings: Settings,
    model: GPT | GPTFlexAttention,
    loader: DataLoader | PairLoader,
    optimizer: torch.optim.Optimizer,
    manager: CheckpointManager | None,
    schedule: Schedule | None,
    dtype: torch.dtype,
    progress: bool = True,
    stop: StopSignal | None = None,
    world: World = ALONE,
) -> FitResult:
    """Train as `fit` does, with complete settings; `dtype` is the arithmetic of the forward pass."""
    settings.check()
    check_decay(settings.ema)
    loop = Loop(model, loader, optimizer, manager, schedule, settings, dtype, world)
    deterministic = settings.compile and loop.device.type == "cpu"
    with (
        manager.holding() if manager else contextlib.nullcontext(),
        _deterministic() if deterministic else contextlib.nullcontext(),
        contextlib.nullcontext(stop) if stop else StopSignal() as stop,
        loop.open(progress),
        loop.ema.following(optimizer) if loop.ema else contextlib.nullcontext(),
    ):
        stopping = loop.run(stop)
        if manager:
            manager.wait()
        stop.work_to_save = False
        ended = model.step == settings.max_iters and not loop.is_unmeasured
        return FitResult(model.step, loop.measured_loss(), None if ended else stopping)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    # Compiled for several threads, the gradient of an embedding is added up by atomics, in no fixed order.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
