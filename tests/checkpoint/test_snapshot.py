"""A save beside training: what is on disk is the state at `save`, whatever happens afterwards."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import subprocess
import sys
import threading
import weakref
import zipfile

import pytest
import torch
from torch import nn

from core.bundle import lock
from core.bundle.storage import DISK
from core.checkpoint import CheckpointManager
from core.errors import InputError, SaveFailed
from core.networks.state_dict import export_optimizer_state
from core.saving import block_memory, snapshot
from core.saving.block_memory import Memory
from core.saving.snapshot import Snapshot
from core.saving.torch_file import digest_of
from tests.makers.models import SMALL, equal, manager, save_durably, started, state_of, train_and_save, update, weights


@pytest.fixture
def slow_copy(monkeypatch):
    """Copies wait until the event is set."""
    copying, go_on, copy = threading.Event(), threading.Event(), snapshot._copy_bytes

    def wait_then_copy(*args):
        copying.set()
        go_on.wait(60)
        copy(*args)

    monkeypatch.setattr(snapshot, "_copy_bytes", wait_then_copy)
    yield copying, go_on
    go_on.set()


@pytest.fixture
def small_blocks(monkeypatch):
    """Files of a small model take many blocks."""
    monkeypatch.setattr(Memory, "BLOCK", 4096)
    monkeypatch.setattr(Memory, "RING", 3)


def on_disk(folder):
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("model", "optimizer")}


def test_save_returns_before_anything_is_copied_and_the_next_update_waits_for_the_copy(tmp_path, slow_copy):
    copying, go_on = slow_copy
    made, model, optimizer = started(tmp_path)
    update(model, optimizer)
    expected, moments = weights(model), digest_of(export_optimizer_state(optimizer, model))
    assert made.save(model, optimizer, step=1)
    assert copying.wait(60) and made._saver.busy
    ids = torch.arange(8).reshape(1, 8)
    model(ids, ids)[1].backward()  # forward and backward need not wait
    stepped = threading.Event()
    training = threading.Thread(target=lambda: (optimizer.step(), stepped.set()))
    training.start()
    assert not stepped.wait(0.5) and equal(weights(model), expected)
    go_on.set()
    assert stepped.wait(60)
    training.join()
    made.wait()
    assert not equal(weights(model), expected)
    assert equal(on_disk(tmp_path / "dante")["model"], expected)
    assert state_of(tmp_path / "dante")["integrity"]["files"]["optimizer.pt"]["tensors"] == moments


@pytest.mark.parametrize("limit", [None, 0, 5 * 4096], ids=["all staged", "ring", "some staged"])
def test_any_amount_of_memory_gives_the_same_bytes(tmp_path, small_blocks, limit):
    made, model, optimizer = started(tmp_path, stage_memory=limit)
    update(model, optimizer)
    save_durably(made, model, optimizer, step=1)
    held = made._saver.memory._blocks
    assert held.count == {None: held.count, 0: 3, 5 * 4096: 5}[limit] and (limit is not None or held.count > 20)
    folder = tmp_path / "dante"
    assert equal(on_disk(folder)["model"], model.state_dict())
    assert digest_of(on_disk(folder)["optimizer"]) == digest_of(export_optimizer_state(optimizer, model))
    for name in ("model.pt", "optimizer.pt"):
        with zipfile.ZipFile(folder / name) as archive:
            assert archive.testzip() is None
    train_and_save(made, model, optimizer, 2)
    assert made._saver.memory._blocks is held, "memory is allocated once"
    assert equal(on_disk(folder)["model"], model.state_dict())


def test_a_ring_takes_less_than_64_megabytes_and_the_share_of_free_memory_is_respected(monkeypatch):
    assert Memory.RING * Memory.BLOCK <= 64e6
    monkeypatch.setattr(block_memory, "free_memory", lambda: 40 * Memory.BLOCK)
    assert Memory().blocks(1000, pinned=False).count == 20
    assert Memory(0).blocks(1000, pinned=False).count == Memory.RING
    assert Memory().blocks(7, pinned=False).count == 7
    memory = Memory()
    first = memory.blocks(15, pinned=False)
    assert memory.blocks(12, pinned=False) is first and memory.blocks(18, pinned=False).count == 18


def test_free_memory_is_what_the_machine_says_here():
    assert 1e6 < block_memory.free_memory() < 1e15


def test_buffers_and_state_that_a_person_edits_are_copied_in_save(tmp_path, slow_copy):
    _, go_on = slow_copy
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for parameter in module[1].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(module[0].parameters())
    module(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    expected = weights(module)
    made = manager(tmp_path)
    made.save(module, optimizer, step=1)
    module(torch.randn(8, 4))  # moves the running mean
    with torch.no_grad():
        module[1].weight += 1  # not the optimizer's
    optimizer.param_groups[0]["lr"] = 5.0
    go_on.set()
    made.wait()
    assert equal(on_disk(tmp_path / "dante")["model"], expected)
    assert on_disk(tmp_path / "dante")["optimizer"]["param_groups"][0]["lr"] == 1e-3


def test_without_an_optimizer_save_returns_when_everything_is_copied(tmp_path):
    made, model, _ = started(tmp_path)
    expected = weights(model)
    made.save(model, step=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    made.wait()
    assert equal(torch.load(tmp_path / "dante/model.pt", weights_only=True), expected)


def test_weights_changed_behind_the_optimizer_while_they_are_copied_are_never_committed(tmp_path, slow_copy):
    copying, go_on = slow_copy
    made, model, optimizer = started(tmp_path)
    go_on.set()
    train_and_save(made, model, optimizer, 1)
    go_on.clear(), copying.clear()
    made.save(model, optimizer, step=2)
    assert copying.wait(60)
    with torch.no_grad():
        model.ln_f.weight += 1
    go_on.set()
    said = r"model\.pt\.ln_f\.weight changed while it was being saved, and not by the optimizer's step"
    with pytest.raises(SaveFailed, match=said):
        made.wait()
    assert state_of(tmp_path / "dante")["step"] == 1 and not list((tmp_path / "dante").glob(".stage-*"))
    save_durably(made, model, optimizer, step=2)
    assert equal(on_disk(tmp_path / "dante")["model"], model.state_dict())


def test_one_save_is_in_flight_the_next_waits_or_is_skipped_with_a_line(tmp_path, slow_copy):
    copying, go_on = slow_copy
    lines = []
    made = CheckpointManager("dante", tmp_path, say=lines.append, save_policy="skip")
    module = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(module.parameters())
    assert made.save(module, optimizer, step=1) and copying.wait(60)
    assert not made.save(module, optimizer, step=2)
    assert lines == ["step 2 is not saved: the save before it is still being written"]
    made.save_policy = "wait"
    saved = []
    second = threading.Thread(target=lambda: saved.append(made.save(module, optimizer, step=3)))
    second.start()
    second.join(0.3)
    assert saved == []
    go_on.set()
    second.join()
    made.wait()
    assert saved == [True] and state_of(tmp_path / "dante")["step"] == 3


def test_settings_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"save_policy is 'never' and stage_memory None: expected wait or skip"):
        CheckpointManager("dante", tmp_path, save_policy="never")


def test_a_failed_save_is_raised_once_at_the_edge_of_a_step_and_training_goes_on(tmp_path, monkeypatch):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 1)

    def fails(call, *args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(DISK, "change", fails)
    update(model, optimizer)
    made.save(model, optimizer, step=2)
    update(model, optimizer)  # the hook does not raise
    made._saver.join()
    with pytest.raises(SaveFailed, match=r"dante: Input/output error|save of step 2 failed: Input/output error"):
        made.raise_failed()
    made.raise_failed()
    monkeypatch.undo()
    save_durably(made, model, optimizer, step=3)
    assert state_of(tmp_path / "dante")["step"] == 3


@pytest.mark.parametrize("limit", [None, 0], ids=["all staged", "ring"])
@pytest.mark.parametrize("refused", ["save of step", "snapshot: copy", ""])
def test_where_no_thread_is_to_be_had_the_save_is_made_without(tmp_path, monkeypatch, small_blocks, refused, limit):
    made, model, optimizer = started(tmp_path, stage_memory=limit)
    start = threading.Thread.start

    def refuse(thread):
        if thread.name.startswith(refused):
            raise RuntimeError("can't start new thread")
        start(thread)

    for step in (1, 2):
        update(model, optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            made.save(model, optimizer, step=step)
            if not refused.startswith("snapshot"):
                assert not made._saver.busy and made.saved_step() == step, "it is durable on return"
            made.wait()
        folder = tmp_path / "dante"
        assert equal(on_disk(folder)["model"], model.state_dict())
        assert digest_of(on_disk(folder)["optimizer"]) == digest_of(export_optimizer_state(optimizer, model))
    train_and_save(made, model, optimizer, 1)
    assert made.saved_step() == 3


def test_a_save_without_a_thread_raises_its_own_error_once(tmp_path, monkeypatch):
    made, model, optimizer = started(tmp_path)
    save_durably(made, model, optimizer, step=1)
    update(model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", raising(RuntimeError("can't start new thread")))
        patch.setattr(DISK, "free", lambda path: 0)
        with pytest.raises(SaveFailed, match=r"save of step 2 failed: No space left on device .* Step 1 is intact\."):
            made.save(model, optimizer, step=2)
    made.wait()
    save_durably(made, model, optimizer, step=2)
    made.close()


def test_without_a_thread_a_tensor_that_changes_meanwhile_is_still_noticed(tmp_path, monkeypatch):
    made, model, optimizer = started(tmp_path)
    update(model, optimizer)
    copied = snapshot._copy_bytes

    def changes(*args):
        copied(*args)
        with torch.no_grad():
            model.lm_head.weight.add_(1)

    monkeypatch.setattr(threading.Thread, "start", raising(RuntimeError("can't start new thread")))
    monkeypatch.setattr(snapshot, "_copy_bytes", changes)
    with pytest.raises(SaveFailed, match=r"changed while it was being saved"):
        made.save(model, optimizer, step=1)


def raising(error):
    def refuse(*_):
        raise error

    return refuse


def test_one_thread_copies_where_there_are_no_more(tmp_path, monkeypatch, small_blocks):
    monkeypatch.setattr(snapshot, "THREADS", 3)
    started_threads, start = [], threading.Thread.start

    def refuse(thread):
        if thread.name == "snapshot: copy":
            if len(started_threads) == 1:
                raise RuntimeError("can't start new thread")
            started_threads.append(thread)
        start(thread)

    made, model, optimizer = started(tmp_path)
    update(model, optimizer)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    save_durably(made, model, optimizer, step=1)
    assert len(started_threads) == 1
    assert equal(on_disk(tmp_path / "dante")["model"], model.state_dict())


@pytest.mark.parametrize("limit", [None, 0], ids=["all staged", "ring"])
def test_an_error_of_one_copying_thread_ends_all_and_fails_the_save(tmp_path, monkeypatch, small_blocks, limit):
    monkeypatch.setattr(snapshot, "THREADS", 3)
    made, model, optimizer = started(tmp_path, stage_memory=limit)
    update(model, optimizer)
    calls, copy = [], snapshot._copy_bytes

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 7:
            raise MemoryError("the seventh")
        copy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_copy_bytes", fail_once)
        made.save(model, optimizer, step=1)
        with pytest.raises(MemoryError, match="the seventh"):
            made.wait()
    update(model, optimizer)
    save_durably(made, model, optimizer, step=2)
    assert equal(on_disk(tmp_path / "dante")["model"], model.state_dict())


def test_a_save_whose_caller_is_interrupted_keeps_the_lock_until_it_is_written(tmp_path, slow_copy, monkeypatch):
    made, (_, go_on) = CheckpointManager("dante", tmp_path), slow_copy

    def interrupted(taken):
        raise KeyboardInterrupt

    monkeypatch.setattr(Snapshot, "wait_copied", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.save(nn.Linear(2, 2), step=1)
    assert made._saver.busy and made.checkpoint_dir.resolve() in lock._held
    go_on.set()
    made.wait()
    assert made.checkpoint_dir.resolve() not in lock._held and state_of(tmp_path / "dante")["step"] == 1


def test_the_memory_of_a_manager_does_not_outlive_it_with_the_optimizer(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    made = CheckpointManager("dante", tmp_path)
    save_durably(made, model, optimizer, step=1)
    memory = weakref.ref(made._saver.memory)
    del made
    gc.collect()
    assert memory() is None
    optimizer.step()


@pytest.mark.parametrize("free", [None, 10], ids=["committed", "failed"])
def test_a_save_that_has_ended_keeps_no_tensor_alive(tmp_path, monkeypatch, free):
    made, model, optimizer = started(tmp_path)
    update(model, optimizer)
    average = {name: tensor.clone() for name, tensor in weights(model).items()}
    seen = [weakref.ref(tensor) for tensor in average.values()]
    if free:
        monkeypatch.setattr(DISK, "free", lambda path: free)
    gc.disable()  # what only the collector of cycles finds may stay for thousands of steps
    try:
        made.save(model, optimizer, step=1, ema=average)
        del average
        with pytest.raises(SaveFailed) if free else contextlib.nullcontext():
            made.wait()
        made.close()
        assert [ref() for ref in seen if ref() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("ask", ["wait", "save", "close"])
def test_a_failure_nobody_asked_for_is_raised_by_the_next_call(tmp_path, monkeypatch, ask):
    made, model, optimizer = started(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(DISK, "free", lambda path: 10)
        made.save(model, optimizer, step=1)
        made._saver.join()
    calls = {"wait": made.wait, "close": made.close, "save": lambda: made.save(model, optimizer, step=2)}
    with pytest.raises(
        SaveFailed, match=r"save of step 1 failed: No space left on device \(.* KB needed, 10 bytes free\)"
    ):
        calls[ask]()
    made.close()


def test_a_save_that_will_not_fit_writes_nothing(tmp_path, monkeypatch):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 1)
    calls = []
    size = sum(file["size"] for file in state_of(tmp_path / "dante")["integrity"]["files"].values())
    monkeypatch.setattr(DISK, "free", lambda path: size // 2)
    monkeypatch.setattr(DISK, "change", lambda call, *args: (calls.append(call), call(*args))[1])
    update(model, optimizer)
    with pytest.raises(
        SaveFailed, match=r"step 2 failed: No space left on device \(.* KB needed, .* KB free\)\. Step 1 is intact"
    ):
        save_durably(made, model, optimizer, step=2)
    assert {call.__name__ for call in calls} <= {"fsync"}


def test_nothing_in_flight_is_lost_when_a_program_ends(tmp_path):
    script = f"""
