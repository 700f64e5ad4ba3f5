"""Stopped and asked to save at any moment, a run loses nothing: real processes, real signals."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading

import pytest

from core.bundle.training_state import TrainingState
from core.checkpoint import CheckpointManager
from core.console.commandline import DONE, FAILED, INTERRUPTED, STOPPED
from core.console.signals import StopSignal
from core.training.fit import FitResult
from core.training.settings import Settings
from tests.conftest import ROOT
from tests.makers import ranks
from tests.makers.limits import wait_until
from tests.makers.models import started
from tests.makers.runs import bits, fitted, loader, logged, same
from tests.scripts.test_train import ENVIRONMENT, command, state, train, wait_for_steps
from tests.scripts.test_train import text as text

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def start(root, text, *words, **flags):
    run = command(root, text, *words, **{"max_iters": 100_000, "eval_interval": 50_000, **flags})
    return subprocess.Popen(
        [sys.executable, ROOT / "tests/makers/talkative.py", *run[1:]], cwd=root,
        env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip


def read_until(run, words):
    said = ""
    while words not in said:
        said += run.stderr.read(1)
        assert run.poll() is None or words in said, said
    return said


def saved_step(run):
    """The next step that a run says it saved; None where it ends first."""
    found = (re.search(r"saved step (\d+) to ", line) for line in run.stderr)
    return next((int(match[1]) for match in found if match), None)


def same_run(a, b):
    """Whether two runs have the same weights, moments and log, validation included."""
    assert same(bits(a), bits(b))
    assert logged(a) == logged(b)
    assert logged(a, "val_loss") == logged(b, "val_loss")
    return state(a.parent, a.name)["best"] == state(b.parent, b.name)["best"]


# Signals


@posix
@pytest.mark.full  # half a minute; the moments of each kind have tests of their own
def test_stopped_at_random_moments_the_run_ends_with_the_bits_and_the_log_of_one_never_stopped(tmp_path, text):
    flags = {"max_iters": 60, "eval_interval": 6, "eval_iters": 10, "save_interval": 1, "dropout": 0.2}
    whole = train(tmp_path, text, **{**flags, "save_interval": 6}, model_name="whole")
    assert whole.returncode == DONE, whole.stderr
    chance, stops = random.Random(4), []
    while True:
        run = start(tmp_path, text, **flags, model_name="stopped")
        if len(stops) < 5:
            target = (stops or [0])[-1] + chance.randint(1, 6)
            while (saved_step(run) or target) < target:
                pass
            run.send_signal(chance.choice([signal.SIGTERM, signal.SIGINT]))
        _, said = run.communicate(timeout=200)
        if run.returncode == DONE:
            break
        assert run.returncode == STOPPED, said
        if "nothing new to save" in said:  # no step was made yet
            continue
        step = int(re.findall(r"stopped by SIG\w+ after step (\d+), which is saved", said)[-1])
        assert state(tmp_path, "stopped")["step"] == step == max(logged(tmp_path / "stopped"))
        stops.append(step)
    assert len(stops) >= 3 and stops == sorted(stops)
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


@posix
def test_a_save_asked_for_begins_at_the_end_of_the_step_and_training_goes_on(tmp_path, text):
    run = start(tmp_path, text, save_interval=100_000)
    wait_for_steps(run)
    for _ in range(3):
        run.send_signal(signal.SIGUSR1)
        said = read_until(run, "saved step ")
        step = int(read_until(run, " to ").split()[0])
        assert "SIGUSR1: saving after this step, then continuing" in said
        shown = re.findall(r"\| (\d+)/100000 ", said.split("SIGUSR1")[0])
        assert not shown or int(shown[-1]) <= step
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=200)
    assert run.returncode == STOPPED
    steps = logged(tmp_path / "default")
    assert max(steps) == state(tmp_path)["step"] > step and len(steps) == max(steps)


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
from core.training.fit import FitResult, fit
from tests.makers.models import started
from tests.makers.runs import loader

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


def slow_evaluation(tmp_path, text, **flags):
    """A run that evaluates for a minute at step 7, once it has begun to."""
    run = start(tmp_path, text, **{"eval_interval": 7, "eval_iters": 30_000, "save_interval": 7, **flags})
    wait_for_evaluation(tmp_path, run)
    return run


def wait_for_evaluation(tmp_path, run):
    read_until(run, "7/100000")
    read_until(run, "tokens/s")  # shown when what was asked for during the step was taken: the rest is the evaluation's


@posix
def test_evaluation_is_left_at_once_and_made_up_for_by_the_next_run(tmp_path, text):
    run = slow_evaluation(tmp_path, text)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=200)
    assert run.returncode == STOPPED and "stopped by SIGTERM after step 7, which is saved" in said
    assert "val_loss" not in state(tmp_path) and logged(tmp_path / "default", "val_loss") == {}
    flags = {"max_iters": 20, "eval_interval": 7, "eval_iters": 5, "save_interval": 7}
    whole, rest = train(tmp_path, text, **flags, model_name="whole"), train(tmp_path, text, **flags)
    assert rest.returncode == whole.returncode == DONE and "step 7: val loss " in rest.stderr, rest.stderr
    assert same_run(tmp_path / "whole", tmp_path / "default")


@pytest.mark.parametrize("interval", [3, 50])
def test_a_stop_in_the_last_step_is_said_and_the_next_run_makes_up_for_the_evaluation(tmp_path, interval):
    whole = fitted(started(tmp_path / "whole"), 6, eval_interval=interval)
    stop = StopSignal()
    run = _, model, _ = started(tmp_path / "stopped")
    model.register_forward_hook(lambda module, *_: setattr(stop, "signal", "SIGTERM") if module.step == 5 else None)
    assert fitted(run, 6, eval_interval=interval, stop=stop) == FitResult(6, None, "SIGTERM")
    assert (
        fitted(started(tmp_path / "stopped"), 6, eval_interval=interval) == whole == FitResult(6, whole.val_loss, None)
    )
    assert same_run(tmp_path / "whole/dante", tmp_path / "stopped/dante")


def test_a_run_is_done_at_its_last_step_unless_it_was_stopped_before_its_evaluation():
    stopped = TrainingState.from_dict({"step": 6, "commit_id": "a"})
    settings, so_far = Settings(max_iters=6), {"max_iters": 6}
    assert not settings.is_done(stopped, so_far)
    assert settings.is_done(stopped.having(val_loss=1.0), so_far)
    assert settings.is_done(stopped, {"max_iters": 9}) and settings.is_done(stopped.having(step=7), {"max_iters": 7})
    assert not settings.is_done(stopped.having(step=5), so_far)


@posix
def test_a_save_asked_for_while_evaluating_begins_there_and_the_measured_loss_is_added_to_it(tmp_path, text):
    run = slow_evaluation(tmp_path, text, eval_iters=4000)
    run.send_signal(signal.SIGUSR1)
    read_until(run, "saved step 7 ")
    saved = state(tmp_path)
    assert saved["step"] == 7 and "val_loss" not in saved and saved["best"] is None
    read_until(run, "step 7: train loss")
    read_until(run, "8/100000")
    wait_until(lambda: "val_loss" in state(tmp_path), run)
    added = state(tmp_path)
    assert added["commit_id"] == saved["commit_id"] or added["step"] > 7
    assert added["best"]["step"] == 7 and added["best"]["val_loss"] == logged(tmp_path / "default", "val_loss")[7]
    run.kill()
    run.communicate()
    assert train(tmp_path, text, max_iters=10).returncode == DONE


@posix
@pytest.mark.full  # both cores are busy for 36 s
def test_a_save_asked_of_one_rank_is_made_by_all_and_the_clock_of_one_stops_all(tmp_path, text):
    flags = {"max_iters": 100_000, "eval_interval": 100_000, "stop_after_minutes": 0.6}
    run = ranks.start(tmp_path, text, 2, **flags, save_interval=None)
    wait_until(lambda: "tokens/s" in ranks.output_of(tmp_path), run)
    ranks.kill(ranks.processes(run)[1], signal.SIGUSR1)
    run.wait(timeout=200)
    said = ranks.output_of(tmp_path)
    saved = [int(step) for step in re.findall(r"saved step (\d+) to", said)]
    assert len(saved) == 2 and saved == sorted(set(saved)), said
    assert (
        f"stopped by stop_after_minutes after step {saved[-1]}, which is saved. Run the same command to continue"
        in said
    )


def test_an_error_of_a_compiler_that_a_stop_has_reached_is_that_stop(tmp_path):
    """Ctrl-C in a terminal kills the compilers that an evaluation waits for."""
    for stops in (True, False):
        made, model, optimizer = started(tmp_path, f"stops_{stops}")
        batches, stop = loader(), StopSignal()

        def killed(i, stop=stop, stops=stops):
            stop.signal = "SIGINT" if stops else None
            raise RuntimeError("the compiler was killed")

        batches.val_batch = killed
        run, how = (made, model, optimizer), {"data_loader": batches, "eval_interval": 4, "stop": stop}
        if stops:
            assert fitted(run, 9, **how) == FitResult(4, None, "SIGINT") and made.saved_step() == 4
        else:
            with pytest.raises(RuntimeError, match="the compiler was killed"):
                fitted(run, 9, **how)


@posix
@pytest.mark.parametrize("when", ["training", "evaluating"])
def test_a_second_interrupt_ends_at_once_and_the_folder_resumes(tmp_path, text, when):
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
    run.communicate(timeout=200)
    assert run.returncode in (INTERRUPTED, STOPPED)  # it may have been quicker than this test
    step = CheckpointManager("default", tmp_path).saved_step() or 0  # perhaps committed and not yet at the top
    rest = train(tmp_path, text, max_iters=step + 3, eval_interval=50)
    assert rest.returncode == DONE, rest.stderr
    assert logged(tmp_path / "default").keys() == set(range(1, step + 4))


WRITING = """
import sys, threading, time
from core.console.signals import StopSignal

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
    _, rest = run.communicate(timeout=200)
    assert run.returncode == INTERRUPTED and b"interrupted; what was saved is intact" in rest


