"""The order of a resumable loader is a function of (seed, step): with workers, on ranks, from any step."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from core.data import resumable
from core.data.randomness import permutation
from core.data.resumable_loader import Order
from core.errors import CheckpointMismatch, InputError
from tests.conftest import ROOT
from tests.makers.models import equal


class Noisy(Dataset):
    """Samples that are their number and three random ones, one from each generator of a process."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([float(index), random.random(), np.random.rand(), torch.rand(()).item()]).double()


class AtOnce(Noisy):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


def numbers(loader, start, stop):
    return {step: [int(sample[0]) for sample in batch] for step, batch in loader.steps(start, stop)}


def test_the_order_is_a_new_permutation_in_each_epoch_and_another_for_another_seed():
    order = numbers(resumable(range(12), 4, seed=1, collate_fn=lambda batch: [[n] for n in batch]), 0, 9)
    epochs = [[n for step in range(first, first + 3) for n in order[step]] for first in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert numbers(resumable(range(12), 4, seed=2, collate_fn=lambda batch: [[n] for n in batch]), 0, 9) != order
    # The order of a run must not change with the program: these numbers stay.
    assert permutation(1, 0, 12).tolist() == [9, 8, 7, 11, 4, 10, 2, 0, 3, 6, 5, 1]


@pytest.mark.parametrize("dataset", [Noisy(), Subset(Noisy(), range(9)), AtOnce()], ids=["items", "subset", "at once"])
def test_two_workers_yield_the_same_bits_as_none_and_so_does_a_start_in_the_middle(dataset):
    alone = list(resumable(dataset, 3, seed=7).steps(0, 10))
    by_two = list(resumable(dataset, 3, seed=7, num_workers=2).steps(4, 10))
    assert [step for step, _ in by_two] == list(range(4, 10))
    assert all(torch.equal(batch, alone[step][1]) for step, batch in by_two)
    noise = torch.cat([batch for _, batch in alone])[:, 1:]
    if type(dataset) is not AtOnce:
        assert noise.unique().numel() == noise.numel(), "each sample of each epoch has numbers of its own"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_has_the_batch_that_was_yielded_and_resumes_in_an_epoch_and_at_its_end(workers):
    whole = numbers(resumable(Noisy(), 3, seed=5), 0, 9)
    options = {"num_workers": workers, "prefetch_factor": 4} if workers else {}
    for stop in (1, 2, 3, 4, 6):
        first = resumable(Noisy(), 3, seed=5, **options)
        for step, _ in first.steps(0, 9):
            if step + 1 == stop:
                break
        state = first.state_dict()
        assert state == {"step": stop, "seed": 5, "batch_size": 3, "samples": 10, "world": 1, "drop_last": True}
        second = resumable(Noisy(), 3, seed=5)
        second.load_state_dict(state)
        assert (second.step, second.epoch) == (stop, stop // 3)
        rest = [[int(sample[0]) for sample in batch] for batch in second]
        assert rest == [whole[step] for step in range(stop, (stop // 3 + 1) * 3)]


def test_a_loop_over_epochs_goes_on_where_it_was_left():
    def trained(loader, epochs, stop=99):
        seen = []
        for _ in range(loader.epoch, epochs):
            for batch in loader:
                seen.append(batch[:, 0].tolist())
                if len(seen) == stop:
                    return seen
        return seen

    whole = trained(resumable(Noisy(), 3, seed=5, num_workers=1, persistent_workers=True), 3)
    assert len(whole) == 9 == 3 * len(resumable(Noisy(), 3, seed=5))
    for stop in (2, 3, 4, 8):
        loader = resumable(Noisy(), 3, seed=5)
        assert trained(loader, 3, stop) == whole[:stop]
        assert trained(loader, 3) == whole[stop:]
        loader.start_at(stop)
        assert trained(loader, 3) == whole[stop:]


def test_the_generators_of_the_process_are_left_as_they_are():
    def drawn(loader):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        for _ in loader.steps(0, 4) if loader else ():
            pass
        return random.random(), np.random.rand(), torch.rand(2).tolist()

    expected = drawn(None)
    assert drawn(resumable(Noisy(), 3, seed=5)) == expected
    assert drawn(resumable(Noisy(), 3, seed=5, num_workers=1)) == expected


sizes = st.integers(1, 60), st.integers(1, 7), st.integers(1, 5), st.booleans(), st.integers(0, 2**62)


@settings(max_examples=150, deadline=None)
@given(*sizes, st.integers(0, 40))
def test_ranks_have_disjoint_parts_that_cover_each_epoch_whatever_the_sizes(
    samples, batch, world, drop_last, seed, start
):
    rest = samples % (batch * world)
    if samples < batch * world if drop_last else 0 < rest < world:
        with pytest.raises(InputError, match=r"found|at least one each"):
            Order(samples, batch, seed, 0, world, drop_last=drop_last)
        return
    orders = [Order(samples, batch, seed, rank, world, drop_last=drop_last) for rank in range(world)]
    length = len(orders[0])
    parts = [list(order.between(0, 2 * length)) for order in orders]
    for first in (0, length):
        seen = [n for part in parts for _, indices in part[first : first + length] for n in indices]
        assert len(set(seen)) == len(seen) == samples - (rest if drop_last else 0)
    assert all({len(indices) for _, indices in part[: length - 1]} <= {batch} for part in parts)
    assert max(len(p[-1][1]) for p in parts) - min(len(p[-1][1]) for p in parts) <= 1
    assert min(len(p[-1][1]) for p in parts) > 0
    assert [list(order.between(start, start + 3)) for order in orders] == [
        list(order.between(0, start + 3))[start:] for order in orders
    ]
    # What all ranks see in a step is the step of one process with the global batch.
    alone = list(Order(samples, batch * world, seed, drop_last=drop_last).between(0, length))
    together = [[n for part in parts for n in part[step][1]] for step in range(length)]
    assert [indices for _, indices in alone] == together


def test_the_ranks_are_those_of_torch_distributed_and_may_change_with_the_same_global_batch(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    second = resumable(Noisy(), 2, seed=5)
    assert (second.order.rank, second.order.world) == (1, 2)
    whole = numbers(resumable(Noisy(), 4, seed=5, rank=0, world_size=1), 0, 4)
    assert numbers(second, 0, 4) == {step: both[2:] for step, both in whole.items()}
    alone = resumable(Noisy(), 4, seed=5, rank=0, world_size=1)
    alone.load_state_dict(second.state_dict())
    assert alone.step == 4 and alone.epoch == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_size": 4}, "batch_size 4 x 1 ranks here, 3 x 1 in the checkpoint"),
        ({"world_size": 2, "rank": 1}, "batch_size 3 x 2 ranks here, 3 x 1 in the checkpoint"),
        ({"dataset": range(11)}, "samples 11 here, 10 in the checkpoint"),
        ({"seed": 6}, "seed 6 here, 5 in the checkpoint"),
        ({"drop_last": False}, "drop_last False here, True in the checkpoint"),
    ],
)
def test_the_state_of_another_order_is_refused_and_nothing_changes(changed, said):
    saved = resumable(Noisy(), 3, seed=5)
    saved.start_at(2)
    loader = resumable(**{"dataset": Noisy(), "batch_size": 3, "seed": 5, **changed})
    loader.start_at(1)
    with pytest.raises(CheckpointMismatch) as refused:
        loader.load_state_dict(saved.state_dict())
    assert str(refused.value) == (
        f"loader: {said}. Its batches would be others: make it as it was, or leave it out of `also` and choose where "
        "it begins with start_at(step); it is still at step 1."
    )
    assert loader.step == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"step": -1}, r"loader: step is -1 in its state, expected a whole number"),
        ({"step": True}, r"loader: step is True"),
        ({"seed": None}, r"loader: seed 5 here, None in the checkpoint"),
    ],
)
def test_a_state_that_is_none_of_a_resumable_loader_is_refused(changed, said):
    loader = resumable(Noisy(), 3, seed=5)
    with pytest.raises(CheckpointMismatch, match=said):
        loader.load_state_dict({**loader.state_dict(), **changed})
    with pytest.raises(CheckpointMismatch, match="no batch_size, drop_last, samples, seed, world in its state"):
        loader.load_state_dict({"step": 1})


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class WithoutLength(Dataset):
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("dataset", [Stream(), WithoutLength(), iter([1, 2]), {1, 2}])
def test_a_dataset_without_length_or_items_is_refused_with_what_to_use(dataset):
    with pytest.raises(InputError) as refused:
        resumable(dataset, 2, seed=1)
    assert str(refused.value) == (
        f"dataset: found {type(dataset).__name__}, which has no length or no items by number, so its order cannot be a "
        "function of the step. Use torchdata's StatefulDataLoader, and save it with also={'loader': loader}."
    )


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"batch_size": 11}, "dataset: found 10 samples, fewer than batch_size 11 x 1 ranks"),
        ({"batch_size": 0}, "batch_size 0, rank 0 of 1: expected at least 1"),
        ({"rank": 2, "world_size": 2}, "batch_size 3, rank 2 of 2: expected"),
        ({"rank": 1}, "batch_size 3, rank 1 of 1: expected"),
        ({"sampler": [1]}, "resumable: found sampler, but the order is a function of"),
        ({"in_order": False}, "resumable: found in_order, but the order is a function of"),
        ({"dataset": []}, "dataset: found 0 samples"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(how, said):
    with pytest.raises(InputError, match=said):
        resumable(**{"dataset": Noisy(), "batch_size": 3, "seed": 1, **how})
    with pytest.raises(InputError, match="step is -1, expected at least 0"):
        resumable(Noisy(), 3, seed=1).start_at(-1)


def test_it_is_a_torch_loader_and_importing_the_room_stays_cheap():
    loader = resumable(Noisy(), 3, seed=1)
    assert isinstance(loader, DataLoader) and len(loader.dataset) == 10 and loader.dataset[3][0] == 3
    code = "import sys, core.data; print('torch' in sys.modules, hasattr(core.data, 'other'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


def test_the_loop_of_the_page_resumes_in_the_middle_of_an_epoch_to_the_same_bits(tmp_path, monkeypatch):
    page = (ROOT / "docs/own_loop.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"```python\n([^`]*resumable\(.*?)```", page, re.DOTALL)

    def trained(name, *ends):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for end in ends:
            torch.manual_seed(3)
            exec(loop.replace("300", str(end)).replace("100 ==", "50 =="), {})
        return torch.load("checkpoints/regression/model.pt", weights_only=True)

    assert equal(trained("at once", 150), trained("stopped", 50, 150))
