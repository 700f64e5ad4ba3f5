"""fp16 with a scaled loss, on the CPU: the scale resumes exactly, and a step without an update is still a step."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from core.errors import CheckpointMismatch
from core.loading.optimizer import configure_optimizer
from core.training.grad_scaler import make_scaler
from core.training.schedule import Schedule
from tests.makers.models import SMALL, equal, manager, started, state_of, weights
from tests.makers.runs import bits, fitted, same

LIVELY = {"scale": 2.0**22, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3, "_growth_tracker": 1}
"""A scale that is too high at first and soon again: steps without an update come at the start and in the middle."""


CURVE = Schedule("cosine", 1e-2, 3, 30)


def go_on(root, *ends, scaler=LIVELY, dtype=torch.float16, ema=0.9, loop=None, **settings):
    """Train to each end in turn, each in a manager of its own; `loop` replaces the fused kernel."""
    for end in ends:
        made, model, optimizer = started(root, config={**SMALL, "dropout": 0.2})
        if loop and not made.resumed:  # a resumed one goes on with the kernel it had
            named = [list(zip(g["param_names"], g["params"], strict=True)) for g in optimizer.param_groups]
            optimizer = torch.optim.AdamW([{"params": pairs} for pairs in named], lr=1e-3, foreach=False)
        if scaler and not made.resumed:
            made.facts["scaler"] = scaler
        fitted((made, model, optimizer), end, schedule=CURVE, dtype=dtype, ema=ema, **settings)
    return model, optimizer


def log(root):
    lines = [json.loads(line) for line in (root / "dante/metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "grad_norm" in line}


def skipped(root):
    return [step for step, line in log(root).items() if line["grad_norm"] is None]


@pytest.mark.parametrize("loop", [False, True], ids=["fused", "loop"])
@pytest.mark.parametrize("cut", [1, 4, 9])
def test_n_steps_and_then_m_equal_n_plus_m_with_scale_and_skipped_steps(tmp_path, one_thread, cut, loop, capsys):
    go_on(tmp_path / "once", 16, loop=loop)
    capsys.readouterr()
    go_on(tmp_path / "twice", cut, 16, loop=loop)
    assert "resume is exact\n" in capsys.readouterr().err
    assert same(bits(tmp_path / "once/dante"), bits(tmp_path / "twice/dante"))
    assert equal(*(torch.load(tmp_path / f"{run}/dante/ema.pt", weights_only=True) for run in ("once", "twice")))
    states = [state_of(tmp_path / f"{run}/dante") for run in ("once", "twice")]
    assert states[0]["scaler"] == states[1]["scaler"] != LIVELY
    assert log(tmp_path / "once") == log(tmp_path / "twice")
    steps = skipped(tmp_path / "once")
    assert steps and steps[0] == 1 and any(b - a > 1 for a, b in itertools.pairwise(steps)), steps


def test_a_manager_that_went_back_goes_on_with_the_scale_and_the_tokens_of_that_step(tmp_path, one_thread):
    model, optimizer = go_on(tmp_path, 4, save_interval=2)
    first = state_of(tmp_path / "dante")
    made = manager(tmp_path)
    with made:
        for back in (2, 2):  # the second time over what this manager has saved itself
            made.go_back(back)
            model.step = made.load(model, optimizer)
            fitted((made, model, optimizer), 4, schedule=CURVE, dtype=torch.float16, ema=0.9)
            again = state_of(tmp_path / "dante")
            for name in ("scaler", "tokens_seen"):
                assert again[name] == first[name]


@pytest.mark.parametrize("loop", [False, True], ids=["fused", "loop"])
def test_a_skipped_step_takes_its_batch_and_its_rate_and_leaves_weights_and_counts(tmp_path, one_thread, loop, capsys):
    go_on(tmp_path / "a", 1, loop=loop)
    _, model, _ = started(tmp_path / "new", config={**SMALL, "dropout": 0.2})
    assert skipped(tmp_path / "a") == [1]
    assert "step 1: gradients overflowed fp16, no update made; loss scale 2.09715e+06\n" in capsys.readouterr().err
    assert equal(bits(tmp_path / "a/dante")[0], weights(model))
    state = state_of(tmp_path / "a/dante")
    assert state["step"] == 1 and state["tokens_seen"] == 64 and state["scaler"]["scale"] == 2.0**21
    counts = {float(v) for k, v in bits(tmp_path / "a/dante")[1].items() if k.endswith("step")}
    assert counts <= {0.0}, "AdamW counts the updates it made"
    go_on(tmp_path / "a", 16, loop=loop)
    made = 16 - len(skipped(tmp_path / "a"))
    assert {float(v) for k, v in bits(tmp_path / "a/dante")[1].items() if k.endswith("step")} == {float(made)}
    assert log(tmp_path / "a")[2]["learning_rate"] == CURVE.at(1)


def test_going_on_in_another_dtype_is_said(tmp_path, one_thread, capsys):
    go_on(tmp_path, 3)
    capsys.readouterr()
    go_on(tmp_path, 5, dtype=torch.float32)
    assert "Kernels may differ in the last bits: dtype float16 then, float32 now." in capsys.readouterr().err
    with pytest.raises(CheckpointMismatch, match="dtype float32 then, float16 now"):
        go_on(tmp_path, 7, strict_resume=True)


def test_other_dtypes_have_no_scale(tmp_path, one_thread):
    go_on(tmp_path, 2, dtype=torch.bfloat16, scaler=None)
    assert "scaler" not in state_of(tmp_path / "dante")
    assert not make_scaler(torch.device("cpu"), torch.float32, LIVELY).is_enabled()


@pytest.mark.parametrize(
    "saved", [None, [], {"scale": "high"}, {"scale": float("inf")}, {"scale": True}, {"growth": 1}]
)
def test_a_state_that_is_none_leaves_the_scale_of_a_new_run(saved):
    new = make_scaler(torch.device("cpu"), torch.float16, None).state_dict()
    assert make_scaler(torch.device("cpu"), torch.float16, saved).state_dict() == new
    assert make_scaler(torch.device("cpu"), torch.float16, LIVELY).state_dict() == LIVELY


def test_an_update_is_that_of_unscaled_gradients(one_thread):
    """A scale is a power of two: it changes no bit of a gradient that neither overflows nor underflows."""
    nets = []
    for scaled in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 3)
        optimizer = configure_optimizer(net, 1e-2)
        scaler = make_scaler(torch.device("cpu"), torch.float16 if scaled else torch.float32, None)
        for step in range(4):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            scaler.scale(net(x).square().mean()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        nets.append(weights(net))
    assert equal(*nets)
