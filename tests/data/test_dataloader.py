"""Batches are functions of (seed, step, micro), and windows of the text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.dataloader import DataLoader
from core.data.randomness import draws
from core.data.tokens import Tokens, Windows
from core.errors import InputError


def tokens(*arrays, vocab_size=65536, dtype=np.uint16) -> Tokens:
    return Tokens([np.array(a, dtype) for a in arrays], vocab_size=vocab_size, where="text.txt (training part)")


def loader(train, val=None, *, block_size=8, batch_size=4, seed=1337) -> DataLoader:
    return DataLoader(train, val or train, block_size=block_size, batch_size=batch_size, seed=seed)


def test_batch_is_inputs_and_the_next_tokens():
    inputs, targets = loader(tokens(np.arange(1000))).batch(5)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))


def test_batch_is_the_same_in_every_run():
    assert loader(tokens(np.arange(1000))).batch(3)[0][:, 0].tolist() == [
        int(draw) % 992 for draw in draws(1337, 3, 0, 4)
    ]


def test_batch_depends_on_nothing_but_seed_step_and_micro():
    train = tokens(np.arange(1000))
    first = loader(train)
    expected = {(step, micro): first.batch(step, micro)[0] for step in range(4) for micro in range(2)}
    second = loader(train)
    for step, micro in reversed(expected):
        second.val_batch(step)
        assert torch.equal(second.batch(step, micro)[0], expected[step, micro])
    starts = {tuple(batch[:, 0].tolist()) for batch in expected.values()}
    assert len(starts) == 8
    assert not torch.equal(loader(train, seed=7).batch(0)[0], expected[0, 0])


def test_micro_batches_are_slices_of_one_global_batch():
    train = tokens(np.arange(1000))
    whole = loader(train, batch_size=12).batch(9)[0]
    parts = [loader(train, batch_size=4).batch(9, micro)[0] for micro in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_validation_batches_are_a_stream_of_their_own():
    data = loader(tokens(np.arange(1000)))
    assert torch.equal(data.val_batch(2)[0], data.val_batch(2)[0])
    assert not torch.equal(data.val_batch(2)[0], data.val_batch(3)[0])
    assert not torch.equal(data.val_batch(2)[0], data.batch(2)[0])


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 8))
def test_windows_are_every_run_and_none_crosses_shards(lengths, length):
    rows = [[100 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    expected = [row[k : k + length] for row in rows for k in range(len(row) - length + 1)]
    if not expected:
        with pytest.raises(
            InputError, match=rf"\(training part\): \d+ tokens, but block_size {length - 1} needs at least {length}\."
        ):
            Windows(tokens(*rows), length)
        return
    windows = Windows(tokens(*rows), length)
    assert windows.count == len(expected)
    assert windows.gather(np.arange(windows.count)).tolist() == expected


def test_text_of_exactly_one_window_is_enough():
    inputs, targets = loader(tokens(range(9)), batch_size=2).batch(0)
    assert inputs.tolist() == [list(range(8))] * 2
    assert targets.tolist() == [list(range(1, 9))] * 2


@pytest.mark.parametrize("arrays", [[range(8)], [range(8), range(5)], [[]], []])
def test_text_shorter_than_a_block_names_both_numbers(arrays):
    longest = max(map(len, arrays), default=0)
    with pytest.raises(InputError) as caught:
        loader(tokens(*arrays), tokens(range(100)))
    expected = f"text.txt (training part): {longest} tokens, but block_size 8 needs at least 9. Use a longer text"
    assert str(caught.value).startswith(expected)
    assert ("--block_size to at most 7" in str(caught.value)) == (longest == 8)


def test_validation_part_shorter_than_a_block_is_refused_too():
    with pytest.raises(InputError, match="3 tokens, but block_size 8"):
        loader(tokens(range(100)), tokens(range(3)))


@pytest.mark.parametrize("arrays", [[np.full(100, 65)], [np.full(50, 65), np.full(50, 65)]])
def test_id_outside_the_vocabulary_is_a_sentence(arrays):
    with pytest.raises(InputError, match="holds token id 65, but the vocabulary has 65 ids"):
        loader(tokens(*arrays, vocab_size=65)).batch(0)
    assert loader(tokens(*arrays, vocab_size=66)).batch(0)[0].max() == 65


def test_wide_ids_come_through(tmp_path):
    path = tmp_path / "wide.bin"
    np.arange(100_000, 100_100, dtype="<u4").tofile(path)
    mapped = np.memmap(path, dtype="<u4", mode="r")
    train = Tokens([mapped], vocab_size=128_256, where="wide")
    inputs, _ = loader(train).batch(1)
    assert 100_000 <= int(inputs.min()) <= int(inputs.max()) < 100_100
