"""Modules with tensors of every kind: what is saved comes back bit for bit into a fresh module."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from core.checkpoint import CheckpointManager
from core.errors import CheckpointMismatch


class Buffers(nn.Module):
    """A shared buffer, an expanded one, one that is a view, one without dimensions, and one that is not saved."""

    def __init__(self):
        super().__init__()
        shared, table = torch.randn(3), torch.randn(4, 6)
        self.one, self.two = nn.Module(), nn.Module()
        for part in (self.one, self.two):
            part.register_buffer("shared", shared)
        self.register_buffer("expanded", torch.randn(1, 3).expand(4, 3))
        self.register_buffer("view", table[1:3, ::2])
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("scratch", torch.randn(2), persistent=False)


class Strided(nn.Module):
    """Parameters whose strides are not those of a new tensor."""

    def __init__(self):
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(3, 5).t())
        self.sliced = nn.Parameter(torch.randn(8)[::2])
        self.image = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)


class Extra(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.seen = {"tokens": 3, "rows": torch.arange(2)}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


def with_statistics():
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
    net(torch.randn(4, 2, 5))
    return net


def averaged():
    net = AveragedModel(nn.Linear(2, 2), use_buffers=True)
    net.update_parameters(nn.Linear(2, 2))
    return net


MODULES = {
    "buffers": Buffers,
    "strides": Strided,
    "extra state": lambda: nn.Sequential(Extra(), nn.Linear(2, 1)),
    "batch norm": with_statistics,
    "average": averaged,
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
    "tied": lambda: nn.ModuleDict({"a": (a := nn.Linear(2, 2)), "b": a, "c": nn.ModuleList([a, nn.Linear(2, 2)])}),
    "bfloat16": lambda: nn.LSTM(2, 3, num_layers=2).to(torch.bfloat16),
    "complex": lambda: nn.ParameterList([torch.randn(2, 2, dtype=torch.complex64), torch.zeros(0, 3)]),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_comes_back_bit_for_bit(tmp_path, name):
    torch.manual_seed(1)
    saved = MODULES[name]()
    optimizer = torch.optim.SGD(saved.parameters(), lr=0.1, momentum=0.9) if list(saved.parameters()) else None
    for p in saved.parameters():
        p.grad = torch.ones_like(p)
    if optimizer:
        optimizer.step()
    want = {
        key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in saved.state_dict().items()
    }
    with CheckpointManager("net", tmp_path, say=lambda line: None) as manager:
        manager.save(saved, optimizer, step=1)
        manager.wait()
        torch.manual_seed(2)
        loaded = MODULES[name]()
        strides = {key: value.stride() for key, value in loaded.named_parameters()}
        fresh = torch.optim.SGD(loaded.parameters(), lr=0.1, momentum=0.9) if optimizer else None
        assert manager.load(loaded, fresh) == 1
    found = loaded.state_dict()
    assert list(found) == list(want)
    for key, value in want.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
        else:
            assert found[key]["tokens"] == value["tokens"] and torch.equal(found[key]["rows"], value["rows"])
    assert {key: value.stride() for key, value in loaded.named_parameters()} == strides
    for a, b in zip(saved.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["momentum_buffer"], fresh.state[b]["momentum_buffer"])


def test_a_buffer_that_is_not_saved_stays_as_it_is(tmp_path):
    saved, loaded = Buffers(), Buffers()
    scratch = loaded.scratch.clone()
    with CheckpointManager("net", tmp_path, say=lambda line: None) as manager:
        manager.save(saved, step=1)
        manager.wait()
        manager.load(loaded)
    assert torch.equal(loaded.scratch, scratch)
    assert "scratch" not in torch.load(tmp_path / "net/model.pt", weights_only=True)


def test_an_expanded_tensor_takes_only_values_that_are_equal_along_it(tmp_path):
    saved, loaded = nn.Module(), nn.Module()
    saved.register_buffer("rows", torch.arange(12.0).view(4, 3))
    loaded.register_buffer("rows", torch.zeros(1, 3).expand(4, 3))
    with CheckpointManager("net", tmp_path, say=lambda line: None) as manager:
        manager.save(saved, step=1)
        manager.wait()
        with pytest.raises(CheckpointMismatch, match=r"model\.pt does not fit this model: rows is expanded") as error:
            manager.load(loaded)
    assert "Nothing was changed." in str(error.value) and torch.equal(loaded.rows, torch.zeros(4, 3))
