"""The training loop: every step is a function of (seed, step), so that a resumed run makes the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import CheckpointManager
from ..console.signals import SAVING, StopSignal, reason
from ..data.dataloader import DataLoader
from ..errors import InputError
from ..model import GPT, GPTFlexAttention
from ..networks.distributed import ALONE, World
from .ema import check_decay
from .loop import Run
from .save_timing import RunSaves
from .schedule import Schedule

LOG_INTERVAL = 10
"""Steps between two looks at the loss: each look waits for the device."""


@dataclass(frozen=True)
class FitResult:
    """How a call of `fit` ended."""

    step: int
    val_loss: float | None  # of this step
    stopped_by: str | None  # the name of the signal, or stop_after_minutes


def fit(
    model: GPT | GPTFlexAttention,
    *,
    data_loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    max_iters: int,
    checkpoint_dir: str | Path | None = None,
    manager: CheckpointManager | None = None,
    schedule: Schedule | None = None,
    eval_interval: int = 250,
    eval_iters: int = 20,
    save_interval: int | None = None,
    save_every_minutes: float | None = None,
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
    """Train from the model's step up to `max_iters` updates, evaluating and saving on the way and at the end.

    Batches, dropout and learning rate are functions of (seed, step): N steps, a resume and M steps equal N + M steps.
    Without `checkpoint_dir` or `manager` nothing is saved; `save_interval` is `eval_interval` unless given, and
    `save_every_minutes` saves besides. A learning rate without a `schedule` stays what the optimizer has. SIGINT and
    SIGTERM finish the step, save and return, SIGUSR1 saves and goes on; `stop` may have been entered before, and may
    limit the time. A save that fails is said and training goes on, up to `max_failed_saves` in a row.
    With `ema` an average of the weights goes along, of this decay, as `ema.pt`. `torch.float16` scales the loss; a step
    whose gradients overflow is a step of the loop that makes no update.
    A resume is compared with the certificate of its step: one line says whether it is exact, and what differs.
    The ranks of a `world` share each batch; a signal to one of them is obeyed by all at the end of the same step.

    Raises: TrainingDiverged when a loss or gradient is no longer a number, SaveFailed for the last of too many failed
    saves or for that of the last step, InputError; CheckpointMismatch when `strict_resume` is asked for and the resume
    is not exact, before anything is changed.
    """
    counts = {"eval_interval": eval_interval, "eval_iters": eval_iters, "max_iters": max_iters}
    counts |= {"gradient_accumulation_steps": gradient_accumulation_steps, "save_interval": save_interval or 1}
    counts |= {"max_failed_saves": max_failed_saves}
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} is {value}, expected at least 1.")
    check_decay(ema)
    if manager is None and checkpoint_dir is not None:
        manager = CheckpointManager.of_folder(checkpoint_dir)
    saves = RunSaves(manager, save_every_minutes, max_failed_saves) if manager else None
    run = Run(
        model,
        data_loader,
        optimizer,
        manager,
        saves,
        schedule,
        eval_iters,
        grad_clip,
        gradient_accumulation_steps,
        dtype,
        ema,
        world,
    )
    if compile:
        run.forward = torch.compile(run.forward)
    save_interval = save_interval or eval_interval
    with (
        manager.writing() if manager else contextlib.nullcontext(),
        _deterministic() if compile and run.device.type == "cpu" else contextlib.nullcontext(),
        contextlib.nullcontext(stop) if stop else StopSignal() as stop,
        run.open(max_iters, progress, strict_resume),
        run.ema.following(optimizer) if run.ema else contextlib.nullcontext(),
    ):
        stopping = run.measure_resumed(eval_interval, stop)
        stop.work_to_save = not compile  # compiling is not waited for: until it is done there is nothing to lose
        while model.step < max_iters and not stopping:
            run.update()
            stop.work_to_save = True
            wishes = run.edge(stop)
            evaluates = model.step % eval_interval == 0 or model.step == max_iters
            if model.step % LOG_INTERVAL == 0 or evaluates:
                run.look()
            stopping = reason(wishes)
            if evaluates and not stopping:
                stopping = run.evaluate(stop)
            ends = model.step == max_iters or stopping is not None
            if model.step % save_interval == 0 or wishes or ends:
                run.save(now=SAVING in wishes, last=ends)
        if manager:
            manager.wait()
        stop.work_to_save = False
        return FitResult(model.step, run.measured_loss(), stopping if model.step < max_iters else None)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    # Compiled for several threads, the gradient of an embedding is added up by atomics, in whatever order they come.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
