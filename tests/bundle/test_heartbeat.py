"""The lock of the living is never taken, that of the dead always: other hosts, containers, copies, moved folders."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from core.bundle import heartbeat, lock, owner
from core.bundle.heartbeat import RECORD, Record, lives, read, this_process
from core.bundle.lock import LOCK, hold, is_held
from core.checkpoint import CheckpointManager
from core.errors import CheckpointLocked
from tests.conftest import ROOT
from tests.makers.limits import wait_until

ELSEWHERE = """
import sys
from pathlib import Path
from core.bundle import heartbeat, lock, owner
heartbeat.BEAT = 0.02
owner.boot = lambda: "another machine"
lock.KERNEL_LOCKS = False
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
HERE = ELSEWHERE.replace('owner.boot = lambda: "another machine"\nlock.KERNEL_LOCKS = False\n', "")

needs_flock = pytest.mark.skipif(not lock.KERNEL_LOCKS, reason="this system has no flock")
needs_proc = pytest.mark.skipif(owner.boot() is None, reason="this system has no /proc")


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENCE", 0.3)
    monkeypatch.setattr(lock, "COMPLETED", 0.1)


@pytest.fixture
def patience(monkeypatch):
    """Enough for a busy machine to let the other process write once; nobody waits for longer than that."""
    monkeypatch.setattr(heartbeat, "SILENCE", 60.0)


@pytest.fixture(params=["kernel", "record"])
def kind(request, monkeypatch):
    if request.param == "kernel" and not lock.KERNEL_LOCKS:
        pytest.skip("this system has no flock")
    monkeypatch.setattr(lock, "KERNEL_LOCKS", request.param == "kernel")


@contextlib.contextmanager
def writer(folder, program=HERE):
    """Another process that writes in a folder."""
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout.readline() == b"held\n"
            yield child
        finally:
            child.kill()


def refused(folder):
    """What a writer that is refused is told, and the lines that are said while it waits."""
    said = []
    with pytest.raises(CheckpointLocked) as caught, hold(folder, said.append):
        pass
    return str(caught.value), said


def here(folder, **others):
    return {**this_process(folder), "beat": "0000000000", **others}


