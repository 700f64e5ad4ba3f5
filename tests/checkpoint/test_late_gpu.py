"""A save from a GPU, whose copies come late: what is on disk is the state at `save`, or nothing."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from core.bundle.storage import DISK
from core.checkpoint import CheckpointManager
from core.errors import SaveFailed
from core.saving import snapshot
from core.saving.block_memory import Blocks, Memory
from core.saving.copy_stream import CopyStream
from tests.makers.late_gpu import LateGpus

SIZES = (30_000, 7, 12_001)


class Feed(torch.optim.Optimizer):
    """Writes the next number into all parameters, in the streams that compute."""

    def __init__(self, parameters, gpus: LateGpus) -> None:
        super().__init__(parameters, {})
        self.gpus, self.now = gpus, 0.0

    def step(self, closure=None):
        self.now += 1
        for p in self.param_groups[0]["params"]:
            self.gpus.do(p, lambda p=p, now=self.now: p.data.fill_(now))


class Run:
    """A model on one GPU or two, its optimizer and manager."""

    def __init__(self, folder, monkeypatch, gpus: int = 1, **settings) -> None:
        monkeypatch.setattr(Memory, "BLOCK", 1 << 14)
        monkeypatch.setattr(Memory, "RING", 3)
        self.gpus, self.folder = LateGpus(gpus), folder / "m"
        self.gpus.install(monkeypatch)
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in SIZES])
        for number, parameter in enumerate(self.model):
            self.gpus.hold(parameter, number % gpus)
        self.optimizer = Feed(self.model.parameters(), self.gpus)
        self.manager = CheckpointManager("m", folder, say=[].append, **settings)

    def save(self, step: int) -> None:
        self.manager.save(self.model, self.optimizer, step=step)

    def on_disk(self) -> set[float]:
        return {float(v) for t in torch.load(self.folder / "model.pt").values() for v in (t.min(), t.max())}


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("limit", [None, 0], ids=["all staged", "ring"])
def test_what_is_saved_is_the_state_at_save_whatever_is_queued_behind_it(tmp_path, monkeypatch, gpus, limit):
    run = Run(tmp_path, monkeypatch, gpus, stage_memory=limit)
    run.gpus.late = lambda: time.sleep(0.002)
    for step in range(1, 4):
        run.optimizer.step()
        run.save(step)
        saved = run.optimizer.now
        run.optimizer.step()
        run.optimizer.step()
        run.manager.wait()
        assert run.on_disk() == {saved}


def test_without_the_wait_of_the_stream_that_computes_a_step_would_be_torn(tmp_path, monkeypatch):
    """The control: the stand-in would show what the test before this one asserts the absence of."""
    run = Run(tmp_path, monkeypatch)
    go = threading.Event()
    run.gpus.late = lambda: go.wait(60)
    monkeypatch.setattr(snapshot.CopyStream, "hold_back", lambda self: None)
    run.save(1)
    run.optimizer.step()
    run.gpus.synchronize()
    go.set()
    run.manager.wait()
    assert run.on_disk() == {1.0}, "the state behind the step, though it was saved before it"


def test_a_change_while_copies_are_on_their_way_is_refused_and_the_step_before_stays(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    run.save(1)
    run.manager.wait()
    go, queued = threading.Event(), run.manager._saver
    run.gpus.late = lambda: go.wait(60)
    run.optimizer.step()
    run.save(2)
    assert queued._snapshot._copied.wait(60), "all copies are queued, and none is made"
    with torch.no_grad():
        run.model[2].add_(1)
    go.set()
    said = r"save of step 2 failed: model\.pt\.2 changed while it was being saved, and not by the optimizer's step"
    with pytest.raises(SaveFailed, match=said):
        run.manager.wait()
    assert run.on_disk() == {0.0} and not list(run.folder.glob(".stage-*"))


def test_a_change_behind_the_optimizers_wait_is_not_refused(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    go = threading.Event()
    run.gpus.late = lambda: go.wait(60)
    run.save(1)
    run.optimizer.step()  # waits until copies are queued, and lets the stream wait for them
    with torch.no_grad():
        run.model[0].add_(0)
    go.set()
    run.manager.wait()
    assert run.on_disk() == {0.0}


def test_a_save_that_fails_half_way_lets_no_copy_into_memory_of_the_next(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    run.gpus.late = lambda: time.sleep(0.002)
    with monkeypatch.context() as patch:
        patch.setattr(DISK, "free", lambda path: 0)
        run.save(1)
        with pytest.raises(SaveFailed, match="No space left on device"):
            run.manager.wait()
    for step in (2, 3):
        run.optimizer.step()
        run.save(step)
        saved = run.optimizer.now
        run.optimizer.step()
        run.manager.wait()
        assert run.on_disk() == {saved}


def test_each_thread_makes_the_gpu_its_own_and_blocks_are_summed_whole(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    summed, crc32 = [], snapshot.crc32
    monkeypatch.setattr(snapshot, "CHUNK", 1 << 10)
    monkeypatch.setattr(snapshot, "crc32", lambda data, *begin: summed.append(len(data)) or crc32(data, *begin))
    run.save(1)
    run.manager.wait()
    assert run.gpus.adopted == {"save of step 1", "snapshot: sum"}, "copying threads do it as they enter the stream"
    assert max(summed) > 1 << 13


def test_where_no_thread_is_to_be_had_the_save_is_made_without(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, gpus=2)
    run.gpus.late = lambda: time.sleep(0.001)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    run.optimizer.step()
    started = snapshot.threading.Thread.start
    with monkeypatch.context() as patch:
        patch.setattr(
            snapshot.threading.Thread,
            "start",
            lambda thread: refuse(thread) if thread.name.startswith("snap") else started(thread),
        )
        run.save(1)
        run.optimizer.step()
        run.manager.wait()
    assert run.on_disk() == {1.0}


def test_memory_is_pinned_in_segments_while_the_copy_has_begun_and_never_more_than_the_limit(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, stage_memory=11 * (1 << 14))
    monkeypatch.setattr(Blocks, "SEGMENT", 4)
    begun, copied, allocated = threading.Event(), [], Blocks._allocated
    run.gpus.late = begun.set

    def allocate(blocks, size):
        copied.append(begun.is_set() if not copied else begun.wait(60))
        return allocated(blocks, size)

    monkeypatch.setattr(Blocks, "_allocated", allocate)
    run.optimizer.step()
    for step in (1, 2):
        run.save(step)
        run.manager.wait()
    assert run.gpus.pinned == [4 << 14, 4 << 14, 2 << 14, 1 << 14], "once, in powers of two, 11 blocks in all"
    assert copied == [False, True, True, True] and run.on_disk() == {1.0}


def test_where_no_more_memory_can_be_pinned_a_save_takes_what_is_there(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    monkeypatch.setattr(Blocks, "SEGMENT", 4)
    allocated = Blocks._allocated

    def allocate(blocks, size):
        if len(run.gpus.pinned) == 1:
            raise RuntimeError("CUDA error: out of memory")
        return allocated(blocks, size)

    monkeypatch.setattr(Blocks, "_allocated", allocate)
    run.optimizer.step()
    run.save(1)
    run.optimizer.step()
    run.manager.wait()
    assert run.on_disk() == {1.0} and run.manager._saver.memory._blocks.count == 4


def test_the_stand_in_has_the_methods_of_the_real_one(monkeypatch):
    LateGpus().install(monkeypatch)
    public = {name for name in vars(CopyStream) if not name.startswith("_")}
    assert issubclass(snapshot.CopyStream, CopyStream)
    assert public == {"adopt_thread", "beside", "copy", "mark", "hold_back", "synchronize"}
