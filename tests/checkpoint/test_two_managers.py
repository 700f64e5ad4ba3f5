"""Several managers and threads of one process at one model: one write after the other, and a reader disturbs none."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch
from torch import nn

from core.bundle import turn
from core.bundle.bundle import history, open_bundle
from core.bundle.verify import verify
from core.checkpoint import CheckpointManager
from core.errors import SaveFailed
from tests.makers.limits import wait_until


def net(value: float) -> nn.Linear:
    model = nn.Linear(8, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def manager(root, **settings):
    return CheckpointManager("m", root, say=lambda line: None, **settings)


def whole_steps(root):
    """Every step on disk with the one value of its weights, after each file of it was compared with its checksum."""
    found = {}
    for folder in [root / "m", *(kept.path for kept in history(root / "m"))]:
        with open_bundle(folder) as bundle:
            assert verify(bundle) == []
            (found[bundle.step],) = torch.load(folder / "model.pt")["weight"].unique().tolist()
    return found


@contextlib.contextmanager
def save_in_flight(made, step):
    """Begin a save, and hold it before its commit while the block runs."""
    staged, go = threading.Event(), threading.Event()
    made.save(net(step), step=step, before_commit=lambda: staged.set() or go.wait(60))
    try:
        assert staged.wait(60)
        yield go
    finally:
        go.set()
        made.wait()


def listing(root):
    return {path: path.stat().st_mtime_ns for path in sorted((root / "m").rglob("*"))}


def test_a_load_beside_a_save_in_flight_finds_the_step_before_and_touches_nothing(tmp_path):
    first = manager(tmp_path)
    first.save(net(1), step=1)
    first.wait()
    with save_in_flight(first, 2):
        before, model = listing(tmp_path), net(0)
        assert manager(tmp_path).load(model) == 1
        assert model.weight.unique().tolist() == [1]
        assert listing(tmp_path) == before
    assert whole_steps(tmp_path) == {1: 1, 2: 2}


def test_a_load_makes_no_folder_and_leaves_an_interrupted_commit_as_it_is(tmp_path, monkeypatch):
    assert manager(tmp_path).load(net(0)) == 0
    assert not (tmp_path / "m").exists()
    first = manager(tmp_path)
    first.save(net(1), step=1)
    first.wait()
    monkeypatch.setattr(first._folder, "roll_forward", lambda: 1 / 0)
    first.save(net(2), step=2)
    with pytest.raises(ZeroDivisionError):
        first.wait()
    before, model = listing(tmp_path), net(0)
    assert tmp_path / "m" / ".committed" / "model.pt" in before
    assert manager(tmp_path).load(model) == 2 and model.weight.unique().tolist() == [2]
    assert listing(tmp_path) == before


def test_a_load_waits_for_the_save_of_its_own_manager(tmp_path):
    made, model = manager(tmp_path), net(0)
    made.save(net(1), step=1)
    assert made.load(model) == 1 and model.weight.unique().tolist() == [1]


def test_a_load_walks_back_from_damage_after_the_save_in_flight_has_ended(tmp_path):
    first, model = manager(tmp_path), net(0)
    for step in (1, 2):
        first.save(net(step), step=step)
    first.wait()
    said = []
    with save_in_flight(first, 3) as go:
        damaged = tmp_path / "m" / "model.pt"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        second = CheckpointManager("m", tmp_path, say=said.append)
        loads = threading.Thread(target=second.load, args=(model,))
        loads.start()
        wait_until(lambda: waiting(1))
        assert (damaged.parent / "model.pt").stat().st_size > 0 and said == []
        go.set()
        loads.join(60)
    assert model.weight.unique().tolist() == [3] and said == []


def waiting(count):
    """Whether so many threads wait for the turn of another one."""
    return len(turn._ended._waiters) == count


@pytest.mark.parametrize("acquired", [False, True])
def test_the_save_of_a_second_manager_waits_for_the_one_in_flight_and_is_committed_after_it(tmp_path, acquired):
    first, second = manager(tmp_path, keep=5), manager(tmp_path, keep=5)
    if acquired:
        first.acquire(), second.acquire()
    with save_in_flight(first, 1) as go:
        saves = threading.Thread(target=second.save, args=(net(2),), kwargs={"step": 2})
        saves.start()
        wait_until(lambda: waiting(1))
        assert not list((tmp_path / "m").glob("model.pt"))
        go.set()
        saves.join(60)
    second.wait()
    assert whole_steps(tmp_path) == {1: 1, 2: 2} and second.saved_step() == 2
    first.close(), second.close()


def test_two_managers_that_both_hold_the_folder_save_in_turns_on_one_thread(tmp_path):
    with manager(tmp_path, keep=9) as first, manager(tmp_path, keep=9) as second:
        for step in range(1, 7):
            (first if step % 2 else second).save(net(step), step=step)
        first.wait(), second.wait()
        assert whole_steps(tmp_path) == {step: step for step in range(1, 7)}
        with first.writing(), second.writing():  # on one thread the blocks nest
            first.save(net(7), step=7)
            first.wait()
    assert whole_steps(tmp_path)[7] == 7 and not turn._turns


@pytest.mark.parametrize("managers", [1, 4])
def test_four_threads_save_one_after_the_other_and_every_step_is_committed(tmp_path, managers):
    made = [manager(tmp_path, keep=99) for _ in range(managers)]
    faults = []

    def saving(number):
        try:
            for step in range(number, 13, 4):
                made[number % managers].save(net(step), step=step)
            made[number % managers].wait()
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=saving, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert faults == []
    assert whole_steps(tmp_path) == {step: step for step in range(1, 13)}


def test_a_save_whose_caller_prunes_from_its_own_thread_keeps_its_stage(tmp_path):
    made = manager(tmp_path)
    made.save(net(1), step=1, before_commit=lambda: made.prune(keep=0))
    made.wait()
    assert whole_steps(tmp_path) == {1: 1}


@pytest.mark.parametrize("harm", ["removed", "cut"])
def test_a_stage_that_lost_a_file_is_not_committed(tmp_path, harm):
    made = manager(tmp_path)
    made.save(net(1), step=1)
    made.wait()

    def disturb():
        (staged,) = (tmp_path / "m").glob(".stage-*/model.pt")
        staged.unlink() if harm == "removed" else staged.write_bytes(b"12345")

    made.save(net(2), step=2, before_commit=disturb)
    here = "missing" if harm == "removed" else "5 bytes"
    with pytest.raises(SaveFailed) as caught:
        made.wait()
    size = (tmp_path / "m" / "model.pt").stat().st_size
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'm'}: save of step 2 failed: {tmp_path / 'm' / '.stage-'}")
    assert f"/model.pt: {here}, expected {size:,} bytes as they were written. Another program" in message
    assert message.endswith("Nothing was committed. Step 1 is intact.")
    assert not list((tmp_path / "m").glob(".stage-*")) and whole_steps(tmp_path) == {1: 1}


def test_a_save_that_no_thread_can_be_started_for_leaves_the_folder_free(tmp_path, monkeypatch):
    made, start = manager(tmp_path), threading.Thread.start
    for error in (RuntimeError("can't start new thread"), KeyboardInterrupt()):
        for which in ("heartbeat", "save"):

            def fail(thread, which=which, error=error):
                if thread.name.startswith(which):
                    raise error
                start(thread)

            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", fail)
                alone = which == "save" and isinstance(error, RuntimeError)  # then this thread writes
                refused = pytest.raises((SaveFailed, KeyboardInterrupt), match=r"can't start new thread|^$")
                with contextlib.nullcontext() if alone else refused:
                    made.save(net(1), step=1)
            assert not turn._turns and not (tmp_path / "m" / ".lock-owner").exists()
    manager(tmp_path).save(net(1), step=1)
    wait_until(lambda: whole_steps(tmp_path) == {1: 1} if (tmp_path / "m" / "model.pt").exists() else False)


def test_a_second_manager_that_loads_while_the_first_saves_costs_no_step(tmp_path):
    first = manager(tmp_path)
    for step in range(1, 25):
        first.save(net(step), step=step)
        model, until = net(0), time.monotonic() + 0.002 * (step % 5)
        while True:
            loaded = manager(tmp_path).load(model)
            assert loaded in (step - 1, step) and model.weight.unique().tolist() == [loaded]
            if time.monotonic() > until:
                break
    first.wait()
    assert whole_steps(tmp_path) == {23: 23, 24: 24}
