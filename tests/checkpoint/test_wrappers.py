"""Wrappers of modules and optimizers leave no trace in a step: what was saved inside one loads into any other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from core.checkpoint import CheckpointManager
from core.networks.wrappers import plain_tensors, unwrap, unwrap_optimizer
from tests.makers.optimizers import Imitation, Wrapper


@pytest.fixture(autouse=True)
def eager():
    """A compiled module that is called computes as it stands: only its names matter here."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Net(nn.Module):
    """A module whose own names look like those of wrappers, with a buffer and an extra state."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.register_buffer("count", torch.zeros(()))
        self.note = None

    def forward(self, x):
        self.count.copy_(x.detach().sum())  # which a second call of checkpoint_wrapper does not change
        return self.model(self.module(x))

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


class Fabricated(nn.Module):
    """As Fabric's module: two names for what it wraps, and the state dict of the inner one."""

    def __init__(self, inner):
        super().__init__()
        self._forward_module = self._original_module = inner

    def forward(self, x):
        return self._forward_module(x)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        return self._original_module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)


class PeftModel(nn.Module):
    """As that of peft."""

    def __init__(self, inner):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = inner

    def forward(self, x):
        return self.base_model.model(x)


class DistributedDataParallel(nn.Module):
    """As torch's, without a process group."""

    def __init__(self, inner):
        super().__init__()
        self.module = inner

    def forward(self, x):
        return self.module(x)


class FullyShardedDataParallel(nn.Module):
    """As that of version 1 with one rank and original parameters."""

    def __init__(self, inner):
        super().__init__()
        self._fsdp_wrapped_module = inner

    def forward(self, x):
        return self._fsdp_wrapped_module(x)


WRAPPERS = {
    "plain": lambda module: module,
    "compile": lambda module: torch.compile(module),
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "Fabric": Fabricated,
    "PEFT": PeftModel,
    "FSDP": FullyShardedDataParallel,
    "checkpoint_wrapper": checkpoint_wrapper,
}
OPTIMIZERS = {"plain": lambda optimizer: optimizer, "accelerate": Wrapper, "Fabric": Imitation}


def fresh(outer, inner, around):
    torch.manual_seed(0)
    net = Net()
    net.model[0] = WRAPPERS[inner](net.model[0])
    net.module = WRAPPERS[inner](net.module)
    wrapped = WRAPPERS[outer](net)
    return net, wrapped, OPTIMIZERS[around](torch.optim.AdamW(wrapped.parameters(), lr=0.01))


def train(module, optimizer, steps):
    for i in steps:
        optimizer.zero_grad()
        module(torch.sin(torch.arange(8.0).view(2, 4) + i)).square().mean().backward()
        optimizer.step()


def into_another(tmp_path, first, second):
    """Save within one set of wrappers, load within another one, and compare with a run without a stop."""
    net, wrapped, optimizer = fresh("plain", "plain", "plain")
    train(wrapped, optimizer, range(6))
    want = net.state_dict()
    net, wrapped, optimizer = fresh(*first)
    train(wrapped, optimizer, range(3))
    net.note = 7
    with CheckpointManager("m", tmp_path, say=lambda line: None) as manager:
        manager.save(wrapped, optimizer, step=3)
        train(wrapped, optimizer, range(3, 6))  # which waits for the copy
    names = list(torch.load(tmp_path / "m/model.pt", weights_only=True))
    groups = torch.load(tmp_path / "m/optimizer.pt", weights_only=True)["param_groups"]
    assert sorted(names) == sorted(want)
    assert sorted(groups[0]["param_names"]) == sorted(name for name, _ in Net().named_parameters())
    net, wrapped, optimizer = fresh(*second)
    said = []
    assert CheckpointManager("m", tmp_path, say=said.append).load(wrapped, optimizer) == 3
    train(wrapped, optimizer, range(3, 6))
    assert said == [] and net.note == 7
    for name, value in plain_tensors(net).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, want[name]), name


