"""The scripts of docs/clusters.md, run as they stand there, with the real train.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from core.console.commandline import DONE, FAILED, STOPPED
from tests.conftest import ROOT
from tests.makers.models import TEXT
from tests.scripts.test_train import ENVIRONMENT, SIZES, wait_for_steps

LOOP, SLURM, TORCHRUN = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/clusters.md").read_text(), re.DOTALL)

pytestmark = pytest.mark.skipif(os.name != "posix" or not shutil.which("bash"), reason="needs bash")


def start(tmp_path, script, *words, torchrun=f'exec "{sys.executable}" -m torch.distributed.run "$@"'):
    """Run a script, with this Python as `python`, a `torchrun`, and a queue that notes what it is asked."""
    (tmp_path / "text.txt").write_text(TEXT * 40)
    (tmp_path / "job.sh").write_text(script)
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    lines = {
        "python": f'exec "{sys.executable}" tests/makers/talkative.py "$@"',
        "scontrol": f'echo "$@" >> "{tmp_path}/asked"',
        "torchrun": torchrun,
    }
    for name, line in lines.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    sizes = {**SIZES, "checkpoint_root": tmp_path / "models", "input_file": tmp_path / "text.txt"}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    environment = {**ENVIRONMENT, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    return subprocess.Popen(
        ["bash", tmp_path / "job.sh", *flags, *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, start_new_session=True, preexec_fn=hear_interrupts,
    )  # fmt: skip


def hear_interrupts():
    """What a shell starts in the background ignores SIGINT, and a shell cannot trap what it was started to ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def step(tmp_path):
    return json.loads((tmp_path / "models/dante/training_state.json").read_text())["step"]


def test_the_shell_loop_goes_on_until_the_run_is_done(tmp_path):
    run = start(tmp_path, LOOP, "--max_iters", "3", "--stop_after_minutes", "0.0001")
    _, said = run.communicate(timeout=300)
    assert run.returncode == DONE, said
    assert re.findall(r"stopped by stop_after_minutes after step (\d)", said) == ["1", "2", "3"] and step(tmp_path) == 3


def test_the_shell_loop_ends_with_the_failure_of_its_run(tmp_path):
    run = start(tmp_path, LOOP, "--max_iters", "3", "--n_head", "3")
    _, said = run.communicate(timeout=300)
    assert run.returncode == FAILED and said.count("error: ") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_shell_loop_is_stopped_by_a_signal_and_what_was_trained_is_saved(tmp_path, number):
    run = start(tmp_path, LOOP, "--max_iters", "1000000", "--eval_interval", "1000000")
    wait_for_steps(run)
    run.send_signal(number)
    _, said = run.communicate(timeout=300)
    assert run.returncode == STOPPED and f"stopped by SIGTERM after step {step(tmp_path)}, which is saved" in said


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_runs_out_of_time_is_queued_again_and_one_that_is_cancelled_is_not(tmp_path, number):
    run = start(tmp_path, SLURM, "--max_iters", "1000000", "--eval_interval", "1000000")
    wait_for_steps(run)
    run.send_signal(number)
    _, said = run.communicate(timeout=300)
    assert run.returncode == STOPPED and f"after step {step(tmp_path)}, which is saved" in said
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 4711\n" if number == signal.SIGUSR1 else "")


SAVED = "stopped by SIGTERM after step 7, which is saved. Run the same command to continue."


@pytest.mark.parametrize(
    ("said", "its", "code"), [(SAVED, 1, STOPPED), ("error: no", 1, FAILED), ("done", 0, DONE), (SAVED, 0, DONE)]
)
def test_of_torchrun_what_the_first_rank_said_decides(tmp_path, said, its, code):
    script = TORCHRUN.replace("run.err", str(tmp_path / "run.err"))
    run = start(tmp_path, script, torchrun=f"echo '{said}' >&2; exit {its}")
    assert run.communicate(timeout=60)[1] == f"{said}\n" and run.returncode == code


@pytest.mark.full  # two ranks: half a minute
def test_a_real_torchrun_that_is_stopped_ends_with_75_by_that_script(tmp_path):
    script = TORCHRUN.replace("run.err", str(tmp_path / "run.err"))
    run = start(tmp_path, script, "--max_iters", "1000000", "--stop_after_minutes", "0.0001")
    _, said = run.communicate(timeout=300)
    assert run.returncode == STOPPED and f"after step {step(tmp_path)}, which is saved" in said
    assert re.search(r"exitcode\s*: 75", said), "torchrun calls it a failure"
