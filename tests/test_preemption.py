"""Stopped and asked to save at any moment, a run loses nothing: real processes, real signals."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from core.commandline import DONE, FAILED, INTERRUPTED, STOPPED, WRONG_USE
from core.stop import StopSignal
from tests.conftest import ROOT
from tests.helpers import TEXT
from tests.test_train_script import ENVIRONMENT, command, state, text, train, wait_for_steps  # noqa: F401

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def start(root, text, *words, **flags):
    return subprocess.Popen(
        command(root, text, *words, **{"max_iters": 100_000, "eval_interval": 50_000, **flags}), cwd=root,
        env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip


def read_until(run, words):
    said = ""
    while words not in said:
        said += run.stderr.read(1)
        assert run.poll() is None or words in said, said
    return said


def lines(folder, key="loss"):
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in logged if key in line}


def same_run(a, b):
    """Whether two runs have the same weights, moments and log, validation included."""
    for name in ("model.pt", "optimizer.pt"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert lines(a) == lines(b)
    assert lines(a, "val_loss") == lines(b, "val_loss")
    return state(a.parent, a.name)["best"] == state(b.parent, b.name)["best"]


# Signals


@posix
def test_stopped_at_random_moments_the_run_ends_with_the_bits_and_the_log_of_one_never_stopped(tmp_path, text):  # noqa: F811
    flags = {"max_iters": 600, "eval_interval": 20, "eval_iters": 10, "save_interval": 1, "dropout": 0.2}
    whole = train(tmp_path, text, **flags, model_name="whole")
    assert whole.returncode == DONE, whole.stderr
    chance, stops = random.Random(4), []
    while True:
        run = start(tmp_path, text, **flags, model_name="stopped")
        if len(stops) < 6:
            read_until(run, "step/s]" if stops else "?step/s")
            time.sleep(chance.uniform(0, 0.3))
            run.send_signal(chance.choice([signal.SIGTERM, signal.SIGINT]))
        _, said = run.communicate(timeout=120)
        if run.returncode == DONE:
            break
        assert run.returncode == STOPPED, said
        step = int(re.findall(r"stopped by SIG\w+ at step (\d+), saved", said)[-1])
        assert state(tmp_path, "stopped")["step"] == step == max(lines(tmp_path / "stopped"))
        stops.append(step)
    assert len(stops) >= 3 and stops == sorted(stops)
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


@posix
def test_a_save_asked_for_begins_at_the_end_of_the_step_and_training_goes_on(tmp_path, text):  # noqa: F811
    run = start(tmp_path, text, save_interval=100_000)
    wait_for_steps(run)
    for _ in range(3):
        run.send_signal(signal.SIGUSR1)
        said = read_until(run, "saved step ")
        step = int(read_until(run, " to "). split()[0])
        assert "SIGUSR1: saving as soon as this step is done, and going on" in said
        shown = re.findall(r"\| (\d+)/100000 ", said.split("SIGUSR1")[0])
        assert not shown or int(shown[-1]) <= step
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == STOPPED
    logged = lines(tmp_path / "default")
    assert max(logged) == state(tmp_path)["step"] > step and len(logged) == max(logged)


@posix
def test_the_step_that_a_signal_saves_is_the_one_it_interrupts(tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(SIGNAL_IN_STEP)
    done = subprocess.run(
        [sys.executable, script, tmp_path], env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "9", "15", "15", "SIGTERM"], done.stdout


SIGNAL_IN_STEP = """
import os, signal, sys
from pathlib import Path
import torch
from core.training import fit
from tests.helpers import started
from tests.test_resume import loader

made, model, optimizer = started(Path(sys.argv[1]))
def on_step(*_):
    number = {3: signal.SIGUSR1, 8: signal.SIGUSR1, 14: signal.SIGTERM}.get(model.step)
    if number:
        os.kill(os.getpid(), number)
optimizer.register_step_post_hook(on_step)
save = made.save
def noted(*words, step, **more):
    print(step)
    return save(*words, step=step, **more)
made.save = noted
with made:
    result = fit(model, data_loader=loader(), optimizer=optimizer, max_iters=50, manager=made, eval_interval=50)
