"""A save that fails is said, and training goes on; too many in a row, or the last one, end the run."""

from __future__ import annotations

import errno
import json
import os
import re

import pytest

from core.console.signals import StopSignal
from core.errors import SaveFailed
from tests.makers.models import started
from tests.makers.runs import fitted, loader, logged
from tests.scripts.test_train import state
from tests.scripts.test_train import text as text

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def fit_with_failing(tmp_path, failing, steps=8, **settings):
    """Train with a save after each step; the commits of the named steps meet a full disk."""
    made, model, optimizer = started(tmp_path)
    commit = made._folder.commit

    def full_at(stage):
        step = json.loads((stage / "training_state.json").read_text())["step"]
        if step in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        commit(stage)

    made._folder.commit = full_at
    return fitted((made, model, optimizer), steps, save_interval=1, **settings)


def test_a_failed_save_is_said_and_training_goes_on(tmp_path, capsys):
    assert fit_with_failing(tmp_path, {2, 3, 5, 6}).step == 8
    said = capsys.readouterr().err
    assert said.count("WARNING: ") == 4
    for step, intact, count in ((2, 1, 1), (3, 1, 2), (5, 4, 1), (6, 4, 2)):
        assert re.search(
            rf"WARNING: .*dante: save of step {step} failed: No space left on device \(.*\)\. "
            rf"Step {intact} is intact\. Training continues \(failed saves in a row: {count} of 3\)\.",
            said,
        ), said
    assert logged(tmp_path / "dante").keys() == set(range(1, 9)) and state(tmp_path, "dante")["step"] == 8


def test_too_many_failed_saves_in_a_row_end_the_run_and_the_last_step_is_intact(tmp_path):
    with pytest.raises(SaveFailed, match=r"step 5 failed.*Step 2 is intact\. That makes 3 failed saves in a row"):
        fit_with_failing(tmp_path, {3, 4, 5}, steps=20)
    assert state(tmp_path, "dante")["step"] == 2
    with pytest.raises(SaveFailed, match=r"step 3 failed.*That makes 1 failed saves in a row"):
        fit_with_failing(tmp_path, {3}, steps=20, max_failed_saves=1)


def test_the_save_of_the_last_step_must_not_fail(tmp_path):
    with pytest.raises(SaveFailed, match="save of step 8 failed"):
        fit_with_failing(tmp_path, {8}, max_failed_saves=100)


def test_a_save_that_fails_in_an_evaluation_is_made_again_after_it(tmp_path, capsys):
    made, model, optimizer = started(tmp_path)
    commit, failures = made._folder.commit, [5]

    def full_once(stage):
        if failures:
            failures.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        commit(stage)

    made._folder.commit = full_once
    stop = StopSignal()
    batches = loader()
    val_batch = batches.val_batch

    def asking(i):
        stop._save = stop._save or i == 1
        return val_batch(i)

    batches.val_batch = asking
    fitted((made, model, optimizer), 5, data_loader=batches, eval_iters=4, stop=stop)
    assert "save of step 5 failed" in capsys.readouterr().err and not failures
    assert state(tmp_path, "dante")["step"] == 5
    assert state(tmp_path, "dante")["val_loss"] == logged(tmp_path / "dante", "val_loss")[5]