@posix
def test_a_storm_of_sigterms_ends_with_75_and_the_step_is_saved(tmp_path, text):
    run = start(tmp_path, text, save_interval=100_000)
    wait_for_steps(run)
    said = []
    reader = threading.Thread(target=lambda: said.append(run.communicate(timeout=200)[1]))
    reader.start()
    sent = 0
    while reader.is_alive():  # to the very end of the process
        run.send_signal(signal.SIGTERM)
        sent += 1
    assert sent >= 100 and run.returncode == STOPPED, said
    (step,) = re.findall(r"stopped by SIGTERM after step (\d+), which is saved", said[0])
    assert state(tmp_path)["step"] == int(step) == max(logged(tmp_path / "default"))
    assert said[0].count("SIGTERM: ") <= 2, "a storm is not told line by line"


AT_THE_END = """
import os, signal, sys
from core.console.commandline import STOPPED, run
from core.console.signals import StopSignal, decide_exit_code

def main(argv):
    if "before" in argv:
        os.kill(os.getpid(), signal.SIGTERM)
    with StopSignal(owns_process=True) as stop:
        stop.work_to_save = True
        os.kill(os.getpid(), signal.SIGTERM)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, name))
    import atexit
    atexit.register(lambda: [os.kill(os.getpid(), getattr(signal, n)) for n in ("SIGTERM", "SIGHUP", "SIGUSR1")])
    return int(argv[0])

decide_exit_code()
run(main)
"""


