"""5 steps, save, load and 5 more steps equal 10 steps, bit for bit, with any optimizer."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from core.checkpoint import CheckpointManager
from tests.makers.optimizers import Counting
from tests.makers.own_loop import muon_and_adamw, of_package, of_torch

EVERY = {name: of_torch(name) for name in sorted(torch.optim.__all__) if name not in ("Optimizer", "Muon")} | {
    "SGD momentum": of_torch("SGD", momentum=0.9, nesterov=True),
    "Adam amsgrad": of_torch("Adam", amsgrad=True),
    "AdamW fused": of_torch("AdamW", fused=True),
    "AdamW tensor lr": of_torch("AdamW", lr=torch.tensor(0.01)),
    "RMSprop centered": of_torch("RMSprop", centered=True, momentum=0.5),
    "LBFGS strong_wolfe": of_torch("LBFGS", line_search_fn="strong_wolfe", max_iter=4),
    "Muon and AdamW": muon_and_adamw,
    "Counting": Counting,
}
for skipped in {name for name in EVERY if not isinstance(getattr(torch.optim, name, None), (type, type(None)))}:
    del EVERY[skipped]  # submodules


def fresh(make, dtype, sparse):
    torch.manual_seed(0)
    if sparse:
        net = nn.EmbeddingBag(5, 4, sparse=True, mode="sum")
    else:
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.LayerNorm(3)).to(dtype)
    made = make(net.parameters())
    return net, made, made if isinstance(made, dict) else {"": made}


def train(net, optimizers, steps):
    for i in steps:
        for optimizer in optimizers.values():
            optimizer.step(functools.partial(loss_of, net, i))


def loss_of(net, i):
    net.zero_grad()
    if isinstance(net, nn.EmbeddingBag):
        out = net(torch.tensor([[i % 5, (i + 1) % 5]]))
    else:
        out = net(torch.sin(torch.arange(12.0).view(3, 4) + i).to(net[0].weight.dtype))
    loss = (out.float() - 1).square().mean()
    loss.backward()
    return loss


def exact(tmp_path, make, dtype=torch.float32, sparse=False):
    net, _, optimizers = fresh(make, dtype, sparse)
    train(net, optimizers, range(10))
    want = {name: value.clone() for name, value in net.state_dict().items()}
    net, made, optimizers = fresh(make, dtype, sparse)
    train(net, optimizers, range(5))
    with CheckpointManager("m", tmp_path, say=lambda line: None) as manager:
        manager.save(net, made, step=5)
    net, made, optimizers = fresh(make, dtype, sparse)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(float("nan"))
    said = []
    assert CheckpointManager("m", tmp_path, say=said.append).load(net, made) == 5
    train(net, optimizers, range(5, 10))
    assert said == []
    for name, value in net.state_dict().items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("name", EVERY)
def test_five_and_five_steps_are_ten(tmp_path, name):
    exact(tmp_path, EVERY[name], sparse=name == "SparseAdam")


@pytest.mark.parametrize("name", ["AdamW", "Counting"])
def test_five_and_five_steps_are_ten_in_bfloat16(tmp_path, name):
    exact(tmp_path, EVERY[name], torch.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("schedulefree", "AdamWScheduleFree"),
        ("schedulefree", "SGDScheduleFree"),
        ("schedulefree", "RAdamScheduleFree"),
        ("prodigyopt", "Prodigy"),
        ("lion_pytorch", "Lion"),
    ],
)
def test_five_and_five_steps_are_ten_with_other_packages(tmp_path, package, name):
    pytest.importorskip(package)
    exact(tmp_path, of_package(package, name, 1.0 if name == "Prodigy" else 0.01))
