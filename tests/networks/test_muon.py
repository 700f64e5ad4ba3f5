from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from core.config.variants import VARIANTS
from core.networks import muon
from core.networks.flex import GPTFlexAttention
from core.networks.muon import Muon, MuonWithAdamW, configure_muon, momentum_at, orthogonal

BF16 = 0.03
"""Largest share by which a sum of updates may differ: the iteration runs in bf16, which rounds to 1 in 256."""

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL_STEPS = [(3.4445, -4.7750, 2.0315)] * 5
MEDIUM_STEPS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def toy(variant="small", **sizes):
    torch.manual_seed(1)
    return GPTFlexAttention(
        *{"vocab": 65, "layers": 6, "heads": 1, "width": 128, "block": 128, **sizes}.values(), variant
    )


def iterated(matrix, steps):
    """Upstream's zeroth power of one matrix, in bf16, and in float64 to see what rounding does."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    for a, b, c in steps:
        square = x @ x.T
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Reference:
    """Upstream's update of one parameter, written from its description, matrix by matrix."""

    def __init__(self, p, steps, dtype):
        self.p, self.steps, self.dtype = p.detach().clone(), steps, dtype
        self.average = torch.zeros_like(p)

    def step(self, grad, lr, momentum, decay):
        self.average = momentum * self.average + (1 - momentum) * grad
        nesterov = momentum * self.average + (1 - momentum) * grad
        rows, columns = self.p.shape[-2:]
        self.p *= 1 - lr * decay
        for p, matrix in zip(self.p.view(-1, rows, columns), nesterov.view(-1, rows, columns), strict=True):
            p -= lr * max(1, rows / columns) ** 0.5 * iterated(matrix.to(self.dtype), self.steps).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("variant", "steps", "decays"), [("small", SMALL_STEPS, (0, 0)), ("medium", MEDIUM_STEPS, (0.01, 0.02))]
)
def test_updates_are_upstreams(variant, steps, decays, dtype):
    model = toy(variant)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = configure_muon(model, 0.03)
    wanted = {name: Reference(p, steps, dtype) for name, p in model.blocks.named_parameters()}
    for step in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        for name, reference in wanted.items():
            reference.step(model.blocks.get_parameter(name).grad, 0.03, momentum_at(100 * step), decays["mlp" in name])
        optimizer.warm_up(100 * step)
        optimizer.step()
    for name, reference in wanted.items():
        p, start = model.blocks.get_parameter(name), before[f"blocks.{name}"]
        assert torch.allclose(optimizer.state[p]["momentum_buffer"], reference.average, atol=1e-6)
        change = (reference.p - start).norm()
        assert change > 0.1 and (p - reference.p).norm() < BF16 * change, name
    assert {reference.p.dim() for reference in wanted.values()} == ({2, 3})


@pytest.mark.parametrize(("stack", "calls"), [(2**27, 6), (200_000, 12)])
def test_parameters_of_one_shape_are_updated_together_with_the_same_result(monkeypatch, stack, calls):
    alone, together = toy("medium"), toy("medium")
    start = {name: p.detach().clone() for name, p in alone.named_parameters()}
    taken = []
    for model, where in ((alone, ()), (together, ("cpu",))):
        monkeypatch.setattr(muon, "STACKED", where)
        monkeypatch.setattr(muon, "STACK", stack)
        monkeypatch.setattr(muon, "orthogonal", lambda x, steps: taken.append(len(x)) or orthogonal(x, steps))
        optimizer = configure_muon(model, 0.03)
        for step in range(2):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    matrices = [name for name, p in alone.blocks.named_parameters() if p.dim() > 1]
    assert taken[: 2 * len(matrices)] == [1] * 2 * len(matrices) and sum(taken) == 4 * len(matrices)
    assert len(taken) - 2 * len(matrices) == calls
    for name, p in together.named_parameters():
        change = (alone.get_parameter(name) - start[name]).norm()
        assert (p - alone.get_parameter(name)).norm() <= BF16 * change, name


