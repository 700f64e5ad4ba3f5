"""What `load` into a live module does, reports or refuses: nothing of it is silent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.checkpoint import CheckpointManager
from core.errors import CheckpointMismatch, InputError, SaveFailed
from core.loading.casts import cast_loss
from core.loading.optimizer import load_optimizer_state
from core.saving.shards import moments_of
from tests.makers.models import SMALL, manager, save_steps, started

NAN, INF = float("nan"), float("inf")


def tensor(*values, dtype=None):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("saved", "dtype", "fault", "rounded"),
    [
        (tensor(1.0, 300.5), torch.uint8, "300.5 does not fit uint8", False),
        (tensor(1.0, 256.0), torch.uint8, "256.0 does not fit uint8", False),
        (tensor(0.0, 255.0), torch.uint8, None, False),
        (tensor(-1.0), torch.uint8, "-1.0 does not fit uint8", False),
        (tensor(NAN), torch.int64, "nan does not fit int64", False),
        (tensor(float(1 << 63)), torch.int64, "9.223372036854776e+18 does not fit int64", False),
        (tensor(float(-(1 << 63))), torch.int64, None, False),
        (tensor(300), torch.int8, "300 does not fit int8", False),
        (tensor(-1), torch.uint64, "-1 does not fit uint64", False),
        (tensor(1 << 63, dtype=torch.uint64), torch.int64, "9223372036854775808 does not fit int64", False),
        (tensor(True, False), torch.uint64, None, False),
        (tensor(2), torch.bool, "2 does not fit bool", False),
        (tensor(1.0, 0.0), torch.bool, None, False),
        (tensor(0.5, 1e10), torch.float16, "10000000000.0 does not fit float16", False),
        (tensor(1e10), torch.bfloat16, None, True),
        (tensor(1e-30), torch.float16, None, True),
        (tensor(INF, NAN, -INF), torch.float16, None, False),
        (tensor(0.1), torch.float64, None, False),
        (tensor(0.1, dtype=torch.float64), torch.float32, None, True),
        (tensor(1e39, dtype=torch.float64), torch.float32, "1e+39 does not fit float32", False),
        (tensor(1 << 24, (1 << 24) + 1), torch.float32, None, True),
        (tensor((1 << 60) + 1), torch.float64, None, True),
        (tensor(1 << 24), torch.float32, None, False),
        (tensor(1e10), torch.float8_e4m3fn, "10000000000.0 does not fit float8_e4m3fn", False),
        (tensor(1.0, 0.3), torch.float8_e5m2, None, True),
        (tensor(1 + 0j), torch.float32, None, False),
        (tensor(1 + 1j), torch.float32, "(1+1j) does not fit float32", False),
        (tensor(2 + 0j), torch.uint8, None, False),
        (tensor(2.0), torch.complex64, None, False),
        (tensor(1e39 + 0j, dtype=torch.complex128), torch.complex64, "(1e+39+0j) does not fit complex64", False),
        (tensor(0.1j, dtype=torch.complex128), torch.complex64, None, True),
        (torch.empty(0), torch.int8, None, False),
        (torch.ones(3, dtype=torch.int8).expand(2, 3).t(), torch.bool, None, False),
    ],
)
def test_what_a_cast_loses_is_named_by_its_value(saved, dtype, fault, rounded):
    assert cast_loss(saved, dtype) == (fault, rounded)
    many = torch.cat([torch.zeros((1 << 20) + 5, dtype=saved.dtype), saved.reshape(-1)])
    assert cast_loss(many, dtype) == (fault, rounded)


def test_a_dtype_that_converts_into_nothing_is_named():
    fault, rounded = cast_loss(torch.empty(2, dtype=torch.float4_e2m1fn_x2), torch.float32)
    assert fault.startswith("float4_e2m1fn_x2 cannot be converted to float32 (") and not rounded


def saved(root, module, optimizer=None, **settings):
    with manager(root) as made:
        made.save(module, optimizer, step=3, **settings)


def load(root, module, *rest, **settings):
    """Load, and return the lines that were said."""
    said = []
    assert CheckpointManager("dante", root, say=said.append).load(module, *rest, **settings) == 3
    return said


class Buffered(nn.Module):
    def __init__(self, *values, dtype=None):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("b", torch.tensor(values, dtype=dtype))


@pytest.mark.parametrize("strict", [True, False])
def test_a_lossy_cast_is_refused_and_nothing_changes(tmp_path, strict):
    saved(tmp_path, Buffered(1.7, 300.5))
    module = Buffered(0, 0, dtype=torch.uint8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointMismatch) as caught:
        load(tmp_path, module, strict=strict)
    assert str(caught.value) == (
        f"{tmp_path / 'dante/model.pt'} does not fit this model: b: {torch.tensor(1.7).item()} does not fit uint8, its "
        "dtype in the module. Nothing was changed."
    )
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    saved_large = Buffered(1e10)
    saved(tmp_path / "large", saved_large)
    with pytest.raises(CheckpointMismatch, match=r"b: 10000000000\.0 does not fit float16"):
        load(tmp_path / "large", Buffered(0.0, dtype=torch.float16))


def test_rounding_is_reported_and_what_is_exact_is_not(tmp_path):
    module = Buffered(0.1, 2.0)
    saved(tmp_path, module)
    smaller = Buffered(0.0, 0.0).to(torch.bfloat16)
    assert load(tmp_path, smaller) == [
        f"{tmp_path / 'dante/model.pt'}: rounded: 3 tensors (b: float32 to bfloat16, inner.weight: float32 to "
        "bfloat16, inner.bias: float32 to bfloat16)"
    ]
    assert torch.equal(smaller.b, module.b.to(torch.bfloat16))
    assert load(tmp_path, Buffered(0.0, 0.0).double()) == []


def test_moments_that_do_not_fit_are_refused(tmp_path):
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = torch.optim.AdamW([parameter])
    entry = {"step": torch.tensor(1.0), "exp_avg": torch.ones(1), "exp_avg_sq": torch.tensor([1e10])}
    state = {"state": {0: entry}, "param_groups": [{"params": [0], "lr": 0.1}]}
    with pytest.raises(
        CheckpointMismatch, match=r"parameter 0: exp_avg_sq: 10000000000\.0 does not fit float16, the dtype"
    ):
        load_optimizer_state(optimizer, state)
    assert not optimizer.state


def test_a_module_on_the_meta_device_is_refused_by_name(tmp_path):
    saved(tmp_path, Buffered(1.0))
    with torch.device("meta"):
        module = Buffered(0.0)
    with pytest.raises(CheckpointMismatch) as caught:
        load(tmp_path, module)
    there = "is on the meta device, where it holds no values (module.to_empty makes room for them)"
    assert f"b {there}; inner.weight {there}; inner.bias {there}. Nothing was changed." in str(caught.value)
    filled = module.to_empty(device="cpu")
    assert load(tmp_path, filled) == [] and filled.b.item() == 1.0


class Two(nn.Module):
    def __init__(self, tied, fill=None):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        if tied:
            self.b.weight = self.a.weight
        if fill is not None:
            nn.init.constant_(self.a.weight, fill)
            nn.init.constant_(self.b.weight, fill)


def test_an_untied_file_fills_a_tied_module_only_with_equal_values(tmp_path):
    saved(tmp_path, Two(False))
    module = Two(True)
    before = module.a.weight.clone()
    with pytest.raises(CheckpointMismatch) as caught:
        load(tmp_path, module)
    assert "a.weight and b.weight are one tensor in the module, and differ in the file (untie them first)" in str(
        caught.value
    )
    assert torch.equal(module.a.weight, before)
    saved(tmp_path / "equal", Two(False, fill=2.5))
    assert load(tmp_path / "equal", module) == [] and module.b.weight.eq(2.5).all()
    tied = Two(True)
    saved(tmp_path / "tied", tied)
    for target in (Two(True), Two(False)):
        assert load(tmp_path / "tied", target) == []
        assert torch.equal(target.a.weight, tied.a.weight) and torch.equal(target.b.weight, tied.a.weight)


def test_an_untied_gpt_does_not_fill_a_tied_one(tmp_path):
    save_steps(tmp_path, 1, config={**SMALL, "tied_head": False})
    _, model, _ = started(tmp_path, "other", {**SMALL, "tied_head": True})
    with pytest.raises(CheckpointMismatch, match=r"token_embedding_table\.weight and lm_head\.weight are one tensor"):
        manager(tmp_path).load(model)


class Counted(nn.Linear):
    """A module with an extra state."""

    state = None

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


class Deaf(nn.Linear):
    def get_extra_state(self):
        return 1


@pytest.mark.parametrize(
    "state", [{"count": 7, "amax": [torch.arange(3.0)]}, torch.arange(4), None, (1, "a"), b"ab"], ids=repr
)
def test_extra_state_is_saved_under_torchs_name_and_comes_back(tmp_path, state):
    module = nn.Sequential(Counted(2, 2), nn.Linear(2, 1))
    module[0].state = state
    saved(tmp_path, torch.compile(module), torch.optim.AdamW(module.parameters()))
    target = nn.Sequential(Counted(2, 2), nn.Linear(2, 1))
    assert load(tmp_path, target, torch.optim.AdamW(target.parameters())) == []
    assert repr(target[0].state) == repr(state)
    plain = nn.Sequential(Counted(2, 2), nn.Linear(2, 1))
    plain.load_state_dict(torch.load(tmp_path / "dante/model.pt", weights_only=True))
    assert repr(plain[0].state) == repr(state) and torch.equal(plain[1].weight, module[1].weight)


def test_extra_state_that_only_one_side_has_is_refused_or_reported(tmp_path):
    counted, bare = Counted(2, 2), nn.Linear(2, 2)
    counted.state = 5
    saved(tmp_path, counted)
    with pytest.raises(
        CheckpointMismatch, match=r"without a place in this model: _extra_state\. What fits is loaded with"
    ):
        load(tmp_path, bare)
    assert load(tmp_path, bare, strict=False) == [
        f"{tmp_path / 'dante/model.pt'}: left out: 1 tensor (_extra_state), not in the module"
    ]
    assert torch.equal(bare.weight, counted.weight)
    with pytest.raises(CheckpointMismatch, match=r"its modules have no set_extra_state for _extra_state\."):
        load(tmp_path, Deaf(2, 2))
    saved(tmp_path / "bare", bare)
    with pytest.raises(CheckpointMismatch, match=r"does not fit this model: missing: _extra_state"):
        load(tmp_path / "bare", counted)
    assert counted.state == 5 and "new: 1 tensor (_extra_state)" in load(tmp_path / "bare", counted, strict=False)[0]


def test_extra_state_that_would_not_come_back_is_refused_by_save(tmp_path):
    module = nn.Sequential(Counted(1, 1))
    module[0].state = {"hook": print}
    with pytest.raises(SaveFailed, match=r"model\.pt: 0\._extra_state\.hook is a function \(builtins\.print\), which"):
        saved(tmp_path, module)
    module[0].state = None
    module.register_state_dict_post_hook(lambda module, state, *_: state.update(version="2"))
    with pytest.raises(
        InputError, match=r"^model\.pt: version is of type str, expected a tensor: `load` fills tensors"
    ):
        saved(tmp_path, module)


def test_parameters_of_the_optimizer_outside_the_module_are_refused(tmp_path):
    module, loss = nn.Linear(2, 2), nn.Linear(2, 1)
    optimizer = torch.optim.AdamW([*module.parameters(), *loss.parameters()])
    with CheckpointManager("dante", tmp_path, say=lambda line: None) as made:
        with pytest.raises(InputError) as caught:
            made.save(module, optimizer, step=1)
        assert made.saved_step() is None and not (tmp_path / "dante/optimizer.pt").exists()
        made.save({"model": module, "loss": loss}, optimizer, step=2)
    assert str(caught.value) == (
        "optimizer.pt: the optimizer has 2 parameters ([1, 2], [1]) outside the module, whose values would be lost. "
        'Save what holds them as well, each module under a name: save({"model": module, "loss": loss}, optimizer, '
        "...). Nothing was written."
    ).replace('"model": module', '"model": model')
    saved = torch.load(tmp_path / "dante/model.pt", weights_only=True)
    assert torch.equal(saved["loss.weight"], loss.weight) and sorted(saved)[0] == "loss.bias"
    with pytest.raises(InputError, match=r"^the optimizer has 2 parameters outside the module, which shards have no"):
        moments_of(optimizer, module, True)
