"""A module that changed between save and load: moments follow the names of parameters, and what cannot is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.bundle.training_state import STATE
from core.checkpoint import CheckpointManager
from core.errors import CheckpointMismatch
from tests.makers.models import SMALL, equal, save_durably, started, tokenizer, weights


class Net(nn.Module):
    """A body and a head, trained on numbers that a step decides."""

    def __init__(self, head: str = "head", out: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.add_module(head, nn.Linear(8, out))
        self.head_name = head

    def forward(self, x):
        return self.get_submodule(self.head_name)(self.norm(self.body(x)))


def train(net, optimizer, start, end):
    for step in range(start, end):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(net, names=None, **settings):
    """AdamW over some parameters by name, in this order."""
    named = dict(net.named_parameters())
    return torch.optim.AdamW([(n, named[n]) for n in names or named], lr=1e-2, **settings)


def moments(net, optimizer):
    return {f"{n}.{k}": v for n, p in net.named_parameters() for k, v in optimizer.state.get(p, {}).items()}


@pytest.fixture
def saved(tmp_path):
    """A net saved at step 5 with all its parameters trained, with its optimizer, and the manager that loads it."""
    net = Net()
    optimizer = adamw(net)
    train(net, optimizer, 0, 5)
    with CheckpointManager("net", tmp_path, say=lambda line: None) as made:
        save_durably(made, net, optimizer, step=5)
    return net, optimizer


def load(tmp_path, net, optimizer, **settings):
    """Load into a net; returns what was said."""
    lines = []
    with CheckpointManager("net", tmp_path, say=lines.append) as made:
        assert made.load(net, optimizer, **settings) == 5
    return lines


def goes_on_to_the_same_bits(net, optimizer, again, other):
    train(net, optimizer, 5, 9)
    train(again, other, 5, 9)
    return equal(weights(net), weights(again)) and equal(moments(net, optimizer), moments(again, other))


def test_moments_follow_names_into_another_order(tmp_path, saved):
    again = Net()
    other = adamw(again, [name for name, _ in again.named_parameters()][::-1])
    assert load(tmp_path, again, other) == []
    assert goes_on_to_the_same_bits(*saved, again, other)


def test_moments_follow_names_into_other_groups(tmp_path, saved):
    again = Net()
    matrices = [(n, p) for n, p in again.named_parameters() if p.dim() > 1]
    rest = [(n, p) for n, p in again.named_parameters() if p.dim() == 1]
    other = torch.optim.AdamW([{"params": rest}, {"params": matrices}], lr=1e-2)
    assert load(tmp_path, again, other) == []
    assert goes_on_to_the_same_bits(*saved, again, other)


def test_an_optimizer_without_names_gets_them_from_the_module(tmp_path, saved):
    again = Net()
    other = torch.optim.AdamW(list(again.parameters())[::-1], lr=1e-2)
    assert load(tmp_path, again, other) == []
    assert goes_on_to_the_same_bits(*saved, again, other)


def test_moments_of_frozen_parameters_are_dropped_and_said(tmp_path, saved):
    again = Net()
    other = adamw(again, ["head.weight", "head.bias"])
    (line,) = load(tmp_path, again, other)
    assert line == (
        f"{tmp_path / 'net/optimizer.pt'}: dropped: the moments of 4 parameters (body.weight, body.bias, norm.weight, "
        "norm.bias), no longer in the optimizer"
    )
    kept = {name: value for name, value in moments(*saved).items() if name.startswith("head.")}
    assert equal(moments(again, other), kept)


def test_parameters_that_were_frozen_start_from_zero_and_it_is_said(tmp_path):
    net = Net()
    optimizer = adamw(net, ["head.weight", "head.bias"])
    train(net, optimizer, 0, 5)
    with CheckpointManager("net", tmp_path, say=lambda line: None) as made:
        save_durably(made, net, optimizer, step=5)
    again = Net()
    other = adamw(again)
    other.state[again.body.weight]["exp_avg"] = torch.ones(8, 4)  # of something else, trained before
    (line,) = load(tmp_path, again, other)
    assert line == (
        f"{tmp_path / 'net/optimizer.pt'}: reset: 4 new parameters (body.weight, body.bias, norm.weight, norm.bias); "
        "moments start from zero"
    )
    assert equal(moments(again, other), moments(net, optimizer))
    train(again, other, 5, 6)
    assert other.state[again.body.weight]["step"] == 1 and other.state[again.head.weight]["step"] == 6


def test_a_new_head_is_an_error_that_names_strict_and_changes_nothing(tmp_path, saved):
    again = Net(head="classifier", out=2)
    before = weights(again)
    said = r"missing: classifier\.weight, .*; without a place in this model: .*head\.bias\. What fits is loaded with st"
    with pytest.raises(CheckpointMismatch, match=said):
        load(tmp_path, again, adamw(again))
    assert equal(weights(again), before)


def test_moments_that_do_not_fit_leave_the_weights_unchanged_too(tmp_path):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, 0, 2)
    with CheckpointManager("net", tmp_path, say=lambda line: None) as made:
        save_durably(made, net, optimizer, step=2)
    again = Net()
    other, before = adamw(again), weights(again)
    with pytest.raises(CheckpointMismatch, match=r"net/optimizer\.pt: found the state of SGD, expected that of"):
        load(tmp_path, again, other)
    assert equal(weights(again), before) and not other.state


def test_not_strict_a_new_head_stays_as_it_is_and_the_rest_goes_on(tmp_path, saved):
    net, optimizer = saved
    again = Net(head="classifier", out=2)
    head = again.classifier.weight.detach().clone()
    other = adamw(again)
    lines = load(tmp_path, again, other, strict=False)
    weights_file, moments_file = tmp_path / "net/model.pt", tmp_path / "net/optimizer.pt"
    assert lines == [
        f"{weights_file}: new: 2 tensors (classifier.weight, classifier.bias), not in the checkpoint; they stay as "
        "they are",
        f"{weights_file}: left out: 2 tensors (head.weight, head.bias), not in the module",
        f"{moments_file}: reset: 2 new parameters (classifier.weight, classifier.bias); moments start from zero",
        f"{moments_file}: dropped: the moments of 2 parameters (head.weight, head.bias), no longer in the optimizer",
    ]
    assert torch.equal(again.classifier.weight, head) and torch.equal(again.body.weight, net.body.weight)
    kept = {name: value for name, value in moments(net, optimizer).items() if not name.startswith("head.")}
    assert equal(moments(again, other), kept)


def test_not_strict_another_shape_is_still_an_error(tmp_path, saved):
    again = Net(out=7)
    with pytest.raises(CheckpointMismatch, match=r"head\.weight is \(3, 8\), expected \(7, 8\)") as error:
        load(tmp_path, again, adamw(again), strict=False)
    assert "strict=False" not in str(error.value)


def test_not_strict_another_model_is_still_an_error(tmp_path, saved):
    with pytest.raises(
        CheckpointMismatch, match=r"missing: 0\.weight, .*; without a place in this model: .*body\.weight"
    ):
        load(tmp_path, nn.Sequential(nn.Linear(4, 8)), None, strict=False)


@pytest.mark.parametrize("frozen", ["token_embedding_table.weight", "ln_f.weight"])
def test_a_gpt_saved_with_a_frozen_parameter_is_trained_on_whole_with_a_line(tmp_path, frozen):
    made, model, optimizer = started(tmp_path)
    model.get_parameter(frozen).requires_grad_(False)
    optimizer = model.configure_optimizer(1e-3)
    ids = torch.arange(8).reshape(1, 8)
    model(ids, ids)[1].backward()
    optimizer.step()
    with made:
        save_durably(made, model, optimizer, step=1)
    assert (tmp_path / "dante" / STATE).exists()
    lines = []
    again = CheckpointManager("dante", tmp_path, say=lines.append)
    with again:
        resumed, moved, step = again.initialize_for_training(dict(SMALL), tokenizer(), None, 1e-3)
    assert step == 1
    said = f"reset: 1 new parameter ({frozen}); moments start from zero"
    assert f"{tmp_path / 'dante/optimizer.pt'}: {said}" in lines
    assert equal(moments(resumed, moved), moments(model, optimizer))
    assert sum(len(g["params"]) for g in moved.param_groups) == len(list(resumed.parameters()))