import torch
from core.checkpoint import CheckpointManager
module = torch.nn.Linear(300, 300)
optimizer = torch.optim.AdamW(module.parameters())
CheckpointManager("dante", {str(tmp_path)!r}).save(module, optimizer, step=7)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "saved step 7" in done.stderr
    assert state_of(tmp_path / "dante")["step"] == 7


def test_a_failure_nobody_asked_for_is_the_last_word_of_a_program(tmp_path):
    script = f"""
import torch
from core.checkpoint import CheckpointManager
from core.bundle.storage import DISK
DISK.free = lambda path: 0
manager = CheckpointManager("dante", {str(tmp_path)!r})
manager.save(torch.nn.Linear(3, 3), step=7)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "WARNING" in done.stderr and "save of step 7 failed: No space left on device" in done.stderr


class Refuses:
    """Lets calls of one function fail, as a file system does that lacks it."""

    def __init__(self, call, number, times=10**9):
        self.call, self.number, self.times = call, number, times

    def __call__(self, call, *args):
        if call is self.call and self.times:
            self.times -= 1
            raise OSError(self.number, "refused")
        return call(*args)


@pytest.mark.parametrize(
    "lack",
    [
        lambda m: m.setattr(DISK, "unbuffered", False),
        lambda m: m.setattr(DISK, "preallocation", False),
        lambda m: m.setattr(DISK, "change", Refuses(os.posix_fallocate, errno.EOPNOTSUPP)),
        lambda m: m.setattr(DISK, "change", Refuses(os.pwrite, errno.EINVAL, times=1)),
    ],
    ids=["no O_DIRECT", "no preallocation", "preallocation refused", "unaligned writes refused"],
)
def test_what_a_file_system_lacks_changes_no_byte(tmp_path, monkeypatch, small_blocks, lack):
    made, model, optimizer = started(tmp_path)
    update(model, optimizer)
    save_durably(made, model, optimizer, step=1)
    here = {name: (tmp_path / "dante" / name).read_bytes() for name in ("model.pt", "optimizer.pt")}
    monkeypatch.setattr(DISK, "preallocation", True)  # put back what a refusal turns off
    lack(monkeypatch)
    save_durably(manager(tmp_path, "other"), model, optimizer, step=1)
    assert here == {name: (tmp_path / "other" / name).read_bytes() for name in here}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
def test_on_a_gpu_the_copy_is_made_beside_the_computation_and_equals_the_state_at_save(tmp_path):
    made, model, optimizer = started(tmp_path, config={**SMALL, "device": "cuda"})
    ids = torch.arange(8, device="cuda").reshape(1, 8)
    for step in range(1, 6):
        model(ids, ids)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        expected = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        made.save(model, optimizer, step=step)
        model(ids, ids)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        made.wait()
        assert equal(on_disk(tmp_path / "dante")["model"], expected)


def test_a_snapshot_given_up_half_way_lets_training_go_on():
    content = {"model.pt": {"w": torch.randn(3 * Memory.BLOCK // 4)}}
    taken = Snapshot(content, content["model.pt"])
    files = taken.plan()
    taken.start(Memory(0))
    blocks = files["model.pt"].blocks()
    next(blocks)
    taken.close()
    taken.wait_copied()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("snapshot")]