def ended():
    """The number of a process that has ended."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    return gone.pid


@needs_proc
def test_what_a_record_proves(tmp_path):
    mine = here(tmp_path)
    device, inode = mine["folder"]
    assert lives(mine, mine) is True
    for other, expected in (
        ({"began": mine["began"] - 1}, False),  # pid 1 again after pid 1
        ({"pid": ended()}, False),
        ({"namespace": "pid:[1]"}, None),  # a container, also one with this host name
        ({"namespace": "pid:[1]", "pid": ended()}, None),
        ({"boot": "before, or elsewhere"}, None),
        ({"boot": "before, or elsewhere", "pid": ended()}, None),
        ({"host": "renamed"}, True),
        ({"folder": [device, inode + 1]}, False),  # the record of another folder, copied
        ({"folder": [device + 1, inode]}, None),  # a copy, or the same folder under another mount
        ({"folder": [device + 1, inode], "pid": ended()}, False),
        ({"pid": "1"}, None),
    ):
        assert lives({**mine, **other}, mine) is expected, other
    assert lives({}, mine) is None
    locked = {**mine, "lock": [device, 7]}
    elsewhere = {**locked, "namespace": "pid:[1]"}
    assert lives(elsewhere, locked) is False  # the kernel has given this process its lock
    assert lives(elsewhere, {**locked, "lock": [device, 8]}) is None
    assert lives(elsewhere, {**locked, "lock": None}) is None


def test_a_record_where_nothing_tells_about_processes(tmp_path):
    mine = here(tmp_path, boot=None, namespace=None, began=0)
    assert lives(mine, mine) is None  # its number may be that of another process
    assert lives({**mine, "pid": ended()}, mine) is False
    assert lives({**mine, "pid": ended(), "host": "elsewhere"}, mine) is None


def test_a_writer_on_another_host_is_waited_for_and_not_taken_while_it_lives(tmp_path, kind, patience):
    with writer(tmp_path, ELSEWHERE) as child:
        message, said = refused(tmp_path)
        assert message.startswith(f"{tmp_path}: process {child.pid} on {socket.gethostname()} has been writing here")
        assert message.endswith("Wait for it, stop it, or use another --model_name.")
        assert said == [
            f"{tmp_path}: process {child.pid} on {socket.gethostname()} was writing here, and cannot be asked from "
            "this process. Waiting 60 s for a sign of life."
        ]


def test_a_killed_writer_of_another_host_is_taken_over_when_it_gives_no_sign_of_life(tmp_path, kind):
    with writer(tmp_path, ELSEWHERE) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
        said = []
        with hold(tmp_path, said.append):
            assert read(tmp_path / RECORD)["pid"] == os.getpid()
        assert [line.split(", ")[0].split("; ")[0] for line in said] == [
            f"{tmp_path}: process {child.pid} on {socket.gethostname()} was writing here",
            f"{tmp_path}: process {child.pid} on {socket.gethostname()} gave no sign of life",
        ]
        assert said[1].endswith("its lock is taken over.")
    assert not (tmp_path / RECORD).exists()


@needs_flock
def test_two_hosts_that_both_have_flock_are_one_writer(tmp_path, monkeypatch, patience):
    """As on sshfs, where flock is local to a host."""
    with writer(tmp_path, ELSEWHERE.replace("lock.KERNEL_LOCKS = False", "")):
        monkeypatch.setattr(lock.fcntl, "flock", lambda fd, how: None)
        assert "has been writing here" in refused(tmp_path)[0]


@needs_flock
def test_a_file_system_without_flock_is_locked_by_the_record(tmp_path, monkeypatch):
    def refuse(fd, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with hold(tmp_path):
        assert read(tmp_path / RECORD)["lock"] is None
        with monkeypatch.context() as patch:
            patch.setattr(lock, "_held", {})  # as another process
            assert f"process {os.getpid()} on" in refused(tmp_path)[0]


@needs_proc
def test_nobody_waits_for_who_is_provably_dead_or_alive(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(lock, "beats", lambda path: pytest.fail("it was watched"))
    with writer(tmp_path) as child:
        assert f"process {child.pid} on" in refused(tmp_path)[0]
        child.send_signal(signal.SIGSTOP)  # a stopped process lives
        assert f"process {child.pid} on" in refused(tmp_path)[0]
        child.send_signal(signal.SIGCONT)
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie is dead
        with hold(tmp_path, pytest.fail):
            pass
    (tmp_path / RECORD).write_text(json.dumps(here(tmp_path, began=1)))
    with hold(tmp_path, pytest.fail):
        pass


@needs_flock
@needs_proc
def test_a_container_that_was_started_again_on_this_machine_takes_its_lock_at_once(tmp_path):
    with hold(tmp_path):
        mine = read(tmp_path / RECORD)
    (tmp_path / RECORD).write_text(json.dumps({**mine, "namespace": "pid:[1]", "pid": 1}))
    with hold(tmp_path, pytest.fail):
        assert read(tmp_path / RECORD)["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"[]"])
def test_a_record_that_a_killed_writer_left_half_written_is_taken_over(tmp_path, content):
    (tmp_path / RECORD).write_bytes(content)
    said = []
    with hold(tmp_path, said.append):
        assert read(tmp_path / RECORD)["pid"] == os.getpid()
    assert said[0].startswith(f"{tmp_path}: process ? on an unknown host was writing here")


def test_a_record_that_goes_while_it_is_watched_leaves_the_folder_free(tmp_path, kind, patience):
    path = tmp_path / RECORD
    path.write_text(json.dumps(here(tmp_path, boot="another", namespace="another", pid=7)))
    ends = threading.Thread(target=lambda: (wait_until(lambda: said), path.unlink()))
    said = []
    ends.start()
    with hold(tmp_path, said.append):
        assert read(path)["pid"] == os.getpid()
    ends.join()
    assert len(said) == 1


def test_the_heart_beats_while_the_folder_is_held(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.01)
    path = tmp_path / RECORD
    with hold(tmp_path):
        size = path.stat().st_size
        wait_until(lambda: int(read(path)["beat"]) > 2)
        assert path.stat().st_size == size
        failing = path.rename(tmp_path / "away")
        with pytest.raises(CheckpointLocked), hold(tmp_path):
            pass
        failing.rename(path)
    assert not path.exists()
    assert not [thread for thread in threading.enumerate() if thread.name == f"heartbeat of {tmp_path}"]


def test_a_record_that_cannot_be_written_is_not_left_behind(tmp_path, monkeypatch):
    def full(self, number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Record, "_beat", full)
    with pytest.raises(OSError, match="No space left"), hold(tmp_path):
        pass
    assert not (tmp_path / RECORD).exists() and not is_held(tmp_path)
    monkeypatch.undo()
    with hold(tmp_path):
        pass


def test_a_disk_that_fails_for_a_moment_does_not_stop_the_heart(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.01)
    beat, calls = Record._beat, []

    def failing(self, number):
        calls.append(number)
        if number == 1:
            raise OSError(errno.EIO, "Input/output error")
        beat(self, number)

    monkeypatch.setattr(Record, "_beat", failing)
    with hold(tmp_path):
        wait_until(lambda: int(read(tmp_path / RECORD)["beat"]) >= 2)
    assert calls[:3] == [0, 1, 2]


# Folders that were moved, unlocked or copied


def saved(root, step, made=None):
    made = made or CheckpointManager("m", root, say=lambda line: None)
    made.acquire()
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(step)
    made.save(model, step=step)
    made.wait()
    return made


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECORD}


def test_a_folder_that_was_moved_away_ends_the_next_save_and_is_not_made_again(tmp_path, kind):
    made = saved(tmp_path, 1)
    (tmp_path / "m").rename(tmp_path / "old")
    before = contents(tmp_path)
    with pytest.raises(CheckpointLocked) as caught:
        saved(tmp_path, 2, made)
    name = LOCK if lock.KERNEL_LOCKS else RECORD
    assert str(caught.value).startswith(f"{tmp_path / 'm' / name}: is gone")
    assert "the folder was moved or its lock removed while it ran" in str(caught.value)
    made.close()
    assert contents(tmp_path) == before and not (tmp_path / "m").exists()


def test_a_folder_that_another_writer_has_now_is_not_touched(tmp_path, kind):
    made = saved(tmp_path, 1)
    (tmp_path / "m").rename(tmp_path / "old")
    (tmp_path / "m").mkdir()
    program = HERE if lock.KERNEL_LOCKS else HERE.replace("with lock", "lock.KERNEL_LOCKS = False\nwith lock")
    with writer(tmp_path / "m", program) as child:
        before, record = contents(tmp_path), read(tmp_path / "m" / RECORD)
        with pytest.raises(CheckpointLocked, match=r"is that of process|is gone or another file") as caught:
            saved(tmp_path, 2, made)
        assert lock.KERNEL_LOCKS or f"is that of process {child.pid} on {socket.gethostname()} now" in str(caught.value)
        made.close()
        assert contents(tmp_path) == before
        assert {**read(tmp_path / "m" / RECORD), "beat": 0} == {**record, "beat": 0}


@pytest.mark.parametrize("name", [LOCK, RECORD])
def test_a_lock_that_was_removed_ends_the_next_save(tmp_path, name):
    made = saved(tmp_path, 1)
    (tmp_path / "m" / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointLocked, match=re.escape(f"{tmp_path / 'm' / name}: is gone")):
        saved(tmp_path, 2, made)
    made.close()
    again = saved(tmp_path, 3)  # a new start takes the folder
    assert again.saved_step() == 3
    again.close()


def hard_linked(source, target):
    return Path(shutil.copytree(source, target, copy_function=os.link))


@needs_flock
def test_a_copy_by_hard_links_is_not_locked_by_its_original(tmp_path, kind):
    original = tmp_path / "original"
    original.mkdir()
    with writer(original) as child:
        copy = hard_linked(original, tmp_path / "copy")
        record = read(original / RECORD)
        with hold(copy, pytest.fail):
            assert read(copy / RECORD)["pid"] == os.getpid()
            assert not (copy / RECORD).samefile(original / RECORD)
            assert not lock.KERNEL_LOCKS or not (copy / LOCK).samefile(original / LOCK)
            assert f"process {child.pid} on" in refused(original)[0]
        assert {**read(original / RECORD), "beat": 0} == {**record, "beat": 0}
        assert f"process {child.pid} on" in refused(original)[0]


@needs_flock
def test_a_copy_by_hard_links_that_was_made_before_its_original_was_held_is_free(tmp_path):
    original = tmp_path / "original"
    original.mkdir()
    with hold(original):
        pass
    copy = hard_linked(original, tmp_path / "copy")
    assert (original / LOCK).stat().st_nlink == 2
    with hold(original), hold(copy, pytest.fail), hold(original), hold(copy):
        assert (original / LOCK).stat().st_nlink == 1
    assert not list(copy.glob(".stage-*"))


@needs_proc
def test_a_copy_of_a_folder_that_is_in_use_is_not_locked_by_its_original(tmp_path):
    with writer(tmp_path):
        copy = Path(shutil.copytree(tmp_path, tmp_path / "copy"))
        with hold(copy, pytest.fail):
            pass


@needs_flock
def test_a_lock_that_is_replaced_while_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    flock, replaced = lock.fcntl.flock, []

    def late(fd, how):
        if not replaced:
            replaced.append((tmp_path / LOCK).rename(tmp_path / "before"))
            (tmp_path / LOCK).touch()
        flock(fd, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with hold(tmp_path):
        assert read(tmp_path / RECORD)["lock"][1] == (tmp_path / LOCK).stat().st_ino
        with hold(tmp_path):
            pass
    monkeypatch.setattr(lock, "_is_file", lambda fd, path: False)  # where no file keeps its number
    with hold(tmp_path):
        assert read(tmp_path / RECORD)["lock"] is None


@needs_flock
def test_what_only_looks_takes_no_lock(tmp_path, monkeypatch):
    saved(tmp_path, 1).close()
    monkeypatch.setattr(lock, "hold", lambda *_: pytest.fail("a lock"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").rglob("*")}
    command = [sys.executable, "inspect_model.py", "--checkpoint_root", str(tmp_path), "--model_name", "m"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "m").rglob("*")} == before


@pytest.mark.full
def test_a_container_does_not_take_the_lock_of_a_living_one_with_its_host_name(tmp_path):
    """Two processes that each are pid 1 of their own, on a file system without flock."""
    container = ["unshare", "-pf", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*container, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare and the right to make namespaces")
    program = HERE.replace("with lock", "heartbeat.SILENCE = 3\nlock.KERNEL_LOCKS = False\nwith lock")

    def start():
        command = [*container, sys.executable, "-c", program, str(tmp_path)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(command, cwd=ROOT, **pipes)

    with start() as first:
        assert first.stdout.readline() == b"held\n"
        assert read(tmp_path / RECORD)["pid"] == 1
        with start() as second:
            said = second.communicate(b"")[1].decode()
            assert second.returncode != 0
            assert f"CheckpointLocked: {tmp_path}: process 1 on {socket.gethostname()} has been writing here" in said
        first.kill()
        first.wait()
        with start() as third:
            assert third.communicate(b"")[0] == b"held\n" and third.returncode == 0
