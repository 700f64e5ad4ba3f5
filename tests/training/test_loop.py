"""When the loop saves, what it shows of its steps, and from when on a signal waits for a step."""

from __future__ import annotations

import math
import re
import types

import pytest
import torch
from tqdm import tqdm

from core.console.signals import StopSignal
from core.training import loop
from core.training.grad_scaler import SMALLEST
from core.training.loop import LOG_INTERVAL
from tests.makers.models import started
from tests.makers.runs import fitted, loader, losses
from tests.training.test_fp16 import LIVELY

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_evaluation_between_saves_saves_nothing(tmp_path):
    made, model, optimizer = started(tmp_path)
    saved, save = [], made.save
    made.save = lambda *what, step, **more: (saved.append(step), save(*what, step=step, **more))[1]
    fitted((made, model, optimizer), 9, eval_interval=2, eval_iters=2, save_interval=4)
    assert saved == [4, 8, 9]


def test_each_evaluation_says_the_mean_loss_of_the_steps_since_the_one_before(tmp_path, capsys):
    made, model, optimizer = started(tmp_path)
    fitted((made, model, optimizer), 9, eval_interval=4, eval_iters=1)
    seen = losses(tmp_path)
    said = re.findall(r"step (\d+): train loss (\S+), val loss", capsys.readouterr().err)
    expected = [(first, last) for first, last in ((1, 4), (5, 8), (9, 9))]
    means = [math.fsum(seen[n] for n in range(a, b + 1)) / (b - a + 1) for a, b in expected]
    assert said == [(str(last), f"{mean:.4f}") for (_, last), mean in zip(expected, means, strict=True)]
    assert len({text for _, text in said}) == 3


def test_the_tokens_per_second_leave_out_what_a_save_and_an_evaluation_take(tmp_path, monkeypatch):
    """By a clock of our own: a step takes one second, a save and a batch of an evaluation a thousand."""
    now, shown = [0.0], []
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(tqdm, "set_postfix_str", lambda self, text: shown.append(text.partition(", ")[2]))
    made, model, optimizer = started(tmp_path)
    batches = loader()
    batch, val_batch, save = batches.batch, batches.val_batch, made.save

    def slow(seconds, call, *args, **more):
        now[0] += seconds
        return call(*args, **more)

    batches.batch = lambda *args: slow(1, batch, *args)
    batches.val_batch = lambda *args: slow(1000, val_batch, *args)
    made.save = lambda *args, **more: slow(1000, save, *args, **more)
    fitted((made, model, optimizer), 12, data_loader=batches, eval_interval=6, eval_iters=1, save_interval=3)
    assert len(shown) == 5 and set(shown) == {"64 tokens/s"}, shown


@pytest.mark.parametrize("compiles", [False, True])
def test_a_signal_in_the_first_step_waits_for_it_unless_it_is_being_compiled(tmp_path, monkeypatch, compiles):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    made, model, optimizer = started(tmp_path)
    batches, stop, waits = loader(), StopSignal(), []
    batch = batches.batch
    batches.batch = lambda *args: (waits.append(stop.work_to_save), batch(*args))[1]
    fitted((made, model, optimizer), 3, data_loader=batches, stop=stop, compile=compiles, eval_iters=1)
    assert waits[:3] == [not compiles, True, True] and not stop.work_to_save


def test_a_scale_that_overflows_at_the_smallest_is_still_one_that_may_be_too_high(tmp_path):
    made, model, optimizer = started(tmp_path)
    with torch.no_grad():
        model.ln_f.weight[3] = float("nan")
    made.facts["scaler"] = LIVELY | {"scale": SMALLEST * 2**LOG_INTERVAL}
    with pytest.raises(loop.TrainingDiverged, match=rf"step {LOG_INTERVAL + 1}: loss is nan\."):
        fitted((made, model, optimizer), 99, dtype=torch.float16)