CASES = [
    *((outer, "plain", "plain") for outer in WRAPPERS),
    *(("plain", inner, "plain") for inner in list(WRAPPERS)[1:]),
    *(("plain", "plain", around) for around in list(OPTIMIZERS)[1:]),
    ("Fabric", "checkpoint_wrapper", "Fabric"),
    ("DDP", "compile", "accelerate"),
    ("compile", "FSDP", "plain"),
]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_what_was_saved_in_wrappers_loads_into_the_plain_module_and_back(tmp_path, case):
    into_another(tmp_path / "out", case, ("plain", "plain", "plain"))
    into_another(tmp_path / "in", ("plain", "plain", "plain"), case)


def test_wrappers_around_wrappers_are_taken_off_in_any_order():
    net = Net()
    for order in itertools.permutations(("compile", "DataParallel", "Fabric", "PEFT"), 3):
        wrapped = net
        for name in order:
            wrapped = WRAPPERS[name](wrapped)
        assert unwrap(wrapped) is net
    assert unwrap(nn.Sequential(net)) is not net and unwrap(net) is net


def test_a_wrapper_with_parameters_of_its_own_is_kept():
    prompts = PeftModel(nn.Linear(2, 2))
    prompts.prompt_encoder = nn.Embedding(3, 2)
    assert unwrap(prompts) is prompts
    assert "prompt_encoder.weight" in plain_tensors(prompts)


def test_an_optimizer_with_its_own_state_is_no_wrapper():
    inner = torch.optim.SGD(nn.Linear(2, 2).parameters())
    assert unwrap_optimizer(Wrapper(Imitation(inner))) is inner
    outer = torch.optim.SGD(inner.param_groups)
    outer.base = inner
    assert unwrap_optimizer(outer) is outer


def test_an_older_file_with_the_names_of_wrappers_is_read(tmp_path):
    module = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.25)
    train(module, optimizer, range(2))
    state = optimizer.state_dict()
    state["param_groups"][0]["param_names"] = ["_forward_module.weight", "_forward_module._orig_mod.bias"]
    with CheckpointManager("m", tmp_path, say=lambda line: None) as manager:
        manager.save(module, state, step=2)
    again = nn.Linear(4, 2)
    other = torch.optim.AdamW(again.parameters())
    assert CheckpointManager("m", tmp_path, say=print).load(again, other) == 2
    assert other.param_groups[0]["lr"] == 0.25
    assert torch.equal(other.state[again.bias]["exp_avg"], optimizer.state[module.bias]["exp_avg"])


@pytest.mark.full
def test_accelerate_goes_on_exactly(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def prepared():
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        return accelerate.Accelerator(cpu=True).prepare(net, optimizer)

    exact(tmp_path, prepared, lambda loss: accelerate.Accelerator(cpu=True).backward(loss))


@pytest.mark.full
def test_fabric_goes_on_exactly(tmp_path):
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)

    def prepared():
        torch.manual_seed(0)
        net = Net()
        return fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))

    exact(tmp_path, prepared, fabric.backward)


@pytest.mark.full
def test_peft_goes_on_exactly(tmp_path):
    peft = pytest.importorskip("peft")

    def prepared():
        torch.manual_seed(0)
        net = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["model.0", "model.2"], r=2))
        return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)

    exact(tmp_path, prepared, torch.Tensor.backward)
    assert "model.0.lora_A.default.weight" in torch.load(tmp_path / "m/model.pt", weights_only=True)


def exact(tmp_path, prepared, backward):
    def steps(module, optimizer, some):
        for i in some:
            optimizer.zero_grad()
            backward(module(torch.sin(torch.arange(8.0).view(2, 4) + i)).square().mean())
            optimizer.step()

    whole, optimizer = prepared()
    steps(whole, optimizer, range(6))
    module, optimizer = prepared()
    steps(module, optimizer, range(3))
    with CheckpointManager("m", tmp_path, say=lambda line: None) as manager:
        manager.save(module, optimizer, step=3)
    module, optimizer = prepared()
    said = []
    assert CheckpointManager("m", tmp_path, say=said.append).load(module, optimizer) == 3
    steps(module, optimizer, range(3, 6))
    assert said == []
    for a, b in zip(module.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
