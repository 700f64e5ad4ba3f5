"""When a run must save so that a kill loses at most so much work, by clocks of our own."""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.bundle.commit import ModelFolder
from core.console.commandline import duration
from core.data.dataloader import DataLoader
from core.errors import InputError
from core.saving import background
from core.training import save_timing
from core.training.lost_work import LostWork, must_begin, plan
from tests.makers.models import started, state_of
from tests.makers.runs import fitted, loader, logged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("since", "begins"), [(0, False), (26, False), (27, False), (27.5, True), (100, True)])
def test_a_save_begins_at_the_last_edge_from_which_it_is_durable_in_time(since, begins):
    assert must_begin(since, ahead=1, writing=2, limit=30) is begins


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ((30, 0.2, 2), "lose_at_most 30 s: saves about every 140 steps (a step takes 0.2 s, a save 2 s)"),
        ((4, 1, 1.5), "lose_at_most 4 s: saves about every 2 steps (a step takes 1 s, a save 1.5 s)"),
        (
            (30, 0.25, 45),
            "lose_at_most 30 s cannot be kept: a save takes 45 s until it is durable, so up to 90.2 s of work may be "
            "lost; one save begins when the one before it is durable",
        ),
        ((30, 0.0, 1), "lose_at_most 30 s: saves about every 1 steps (a step takes 0 s, a save 1 s)"),
    ],
)
def test_the_plan_is_one_line_with_its_numbers(times, said):
    assert plan(*times) == said


def simulated(limit, step, writing, edges, evaluations=(), steps=400):
    """The captures of a run, and the most work that a kill could lose at any time of it."""
    lost, now, captures, asked, durable_at, worst = LostWork(limit, 0.0, edges), 0.0, [0.0], [], None, 0.0
    for n in range(steps):
        now += step
        if len(captures) > 1 and captures[-1] + writing <= now and durable_at != captures[-1] + writing:
            durable_at = captures[-1] + writing
            worst = max(worst, durable_at - captures[-2])
        lost.ended(durable_at)
        lost.step_ended(now)
        if lost.is_due(now) and not asked:
            asked.append(n + edges - 1)
        before = n in evaluations and lost.is_due(now, evaluates=True)
        if before or n in asked:
            asked.clear()
            captures.append(now)
            lost.began(now)
            lost.goes_on(now)
        if n in evaluations:
            now += evaluations[n]
            lost.evaluated(now)
    return captures, worst


@settings(max_examples=150, deadline=None)
@given(st.floats(0.01, 3), st.floats(0.01, 20), st.floats(1, 4), st.sampled_from([1, 2]))
def test_no_kill_loses_more_than_the_limit_and_no_save_is_made_much_too_early(step, writing, slack, edges):
    limit = slack * (2 * writing + 2 * (edges + 1) * step)
    captures, worst = simulated(limit, step, writing, edges)
    assert worst <= limit * (1 + 1e-9)
    between = [b - a for a, b in itertools.pairwise(captures[1:])]
    assert all(gap > limit - writing - (edges + 1) * step - 1e-6 for gap in between)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 8), st.integers(5, 60))
def test_a_save_for_which_it_is_too_late_after_an_evaluation_begins_before_it(evaluation, interval):
    evaluations = dict.fromkeys(range(interval, 400, interval), evaluation)
    _, worst = simulated(limit=20, step=0.5, writing=4, edges=1, evaluations=evaluations)
    assert worst <= 20 + 1e-9


def test_a_limit_that_cannot_be_kept_makes_one_save_after_the_other():
    captures, worst = simulated(limit=5, step=1, writing=6, edges=1, steps=60)
    assert {b - a for a, b in itertools.pairwise(captures[2:])} == {6}
    assert worst == 12


def test_the_times_of_the_last_saves_decide_and_a_failed_one_is_not_measured():
    lost = LostWork(20, 0.0)
    for now in (50.0, 51.0, 52.0):  # the first step, which compiles, is none
        lost.step_ended(now)
    lost.began(52.0)
    assert not lost.is_due(90.0), "while one is written"
    assert lost.ended(55.0) == plan(20, 1.0, 3.0) and lost.ended(55.0) is None
    assert [lost.is_due(now) for now in (68.0, 68.5)] == [False, True]
    lost.began(68.5)
    lost.failed(70.0)
    assert [lost.is_due(now) for now in (86.0, 86.5)] == [False, True]
    lost.began(86.5)
    assert lost.ended(97.5) == plan(20, 1.0, 11.0), "from now on it cannot be kept"
    for begun in (100.0, 110.0, 120.0):
        lost.began(begun)
        assert lost.ended(begun + 3) is None
    assert [lost.is_due(now) for now in (136.0, 136.5)] == [False, True], "the slow one is forgotten"