def test_a_step_on_a_gpu_launches_little(monkeypatch):
    """Counted on tensors without memory: 12 layers took over 1,000."""
    launched = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            launched.append(op)
            return op(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.device("cuda"):
        shapes = [(64, 64), (64, 256), (256, 64)] * 12
        parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimizer = Muon([{"params": parameters}], 0.03, SMALL_STEPS)
        optimizer.step()  # makes the buffers
        with Count():
            optimizer.step()
    views = {"aten::expand", "aten::transpose", "aten::unbind", "aten::view", "aten::_unsafe_view"}
    kernels = [op for op in launched if op.namespace == "aten" and op._schema.name not in views]
    assert 20 < len(kernels) <= 80  # of 36 matrices in three shapes


def test_the_iteration_brings_singular_values_near_one():
    for shape in ((3, 64, 64), (32, 96), (96, 32)):
        found = orthogonal(torch.randn(shape), VARIANTS["medium"].coefficients)
        assert found.shape == shape and found.dtype == torch.bfloat16
        values = torch.linalg.svdvals(found.float())
        assert values.min() > 0.5 and values.max() < 1.5


def test_momentum_grows_with_the_step():
    assert [round(momentum_at(step), 6) for step in (0, 150, 300, 5000)] == [0.85, 0.9, 0.95, 0.95]


@pytest.mark.parametrize(
    ("variant", "rates"),
    [
        ("small", (0.22, 0.6, 0.04, 0.05, 0.05)),
        ("small_2025_02", (0.22, 0.6, 0.04, 0.05, 0.05)),
        ("medium", (1 / 320, 0.3, 0.015, 0.025, 0.025)),
    ],
)
def test_every_parameter_has_one_group_and_its_rate(variant, rates):
    model = toy(variant)
    optimizer = configure_muon(model, VARIANTS[variant].muon_rate)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(set(found)) and set(found) == set(model.parameters())
    for group in optimizer.param_groups[3:]:
        assert all(name.startswith("blocks.") for name in group["param_names"])
    head, embed, scalar = (group["param_names"] for group in optimizer.param_groups[:3])
    assert len(head) == 1 and len(embed) == 4 and all("embed" in name for name in embed) and "embed" not in head[0]
    assert all(dict(model.named_parameters())[name].dim() == 1 for name in scalar)
    for group in optimizer.param_groups[:3]:
        assert group["betas"] == (0.8, 0.95) and group["eps"] == 1e-10 and group["weight_decay"] == 0


def test_a_matrix_without_a_gradient_stays_as_it_is():
    model = toy()
    optimizer = configure_muon(model, 0.05)
    first, second, *_ = (p for group in optimizer._muon.param_groups for p in group["params"])
    first.grad, before = torch.ones_like(first), second.detach().clone()
    optimizer._muon.step()
    assert torch.equal(second, before) and second not in optimizer._muon.state and first in optimizer._muon.state


def test_what_is_not_a_matrix_is_updated_as_adamw_does():
    model = toy("medium")
    rest = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("blocks.")}
    optimizer = configure_muon(model, 0.025)
    adamw = torch.optim.AdamW(
        [
            {"params": [p for name, p in rest.items() if name.startswith(kinds)], "lr": lr}
            for kinds, lr in (("lm_head",  1 / 320), (("embed", "value_embeds"), 0.3), ("scalars", 0.015))
        ],
        betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True,
    )  # fmt: skip
    for step in range(2):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            if name in rest:
                rest[name].grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    assert all(torch.allclose(model.get_parameter(name), p, atol=1e-7) for name, p in rest.items())


def test_torchs_own_way_of_loading_goes_on_to_the_same_bits():
    def train(model, optimizer: MuonWithAdamW, steps):
        for step in steps:
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.warm_up(step)
            optimizer.step()

    whole, first = toy(), toy()
    train(whole, configure_muon(whole, 0.05), range(4))
    optimizer = configure_muon(first, 0.05)
    train(first, optimizer, range(2))
    second = copy.deepcopy(first)
    resumed = configure_muon(second, 0.05)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
