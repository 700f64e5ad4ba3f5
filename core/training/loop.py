"""One run of the training loop: its state between two steps, and its work at each."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..bundle.intact import say_on_stderr
from ..bundle.training_state import TrainingState
from ..checkpoint import CheckpointManager
from ..console.progress import step_bar
from ..console.signals import SAVE_BY_CLOCK, SAVING, StopSignal, reason
from ..data.dataloader import DataLoader
from ..data.randomness import mix
from ..errors import CheckpointMismatch, TrainingDiverged
from ..model import GPT, GPTFlexAttention
from ..networks.device import environment, seed_generator
from ..networks.distributed import World, whole
from ..networks.muon import MuonWithAdamW
from .certificate import EXACT, certificate_of, differences, make_certificate, settings_of, state_digests, verdict
from .ema import Ema
from .grad_scaler import SMALLEST, make_scaler
from .pair_loader import NOT_REPLAYED, PairLoader
from .save_timing import RunSaves
from .schedule import Schedule
from .settings import Settings
from .skips import Skips

LOG_INTERVAL = 10
"""Steps between two reads of the loss: each read waits for the device."""


class Loop:
    """One call of `fit`: the state of the loop between two steps, none of which a resume needs."""

    def __init__(
        self,
        model: GPT | GPTFlexAttention,
        data_loader: DataLoader | PairLoader,
        optimizer: torch.optim.Optimizer,
        manager: CheckpointManager | None,
        schedule: Schedule | None,
        settings: Settings,
        dtype: torch.dtype,
        world: World,
    ) -> None:
        self.settings = settings
        self.model = model
        self.world = world
        if isinstance(data_loader, PairLoader):
            self.share = data_loader.share(world)
        else:
            self.share = world.share(data_loader.batch_size, settings.gradient_accumulation_steps)
        self.forward: Any = world.wrap(model)
        if settings.compile:
            self.forward = torch.compile(self.forward)
        self.loader = data_loader
        self.skips = Skips.parse(settings.skip_steps)
        self.optimizer = optimizer
        self.manager = manager
        self.schedule = schedule
        self.dtype = dtype
        self._measured: tuple[int, float] | None = None
        self._begun = -1  # the step whose save began last
        self.device = next(model.parameters()).device
        late = world.size > 1 and self.device.type != "cpu"  # what ranks ask for is read at the next edge
        self.saves = RunSaves(manager, settings, 2 if late else 1) if manager else None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.autocast = torch.autocast(self.device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
        self.scaler = make_scaler(self.device, dtype, self._recorded().scaler)
        self.ema = self._make_ema(settings.ema)
        self._unseen: list[tuple[int, float, torch.Tensor, torch.Tensor]] = []
        self._since_evaluation: list[float] = []
        self._started = time.perf_counter()

    def _recorded(self) -> TrainingState:
        """The training state of the step that training continues from: resumed, or saved by this manager."""
        if not self.manager:
            return TrainingState()
        resumed, saved = self.manager.resumed, self.manager.facts
        return (
            TrainingState.from_dict({**saved, **resumed})
            if resumed.step == self.model.step
            else resumed.having(**saved)
        )

    def _make_ema(self, decay: float) -> Ema | None:
        saved = self.manager.averages if self.manager else None
        if decay and saved is None and self.model.step:
            say_on_stderr(f"ema: the average begins at step {self.model.step}, with its weights")
        if not decay and saved is not None:
            say_on_stderr(f"ema: off from step {self.model.step} on; later steps have no average")
        ema = Ema(self.model, decay, saved) if decay else None
        if self.manager:
            self.manager.averages = ema.tensors() if ema else None
        return ema

    @contextlib.contextmanager
    def open(self, progress: bool) -> Iterator[None]:
        """Report whether the resume is exact, cut the log back to its step, and show a bar."""
        self.model.train()
        facts = self._recorded()
        self._tokens, self._seconds = facts.tokens_seen or 0, facts.elapsed_seconds or 0.0
        self.environment = environment(
            self.device,
            dtype=self.dtype,
            compile=hasattr(self.forward, "_orig_mod"),
            fused=bool(self.optimizer.param_groups[0].get("fused")),
            ranks=self.world.size,
        )
        self._compare_resume(self.settings.strict_resume)
        if not self.loader.replays:
            say_on_stderr(NOT_REPLAYED)
        if self.skips.ranges:
            say_on_stderr(f"the batches of steps {self.skips} are left out (--skip_steps)")
        if self.manager and self.world.is_first and (said := self.manager.logs.begin(self.model.step)):
            say_on_stderr(f"WARNING: {said}")
        self._look_from_here()
        self._bar = step_bar(self.model.step, self.settings.max_iters, progress)
        with self._bar:
            yield

    def run(self, stop: StopSignal) -> str | None:
        """Train to the last step, or until something requests a stop; return what requested it."""
        settings, model = self.settings, self.model
        save_interval = settings.save_interval or settings.eval_interval
        stopping = self.measure_resumed(stop)
        # A stop need not wait for compilation: until it is done there is nothing to lose.
        stop.work_to_save = not settings.compile
        while model.step < settings.max_iters and not stopping:
            self.update()
            stop.work_to_save = True
            wishes = self.edge(stop)
            at_interval = model.step % settings.eval_interval == 0 or model.step == settings.max_iters
            if model.step % LOG_INTERVAL == 0 or at_interval:
                self.look()
            stopping = reason(wishes)
            if at_interval and self.loader.validates and not stopping:
                stopping = self._evaluate_in_time(stop)
            ends = model.step == settings.max_iters or stopping is not None
            named = self.manager is not None and self.manager.wants(model.step)
            if model.step % save_interval == 0 or named or wishes or ends or self._begun == model.step:
                self.save(now=named or SAVING in wishes, last=ends)
        return stopping

    def _evaluate_in_time(self, stop: StopSignal) -> str | None:
        """Evaluate, as `evaluate`; a save for which it would be too late after it begins before it."""
        if not self.saves:
            return self.evaluate(stop)
        if self.settings.lose_at_most and self.world.any(self.saves.is_due_before_evaluation()):
            self.save()
        stopping = self.evaluate(stop)
        self.saves.evaluated()
        return stopping

    def _compare_resume(self, strict: bool) -> None:
        if self.manager is None or not self.model.step or self.manager.resumed.step != self.model.step:
            return
        state = self.manager.resumed
        live = {}
        if certificate_of(state):
            live = state_digests(self.model, self.optimizer, self.ema, self.manager.known_sums)
        line = verdict(state, differences(state, {**self.manager.facts, **self._facts()}, live))
        if strict and line != EXACT:
            raise CheckpointMismatch(
                f"{self.manager.checkpoint_dir}: {line} This run asked for an exact resume (--strict_resume); nothing "
                "was changed."
            )
        say_on_stderr(line)

    def _facts(self) -> dict[str, Any]:
        """The facts of this run in a training state, for the run that continues it."""
        settings = settings_of(self.optimizer, self.schedule, self.settings.grad_clip, self.ema)
        settings["skip_steps"] = str(self.skips) or None
        step, accumulation = self.model.step, self.settings.gradient_accumulation_steps
        made = make_certificate(step, self._number(step), self.loader, self.model, accumulation, settings)
        return {"environment": self.environment, "certificate": made}

    def _number(self, step: int) -> int:
        """The number of the batch, counted from 0, that follows `step` updates."""
        return self.skips.batch_of(step + 1) - 1

    def update(self) -> None:
        """Make one optimizer step: the rank's part of the global batch, micro-step by micro-step."""
        model, step = self.model, self.model.step
        number = self._number(step)
        rate = self.schedule.at(step) if self.schedule else self.optimizer.param_groups[0]["lr"]
        if self.schedule:
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
        if isinstance(self.optimizer, MuonWithAdamW):
            self.optimizer.warm_up(step)
        total = torch.zeros((), device=self.device)
        mine = self.share.micro_steps
        for micro in mine:
            x, y = self._to_device(
                self.loader.batch(number, micro, self.share.rows)
            )  # ids and their successors, [B, T]
            # Dropout is seeded again for each micro-step: its noise is then a function of (seed, step, micro-step,
            # rank), and a resume needs no generator state, even if an evaluation or a sample has drawn in between.
            seed_generator(mix(self.loader.seed, step, micro, *self.world.noise), self.device)
            with self.world.without_sync(self.forward, last=micro == mine[-1]):
                with self.autocast:
                    loss = self.forward(x, y)[1] / len(mine)
                self.scaler.scale(loss).backward()
            total += loss.detach()
            self._tokens += x.numel() * self.world.size
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip or math.inf))
        self.scaler.step(self.optimizer)  # skipped where gradients overflowed
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        model.step = step + 1
        self._unseen.append((model.step, rate, total, norm))
        self._bar.update()

    def edge(self, stop: StopSignal) -> set[str]:
        """Average the loss of this step over the ranks, and return what is requested of any of them."""
        wishes = stop.take()
        if self.saves:
            self.saves.check()
            wishes |= {SAVE_BY_CLOCK} if self.saves.is_due() else set()
        return self.world.at_edge(self._unseen[-1][2], wishes)

    def _to_device(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.device.type == "cuda":
            x, y = (t.pin_memory().to(self.device, non_blocking=True) for t in batch)
            return x, y
        return batch

    def look(self) -> None:
        """Read the losses of the last steps, log them, and stop at the first that is not finite."""
        for step, rate, loss_tensor, norm_tensor in self._unseen:
            loss, norm = loss_tensor.item(), norm_tensor.item()
            if not math.isfinite(loss) or not math.isfinite(norm):
                if self.scaler.is_enabled() and (scale := self.scaler.get_scale()) >= SMALLEST:
                    self._skipped(step, rate, scale)
                    continue
                what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
                self._diverged(step, what)
            self._since_evaluation.append(loss)
            self._log_update(step, loss, rate, norm)
        if self._unseen:
            tokens, seconds = self._tokens - self._looked[0], time.perf_counter() - self._looked[1]
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s")
        self._unseen.clear()
        self._look_from_here()

    def _skipped(self, step: int, rate: float, scale: float) -> None:
        say_on_stderr(f"step {step}: gradients overflowed fp16, no update made; loss scale {scale:g}")
        self._log_update(step, None, rate, None)

    def _log(self, step: int, **values: Any) -> None:
        if self.manager and self.world.is_first:
            self.manager.log(step, **values)

    def _log_update(self, step: int, loss: float | None, rate: float, norm: float | None) -> None:
        batch = self.skips.batch_of(step)
        shifted = {"batch": batch} if batch != step else {}
        self._log(step, loss=loss, learning_rate=rate, grad_norm=norm, **shifted)

    def _look_from_here(self) -> None:
        self._looked = self._tokens, time.perf_counter()

    def _diverged(self, step: int, what: str) -> None:
        kept = "No step was saved."
        if self.manager:
            saved = self.manager.saved_step()
            kept = f"The last saved step is {saved}, in {self.manager.checkpoint_dir}." if saved is not None else kept
        raise TrainingDiverged(f"step {step}: {what}. {kept} Try a lower --learning_rate.")

    def measure_resumed(self, stop: StopSignal) -> str | None:
        """Evaluate the resumed step, if the previous run was stopped before its evaluation; as `evaluate`."""
        state = self.manager.resumed if self.manager else TrainingState()
        step, settings = self.model.step, self.settings
        at = state.step == step and (step % settings.eval_interval == 0 or step == settings.max_iters)
        to_do = at and self.loader.validates and state.commit_id is not None and state.val_loss is None
        if not self.saves or not to_do:
            return None
        self.saves.step = self._begun = step
        stopping = self.evaluate(stop)
        if not stopping:
            self.save()
        return stopping

    def evaluate(self, stop: StopSignal) -> str | None:
        """Measure the loss on fixed batches of the validation split; each rank takes every size-th batch.

        A save that is requested in between begins there. A request to stop ends it at once, and is returned.
        """
        self.model.eval()
        total, stopping = torch.zeros((), dtype=torch.float64), None
        for first in range(0, self.settings.eval_iters, self.world.size):
            wishes = self.world.wishes(stop.take())
            if stopping := reason(wishes):
                break
            if SAVING in wishes:
                self.save(now=True)
            try:
                self._add_val_loss(first + self.world.rank, total)
            except Exception:
                if self.world.size > 1 or not stop.requested:
                    raise
                # A Ctrl-C in a terminal also reaches the compilers that torch.compile started.
                stopping = stop.requested
                break
        self.model.train()
        if stopping:
            return stopping
        loss = self.world.sum(total).item() / self.settings.eval_iters
        if not math.isfinite(loss):
            self._diverged(self.model.step, f"validation loss is {loss}")
        self._measured = self.model.step, loss
        self._log(self.model.step, val_loss=loss)
        seen = self._since_evaluation
        train_loss = f"train loss {math.fsum(seen) / len(seen):.4f}, " if seen else ""
        say_on_stderr(f"step {self.model.step}: {train_loss}val loss {loss:.4f}")
        seen.clear()
        self._look_from_here()
        return None

    @torch.inference_mode()
    def _add_val_loss(self, i: int, total: torch.Tensor) -> None:
        x, y = self._to_device(self.loader.val_batch(min(i, self.settings.eval_iters - 1)))
        with self.autocast:
            loss = self.forward(x, y)[1]  # on every rank, counted or not: a sharded model needs all of them
        if i < self.settings.eval_iters:
            total += loss.item()

    @property
    def is_unmeasured(self) -> bool:
        """Whether a saved step lacks its evaluation, which the next run makes up for."""
        return self.saves is not None and self.loader.validates and self.measured_loss() is None

    def measured_loss(self) -> float | None:
        """The validation loss of this step; None where it was not measured."""
        return self._measured[1] if self._measured and self._measured[0] == self.model.step else None

    def save(self, now: bool = False, last: bool = False) -> None:
        """Begin to commit this step, its log lines first; if it is saved already, add the metrics measured since."""
        if not self.saves:
            return
        self.look()
        begin = self._commit
        if self._begun == self.model.step:
            self.saves.check(wait=True)
            if self.world.from_first(self.saves.step == self.model.step):
                begin = self._commit_measured
        self._begun = self.model.step
        self.saves.begin(self.model.step, begin, now=now, last=last)
        self._look_from_here()

    def _commit(self) -> bool:
        assert self.manager
        self.manager.facts |= {
            "seed": self.loader.seed,
            "tokens_seen": self._tokens,
            "elapsed_seconds": round(self._seconds + time.perf_counter() - self._started, 3),
            "schedule": self.schedule.to_dict() if self.schedule else None,
            **self._facts(),
        }
        if self.scaler.is_enabled():
            self.manager.facts["scaler"] = self.scaler.state_dict()  # its scale, and the steps since it last grew
        metrics, ema = self._new_metrics(), self.ema.tensors() if self.ema else None
        return self.manager.save(self.model, self.optimizer, step=self.model.step, metrics=metrics, ema=ema)

    def _commit_measured(self) -> bool:
        assert self.manager
        if metrics := self._new_metrics():
            self.manager.add_metrics(self.model.step, metrics)
        return True

    def _new_metrics(self) -> dict[str, float]:
        loss = self.measured_loss()
        return {} if loss is None else {"val_loss": loss}
