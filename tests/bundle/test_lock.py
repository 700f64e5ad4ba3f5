"""One writer per folder: told who it is, taken over when it is dead."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from core.bundle import heartbeat, lock
from core.bundle.bundle import open_bundle
from core.bundle.lock import hold, is_held
from core.bundle.verify import verify
from core.errors import CheckpointLocked
from tests.makers.limits import wait_until
from tests.makers.locks import HOLDER, locked

if lock.KERNEL_LOCKS:
    import fcntl


@pytest.fixture(params=["kernel", "file"])
def kind(request, monkeypatch):
    if request.param == "kernel" and not lock.KERNEL_LOCKS:
        pytest.skip("this system has no flock")
    monkeypatch.setattr(lock, "KERNEL_LOCKS", request.param == "kernel")
    return request.param


@pytest.fixture
def holder(tmp_path, kind):
    with locked(tmp_path, kind) as child:
        yield child


def test_a_living_writer_is_named_with_process_and_host(tmp_path, holder):
    with pytest.raises(CheckpointLocked) as caught, hold(tmp_path):
        pass
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: process {holder.pid} on {socket.gethostname()} has been writing here since")
    assert "use another --model_name" in message


@pytest.mark.skipif(not lock.KERNEL_LOCKS, reason="this system has no flock")
@pytest.mark.parametrize("before", ["", "a dead owner"])
def test_a_writer_that_has_yet_to_write_its_name_is_named(tmp_path, before):
    with hold(tmp_path):
        mine = (tmp_path / ".lock").read_text()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    told = json.dumps({**json.loads(mine), "pid": gone.pid}) if before else ""
    with (tmp_path / ".lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.truncate(0)
        held.write(told)
        held.flush()
        late = threading.Timer(0.2, lambda: (tmp_path / ".lock").write_text(mine))
        late.start()
        with pytest.raises(CheckpointLocked, match=f"process {os.getpid()} on"), hold(tmp_path):
            pass
        late.join()


def test_a_writer_that_ended_leaves_the_folder_free(tmp_path, holder):
    holder.communicate(b"")
    assert holder.returncode == 0
    with hold(tmp_path):
        pass


@pytest.mark.skipif(not lock.KERNEL_LOCKS, reason="this system has no flock")
def test_a_lock_that_is_given_back_is_free_though_a_starting_child_has_its_file_open(tmp_path):
    with hold(tmp_path):
        copies = [os.dup(fd) for fd in lock._open]  # as between the fork of a child and its exec
    with (tmp_path / ".lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for fd in copies:
        os.close(fd)
    assert copies


def test_a_killed_writer_is_taken_over(tmp_path, holder, kind):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock-owner").exists()
    with hold(tmp_path):
        owner = json.loads((tmp_path / ".lock-owner").read_bytes())
        assert owner["pid"] == os.getpid()


def wait_for_lock(folder):
    def is_free():
        with contextlib.suppress(CheckpointLocked), hold(folder):
            return True

    wait_until(is_free)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_killed_writer_whose_forked_child_lives_on_is_taken_over(tmp_path):
    forks = "    import os\n    if child := os.fork():\n        print(child, flush=True)\n    time.sleep(300)\n"
    command = [sys.executable, "-c", HOLDER.partition("    print(")[0] + forks, str(tmp_path), "kernel"]
    writer = subprocess.Popen(command, cwd=Path(lock.__file__).parents[2], stdout=subprocess.PIPE)
    child = int(writer.stdout.readline())
    try:
        with pytest.raises(CheckpointLocked), hold(tmp_path):
            pass
        writer.kill()
        writer.wait()
        os.kill(child, 0)
        wait_for_lock(tmp_path)  # the child may not have come round to closing its copy
        with hold(tmp_path):
            assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
        writer.stdout.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_not_the_lock_of_its_parent_and_leaves_it(tmp_path, kind):
    with hold(tmp_path):
        if not (child := os.fork()):
            try:
                with hold(tmp_path):  # not the child's, though its parent has it
                    os._exit(1)
            except CheckpointLocked:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (tmp_path / ".lock-owner").exists()
        assert tmp_path.resolve() in lock._held


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_keeps_a_file_that_got_the_number_of_a_released_lock(tmp_path):
    others = set(lock._open)
    with hold(tmp_path):
        (number,) = set(lock._open) - others
    free = os.open(tmp_path, os.O_RDONLY)
    fd = os.dup2(free, number)
    try:
        if not (child := os.fork()):
            with contextlib.suppress(OSError):
                os.fstat(fd)
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        for one in {free, fd}:
            os.close(one)


def test_one_process_may_take_it_again_and_frees_it_at_the_outermost_end(tmp_path, kind):
    with hold(tmp_path):
        with hold(tmp_path):
            pass
        assert tmp_path.resolve() in lock._held
    assert tmp_path.resolve() not in lock._held
    with hold(tmp_path):
        pass


def test_an_error_inside_frees_it(tmp_path, kind):
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        raise ZeroDivisionError
    with hold(tmp_path):
        pass


@pytest.mark.parametrize("content", [b'{"pid": 1, "host": "elsewhere"}', b'{"pid": null, "host": "elsewhere"}'])
def test_an_owner_of_an_older_version_on_another_host_is_not_pushed_aside(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "KERNEL_LOCKS", False)
    owner = tmp_path / ".lock-owner"
    owner.write_bytes(content)
    with pytest.raises(CheckpointLocked, match=r"If that process is gone, delete .*\.lock-owner"), hold(tmp_path):
        pass
    assert owner.read_bytes() == content


def test_a_lock_made_while_a_dead_one_is_removed_goes_back(tmp_path):
    owner = tmp_path / ".lock-owner"
    owner.write_bytes(b'{"pid": 2, "host": "new"}')
    lock._bury(owner, {"pid": 1, "host": "old"})
    assert owner.read_bytes() == b'{"pid": 2, "host": "new"}'


@pytest.mark.parametrize("since", ["1970-01-01 00:00:00", "2999-12-31 23:59:59"])
def test_a_clock_that_jumped_decides_nothing(tmp_path, monkeypatch, since):
    monkeypatch.setattr(lock, "KERNEL_LOCKS", False)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = tmp_path / ".lock-owner"
    for pid, host, is_dead in (
        (os.getppid(), socket.gethostname(), False),
        (gone.pid, "elsewhere", False),
        (gone.pid, socket.gethostname(), True),
    ):
        owner.write_text(json.dumps({"pid": pid, "host": host, "since": since}))
        if is_dead:
            with hold(tmp_path):
                assert json.loads(owner.read_bytes())["pid"] == os.getpid()
        else:
            said = re.escape(f"{tmp_path}: process {pid} on {host} has been writing here since {since}")
            with pytest.raises(CheckpointLocked, match=said), hold(tmp_path):
                pass


@pytest.mark.slow
def test_of_two_trainers_at_once_one_is_refused_and_the_other_one_is_not_disturbed(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("In the middle of the journey of our life " * 200)
    line = [
        sys.executable, "-W", "ignore", "train.py", "--model_name", "both", "--max_iters", "1000000", "--n_layer", "1",
        "--n_head", "1", "--n_embd", "16", "--block_size", "16", "--batch_size", "2", "--device", "cpu",
        "--save_interval", "5", "--input_file", text, "--checkpoint_root", tmp_path,
    ]  # fmt: skip
    root = Path(lock.__file__).parents[2]
    kinds = {"cwd": root, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with contextlib.ExitStack() as ending:
        runs = [subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kinds) for _ in range(2)]
        for run in runs:
            ending.enter_context(run)
            ending.callback(run.kill)
        wait_until(lambda: any(run.poll() is not None for run in runs))
        refused, trains = sorted(runs, key=lambda run: run.poll() is None)
        said = refused.communicate()[1]
        assert refused.returncode == 1
        assert f"{tmp_path / 'both'}: process {trains.pid} on {socket.gethostname()} has been writing here" in said
        wait_until((tmp_path / "both" / "training_state.json").exists, trains)
        trains.send_signal(signal.SIGTERM)
        trains.communicate()
        assert trains.returncode == 75
        with open_bundle(tmp_path / "both") as bundle:
            assert verify(bundle) == [] and bundle.step > 0


@pytest.mark.timeout(20)
def test_a_forgotten_holder_that_a_new_thread_collects_does_not_wait_for_the_one_that_starts_it(tmp_path, monkeypatch):
    for name in ("forgotten", "dante"):
        (tmp_path / name).mkdir()
    forgotten = hold(tmp_path / "forgotten")
    forgotten.__enter__()

    class Collecting(threading.Thread):
        def _bootstrap_inner(self):
            forgotten.__exit__(None, None, None)  # as the garbage collector does with a generator that is left behind
            super()._bootstrap_inner()

    monkeypatch.setattr(heartbeat.threading, "Thread", Collecting)
    with hold(tmp_path / "dante"):
        assert not is_held(tmp_path / "forgotten")
    monkeypatch.undo()
