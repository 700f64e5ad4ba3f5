"""A step that is resumed lies where verification read it: the same bits, memory of its own, and sums that are true."""

from __future__ import annotations

import math

import pytest
import torch

import core.bundle.verify
from core.checkpoint import CheckpointManager
from core.containers.filled import Filled
from core.loading.mapped import Owner
from core.training.certificate import state_digests
from tests.makers.models import flip, manager, save_durably, save_steps, update


def resumed(root):
    made = manager(root)
    return made, *made.initialize_for_training({}, "char", None, 1e-3)[:2]


def tensors_of(model, optimizer):
    moments = {f"{i}.{k}": v for i, one in enumerate(optimizer.state.values()) for k, v in one.items()}
    return {**model.state_dict(), **moments}


@pytest.fixture
def fills(monkeypatch):
    """What was read into memory."""
    real, found = core.bundle.verify.fill, []

    def fill(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(core.bundle.verify, "fill", fill)
    return found


def test_weights_and_moments_lie_in_the_memory_that_was_summed(tmp_path, fills):
    save_steps(tmp_path, 2)
    made, model, optimizer = resumed(tmp_path)
    spans = [
        (start := torch.frombuffer(one.memory, dtype=torch.uint8).data_ptr(), start + len(one.memory)) for one in fills
    ]
    assert len(fills) == 2 and all(isinstance(one, Filled) for one in fills)
    for name, tensor in tensors_of(model, optimizer).items():
        inside = any(start <= tensor.data_ptr() < end for start, end in spans)
        assert inside == (not name.endswith(".step")), name
    made.close()


def test_a_resume_without_that_memory_has_the_same_bits(tmp_path, monkeypatch):
    save_steps(tmp_path, 2)
    made, *one = resumed(tmp_path)
    made.close()
    monkeypatch.setattr(core.bundle.verify, "fill", lambda *_: None)
    made, *other = resumed(tmp_path)
    made.close()
    for _ in range(3):
        for (name, a), b in zip(tensors_of(*one).items(), tensors_of(*other).values(), strict=True):
            assert torch.equal(a, b), name
        update(*one), update(*other)


def test_training_on_changes_no_file(tmp_path):
    save_steps(tmp_path, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "dante").glob("*.pt")}
    made, model, optimizer = resumed(tmp_path)
    for _ in range(2):
        update(model, optimizer)
    made.close()
    assert len(before) == 2 and all(path.read_bytes() == data for path, data in before.items())


def test_a_damaged_record_walks_back_as_ever(tmp_path):
    save_steps(tmp_path, 2)
    path = tmp_path / "dante/optimizer.pt"
    flip(path, path.stat().st_size // 2)
    lines = []
    made = CheckpointManager("dante", tmp_path, say=lines.append)
    with made:
        assert made.initialize_for_training({}, "char", None, 1e-3)[2] == 1
    assert any("optimizer.pt" in line and "Continuing from step 1" in line for line in lines)


def test_known_sums_are_used_only_where_nothing_was_written(tmp_path):
    save_steps(tmp_path, 2)
    made, model, optimizer = resumed(tmp_path)
    with made:
        known = made.known_sums
        tensors = [t for name, t in tensors_of(model, optimizer).items() if not name.endswith(".step")]
        assert len(known.of(tensors)) == len({t.data_ptr() for t in tensors})
        for change in (
            lambda: None,
            lambda: tensors[0].add_(1),
            lambda: optimizer.state[next(model.parameters())].clear(),
        ):
            change()
            assert state_digests(model, optimizer, None, known) == state_digests(model, optimizer)
        update(model, optimizer)
        save_durably(made, model, optimizer, step=3)
        assert known.of(tensors_of(model, optimizer).values()) == {}


def test_no_sum_is_known_of_memory_that_is_gone(tmp_path):
    save_steps(tmp_path, 1)
    made, model, optimizer = resumed(tmp_path)
    known = made.known_sums
    assert known.of(model.state_dict().values())
    made.close()
    fresh = {name: torch.clone(t) for name, t in model.state_dict().items()}
    del model, optimizer
    assert known.of(fresh.values()) == {}


def test_an_owner_gives_a_storage_out_once_and_copies_what_fills_it_only_in_part():
    whole, owner = torch.arange(6.0), Owner(filled=True)
    assert owner.own(whole) is whole
    again, part, turned, other = owner.own(whole), owner.own(torch.arange(4.0)[:2]), owner.own(torch.ones(2, 3).T), None
    assert again.data_ptr() != whole.data_ptr() and torch.equal(again, whole)
    assert part.untyped_storage().nbytes() == 8 and turned.shape == (3, 2)
    other = torch.ones(3)
    assert owner.own(other, torch.float64).dtype == torch.float64 and math.isclose(owner.own(other).sum(), 3)
    mapped = torch.zeros(2)
    assert Owner(filled=False).own(mapped).data_ptr() != mapped.data_ptr()
