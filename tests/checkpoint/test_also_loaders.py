"""Loaders beside a step: the position of a resumable one, of torchdata's, and of a dataset with a state of its own."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from core.checkpoint import CheckpointManager
from core.data import resumable
from core.errors import CheckpointMismatch


def model():
    torch.manual_seed(0)
    net = torch.nn.Linear(1, 1)
    return net, torch.optim.SGD(net.parameters(), lr=0.1)


def trained(root, also, batches, steps):
    """Train so many steps on batches of numbers, from the newest step on, and save; returns the batches of each."""
    seen, (net, optimizer) = [], model()
    with CheckpointManager("dante", root, say=lambda line: None) as manager:
        start = manager.load(net, optimizer, also=also)
        given = batches()
        for _ in range(steps):
            batch = torch.as_tensor(next(given))
            seen.append(batch.flatten().tolist())
            net(batch.reshape(-1, 1).float()).mean().backward()
            optimizer.step()
        manager.save(net, optimizer, step=start + steps, also=also)
    return seen


def rounds(loader):
    while True:
        yield from loader


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [2, 5, 7])
def test_a_resumable_loader_goes_on_with_the_batch_after_the_one_that_was_trained_on(tmp_path, cut, workers):
    """An epoch has five batches; workers have fetched more than the loop when the step is saved."""

    def run(root, steps):
        loader = resumable(torch.arange(10), 2, seed=4, num_workers=workers)
        return trained(root, {"loader": loader}, lambda: rounds(loader), steps)

    assert run(tmp_path / "parts", cut) + run(tmp_path / "parts", 9 - cut) == run(tmp_path / "once", 9)


def test_a_loader_of_another_order_is_refused_in_one_sentence_and_nothing_changes(tmp_path):
    saved = resumable(torch.arange(10), 2, seed=4)
    trained(tmp_path, {"loader": saved}, lambda: rounds(saved), 3)
    other = resumable(torch.arange(12), 3, seed=4)
    net, optimizer = model()
    before = net.weight.clone()
    with pytest.raises(CheckpointMismatch) as refused:
        CheckpointManager("dante", tmp_path).load(net, optimizer, also={"loader": other})
    assert "samples 12 here, 10 in the checkpoint; batch_size 3 x 1 ranks here, 2 x 1 in the checkpoint" in str(
        refused.value
    )
    assert "Nothing was changed." in str(refused.value) and "\n" not in str(refused.value)
    assert other.step == 0 and torch.equal(net.weight, before)


class Counter(IterableDataset):
    """A stream that keeps its position, in each worker its own."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        while self.at < 20:
            self.at += 1
            yield first + step * (self.at - 1)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("cut", [3, 20])
def test_a_dataset_with_a_state_goes_on_where_it_was(tmp_path, cut):
    def run(root, steps):
        stream = Counter()
        return trained(root, {"stream": stream}, lambda: rounds(DataLoader(stream, batch_size=None)), steps)

    assert run(tmp_path / "parts", cut) + run(tmp_path / "parts", 24 - cut) == run(tmp_path / "once", 24)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_the_loader_of_torchdata_goes_on_where_it_was(tmp_path, cut, workers):
    """With a stream and with a shuffled dataset, whose generator it keeps as well."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def run(root, steps, data, **how):
        torch.manual_seed(1)
        loader = stateful.StatefulDataLoader(data, batch_size=4, num_workers=workers, **how)
        return trained(root, {"loader": loader}, lambda: rounds(loader), steps)

    for name, data, how in (("stream", Counter, {}), ("shuffled", lambda: torch.arange(20), {"shuffle": True})):
        parts = run(tmp_path / f"{name} parts", cut, data(), **how) + run(
            tmp_path / f"{name} parts", 8 - cut, data(), **how
        )
        assert parts == run(tmp_path / f"{name} once", 8, data(), **how), name