@posix
@pytest.mark.parametrize("code", [DONE, FAILED, STOPPED])
def test_no_signal_after_the_work_changes_the_exit_code(code):
    done = subprocess.run([sys.executable, "-c", AT_THE_END, str(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "nothing new to save" not in done.stderr


@posix
def test_a_signal_before_anything_has_begun_ends_with_75():
    done = subprocess.run([sys.executable, "-c", AT_THE_END, "0", "before"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == STOPPED
    assert done.stderr.strip() == "SIGTERM: nothing new to save. Run the same command to continue."


@posix
def test_a_signal_before_the_first_step_ends_with_75_and_nothing_is_lost(tmp_path, text):
    train(tmp_path, text, max_iters=5)
    before = (tmp_path / "default/training_state.json").read_bytes()
    run = start(tmp_path, text)
    read_until(run, "text:")
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=200)
    assert run.returncode == STOPPED
    if "SIGTERM: nothing new to save. Run the same command to continue." in said:
        assert (tmp_path / "default/training_state.json").read_bytes() == before
    assert train(tmp_path, text, max_iters=20).returncode == DONE


# What a system lacks


def test_without_sigusr1_the_others_work(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.take() == {"SIGTERM"} and stop.requested == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_than_the_first_no_signal_is_taken_and_the_time_limit_holds():
    found = []

    def work():
        with StopSignal(after_minutes=0.0) as stop:
            found.append(stop.requested)
            stop.work_to_save = True
            found.append(stop.requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, "stop_after_minutes"] and signal.getsignal(signal.SIGTERM) == before


@posix
def test_a_second_interrupt_of_a_library_is_a_keyboard_interrupt_and_a_save_is_asked_for_once():
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.take() == {"SIGUSR1"} and stop.take() == set()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.take() == {"SIGINT"} == stop.take()
        os.kill(os.getpid(), signal.SIGINT)


# Time


def test_saves_by_the_clock_change_nothing_but_when_they_are_made(tmp_path):
    results = []
    for name, minutes in (("seldom", None), ("often", 1e-6)):
        made, model, optimizer = started(tmp_path, name)
        said = []
        made.say = said.append
        fitted((made, model, optimizer), 12, eval_interval=6, eval_iters=2, save_every_minutes=minutes)
        results.append([re.search(r"step (\d+)", line)[1] for line in said if line.startswith("saved")])
    assert results == [["6", "12"], [str(step) for step in range(1, 13)]]
    assert same_run(tmp_path / "seldom", tmp_path / "often")


# Flags


def test_the_flags_of_saving_are_obeyed_and_those_of_a_machine_are_not_remembered(tmp_path, text):
    done = train(
        tmp_path,
        text,
        max_iters=5,
        save_policy="skip",
        stage_memory="0",
        max_failed_saves=1,
        save_every_minutes=5,
        lose_at_most="1h",
    )
    assert done.returncode == DONE, done.stderr
    assert state(tmp_path)["training"]["save_every_minutes"] == 5
    assert state(tmp_path)["training"]["lose_at_most"] == 3600
    assert not {"save_policy", "stage_memory", "max_failed_saves"} & state(tmp_path)["training"].keys()


@pytest.mark.parametrize("arch", ["gpt", "flex_small"])
def test_a_flag_that_contradicts_the_model_is_said_even_when_nothing_is_left_to_train(tmp_path, text, arch):
    sizes = {"n_head": 1, "n_embd": 128, "block_size": 64, "n_layer": 6} if arch != "gpt" else {}
    flags = {"max_iters": 2, "arch": arch, **sizes, **({"batch_size": None} if arch != "gpt" else {})}
    done = train(tmp_path, text, **flags)
    assert done.returncode == DONE, done.stderr
    width = 128 if arch != "gpt" else 16
    done = train(tmp_path, text, **{**flags, "n_embd": 999, "n_head": None})
    assert done.returncode == FAILED and f"n_embd is 999 here and {width} in the checkpoint" in done.stderr, done.stderr
    assert "nothing to do" in train(tmp_path, text, **flags).stderr