def trained(tmp_path, monkeypatch, end, writing=3, keep_every=None, **how):
    """The steps that a run saves whose steps take one second, by a clock of our own."""
    now, saved = [100.0], []

    def tick(seconds):
        now[0] += seconds

    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(save_timing, "time", clock)
    monkeypatch.setattr(background, "time", clock)
    made, model, optimizer = started(tmp_path, keep_every=keep_every)
    if "data_loader" in how:
        how["data_loader"].tick = tick
    optimizer.register_step_post_hook(lambda *_: tick(1))
    save = made.save

    def slow(*what, step, **more):
        saved.append(step)
        begun = save(*what, step=step, before_commit=lambda: tick(writing), **more)
        made._saver.join()
        return begun

    made.save = slow
    fitted((made, model, optimizer), end, **how)
    return saved


def test_a_run_saves_just_often_enough(tmp_path, monkeypatch, capsys):
    # Until a save is measured it is taken to need 10 of 20 seconds: step 10. Then 17 seconds lie between two captures,
    # in three of which this run waits for the save.
    assert trained(tmp_path, monkeypatch, 40, lose_at_most=20) == [10, 24, 38, 40]
    said = capsys.readouterr().err
    assert said.count("lose_at_most") == 1
    assert "lose_at_most 20 s: saves about every 17 steps (a step takes 1 s, a save 3 s)\n" in said
    assert list(logged(tmp_path / "dante", "val_loss")) == [40]


def test_a_step_that_is_saved_before_its_evaluation_gets_its_loss_after_it(tmp_path, monkeypatch):
    """An evaluation of every fifth step takes four seconds, the first one nobody knows how many."""
    batches, val_batch = loader(), DataLoader.val_batch
    batches.val_batch = lambda i: (batches.tick(4), val_batch(batches, i))[1]
    how = {"data_loader": batches, "eval_interval": 5, "save_interval": 100, "lose_at_most": 20, "keep_every": 20}
    # 5, since the first evaluation may take any time; 11: a step later 17 + 1 + 3 seconds could be lost; 20: after its
    # evaluation and a step 16 + 4 + 1 + 3; 26: as 11.
    assert trained(tmp_path, monkeypatch, 28, **how) == [5, 11, 20, 26, 28]
    assert state_of(tmp_path / "dante/step_00000020")["val_loss"] == logged(tmp_path / "dante", "val_loss")[20]


def test_with_an_interval_whichever_comes_first_saves(tmp_path, monkeypatch):
    assert trained(tmp_path, monkeypatch, 40, lose_at_most=20, save_interval=15) == [10, 15, 29, 30, 40]


def test_a_limit_below_the_time_of_a_save_is_said_with_both_numbers_and_the_best_is_done(tmp_path, monkeypatch, capsys):
    assert trained(tmp_path, monkeypatch, 6, lose_at_most=5) == [2, 3, 4, 5, 6]
    assert (
        "lose_at_most 5 s cannot be kept: a save takes 3 s until it is durable, so up to 7 s" in capsys.readouterr().err
    )


def test_after_a_save_that_failed_the_next_is_as_late_as_after_any_other(tmp_path, monkeypatch, capsys):
    full = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
    commit = ModelFolder.commit

    def full_once(self, stage):
        if full:
            raise full.pop()
        commit(self, stage)

    monkeypatch.setattr(ModelFolder, "commit", full_once)
    assert trained(tmp_path, monkeypatch, 40, lose_at_most=20) == [10, 21, 35, 40]
    assert "save of step 10 failed" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "seconds"), [("30s", 30), ("5m", 300), ("1h", 3600), ("45", 45), ("0.5m", 30)])
def test_a_time_is_seconds_or_has_a_unit(word, seconds):
    assert duration(word) == seconds


@pytest.mark.parametrize("word", ["", "s", "0", "0s", "-5", "5 s", "1d", "1h30m", "nan", "inf", "1e3", "9" * 400])
def test_what_is_no_time_is_refused(word):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a time above 0 such as 30s, 5m or 1h"):
        duration(word)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_fit_refuses_a_limit_that_is_no_time(tmp_path, limit):
    with pytest.raises(InputError, match=r"lose_at_most is .*, expected a number of seconds above 0\."):
        fitted(started(tmp_path), 1, lose_at_most=limit)