print(result.step, result.stopped_by)
"""


def slow_evaluation(tmp_path, text, **flags):  # noqa: F811
    """A run that evaluates for a minute at step 7, once it has begun to."""
    run = start(tmp_path, text, **{"eval_interval": 7, "eval_iters": 30_000, "save_interval": 7, **flags})
    wait_for_evaluation(tmp_path, run)
    return run


def wait_for_evaluation(tmp_path, run):
    read_until(run, "7/100000")
    time.sleep(0.3)


@posix
def test_evaluation_is_left_at_once_and_made_up_for_by_the_next_run(tmp_path, text):  # noqa: F811
    run = slow_evaluation(tmp_path, text)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == STOPPED and "stopped by SIGTERM at step 7, saved" in said
    assert "val_loss" not in state(tmp_path) and lines(tmp_path / "default", "val_loss") == {}
    flags = {"max_iters": 20, "eval_interval": 7, "eval_iters": 5, "save_interval": 7}
    whole, rest = train(tmp_path, text, **flags, model_name="whole"), train(tmp_path, text, **flags)
    assert rest.returncode == whole.returncode == DONE and "step 7: val loss " in rest.stderr, rest.stderr
    assert same_run(tmp_path / "whole", tmp_path / "default")


@posix
def test_a_save_asked_for_while_evaluating_begins_there_and_the_measured_loss_is_added_to_it(tmp_path, text):  # noqa: F811
    run = slow_evaluation(tmp_path, text, eval_iters=4000)
    run.send_signal(signal.SIGUSR1)
    read_until(run, "saved step 7 ")
    saved = state(tmp_path)
    assert saved["step"] == 7 and "val_loss" not in saved and saved["best"] is None
    read_until(run, "step 7: train loss")
    read_until(run, "8/100000")
    while "val_loss" not in (added := state(tmp_path)):
        assert run.poll() is None
    assert added["commit_id"] == saved["commit_id"] or added["step"] > 7
    assert added["best"]["step"] == 7 and added["best"]["val_loss"] == lines(tmp_path / "default", "val_loss")[7]
    run.kill()
    run.communicate()
    assert train(tmp_path, text, max_iters=10).returncode == DONE


@posix
@pytest.mark.parametrize("when", ["training", "evaluating"])
def test_a_second_interrupt_ends_at_once_and_the_folder_resumes(tmp_path, text, when):  # noqa: F811
    if when == "training":
        run = start(tmp_path, text, save_interval=1)
        wait_for_steps(run)
    else:
        run = slow_evaluation(tmp_path, text, save_interval=1)
    # Stopped by the kernel between the two, it cannot have ended by itself.
    run.send_signal(signal.SIGSTOP)
    run.send_signal(signal.SIGINT)
    run.send_signal(signal.SIGCONT)
    read_until(run, "SIGINT: finishing this step, then saving (a second Ctrl-C ends at once)")
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    assert run.returncode in (INTERRUPTED, STOPPED)  # it may have been quicker than this test
    step = state(tmp_path)["step"]
    rest = train(tmp_path, text, max_iters=step + 3, eval_interval=50)
    assert rest.returncode == DONE, rest.stderr
    assert lines(tmp_path / "default").keys() == set(range(1, step + 4))


WRITING = """
import sys, threading, time
from core.stop import StopSignal

with StopSignal(owns_process=True) as stop:
    stop.work_to_save = True
    threading.Thread(target=lambda: time.sleep(600)).start()  # a writer that takes its time
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


@posix
def test_a_second_interrupt_waits_for_no_thread_that_writes(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", WRITING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.readline()
    run.send_signal(signal.SIGTERM)
    read = b""
    while b"SIGTERM: finishing this step" not in read:
        read += run.stderr.read1(100)
    run.send_signal(signal.SIGTERM)
    while b"SIGTERM: already stopping" not in read:
        read += run.stderr.read1(100)
    run.send_signal(signal.SIGINT)
    while b"SIGINT: already stopping" not in read:
        read += run.stderr.read1(100)
    run.send_signal(signal.SIGINT)
    _, rest = run.communicate(timeout=60)
    assert run.returncode == INTERRUPTED and b"interrupted; what was saved is intact" in rest


@posix
def test_a_signal_before_the_first_step_ends_with_75_and_nothing_is_lost(tmp_path, text):  # noqa: F811
    train(tmp_path, text, max_iters=5)
    before = (tmp_path / "default/training_state.json").read_bytes()
    run = start(tmp_path, text)
    run.send_signal(signal.SIGCONT)
    while not (cmdline := run.poll()) and "train.py" not in open(f"/proc/{run.pid}/cmdline").read():  # noqa: PTH123, SIM115
        pass
    assert cmdline is None
    read_until(run, "tokens:" if False else "text:")
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == STOPPED
    if "SIGTERM: nothing new to save. Go on with the same line." in said:
        assert (tmp_path / "default/training_state.json").read_bytes() == before
    assert train(tmp_path, text, max_iters=20).returncode == DONE
