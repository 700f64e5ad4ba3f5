"""The optimizer's groups, the way a saved state finds its parameters, and the learning rate's curve."""

from __future__ import annotations

import copy
import io
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.bundle.legacy import open_legacy
from core.config.gpt import GPTConfig
from core.errors import CheckpointMismatch, InputError
from core.loading.optimizer import configure_optimizer, load_optimizer_state
from core.loading.tensors import load_optimizer
from core.model import GPT
from core.networks.state_dict import export_optimizer_state
from core.training.schedule import Schedule
from tests.makers.models import config

SMALL = {"block_size": 8, "vocab_size": 11, "n_embd": 16, "n_head": 2, "n_layer": 2, "dropout": 0.0}


def make(**fields) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **fields}))


def train(model: GPT, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(step))
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(**fields) -> tuple[GPT, torch.optim.AdamW]:
    model = make(**fields)
    optimizer = model.configure_optimizer(1e-2)
    train(model, optimizer)
    return model, optimizer


def moments(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}


def assert_equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def reversed_state(state: dict) -> dict:
    """The same state with groups and parameters in the opposite order."""
    groups = [
        {**g, "params": g["params"][::-1], "param_names": g["param_names"][::-1]} for g in state["param_groups"][::-1]
    ]
    return {"state": state["state"], "param_groups": groups}


def test_matrices_decay_and_the_rest_does_not():
    model = make(bias=True)
    decayed, plain = model.configure_optimizer(3e-4, weight_decay=0.2).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in plain["params"])
    assert sorted(decayed["param_names"] + plain["param_names"]) == sorted(dict(model.named_parameters()))
    assert {(g["lr"], g["betas"]) for g in (decayed, plain)} == {(3e-4, (0.9, 0.95))}


def test_tied_weights_are_there_once():
    groups = make(tied_head=True, head_bias=False).configure_optimizer(1e-3).param_groups
    names = [name for g in groups for name in g["param_names"]]
    assert "token_embedding_table.weight" in names and "lm_head.weight" not in names


@pytest.mark.parametrize("change", [lambda s: s, reversed_state], ids=["same order", "other order"])
def test_state_is_found_by_name_with_equal_bits(change):
    model, optimizer = trained(bias=True)
    state = change(through_a_file(export_optimizer_state(optimizer, model)))
    again = model.configure_optimizer(1e-2, optimizer_state=state)
    assert_equal_bits(moments(again, model), moments(optimizer, model))


def test_loaded_tensors_are_copies():
    model, optimizer = trained()
    state = export_optimizer_state(optimizer, model)
    before = copy.deepcopy(state)
    again = model.configure_optimizer(1e-2, optimizer_state=state)
    train(model, again)
    assert len(before["state"]) == 26
    for i, entry in before["state"].items():
        assert_equal_bits(state["state"][i], entry)


def test_hyper_parameters_come_from_the_run():
    model, optimizer = trained()
    state = export_optimizer_state(optimizer, model)
    again = model.configure_optimizer(5e-5, weight_decay=0.3, optimizer_state=state)
    assert [(g["lr"], g["weight_decay"]) for g in again.param_groups] == [(5e-5, 0.3), (5e-5, 0.0)]


def test_names_of_compiled_and_wrapped_models_match():
    model, optimizer = trained()
    state = export_optimizer_state(optimizer, model)
    for g in state["param_groups"]:
        g["param_names"] = [f"module._orig_mod.{name}" for name in g["param_names"]]
    again = model.configure_optimizer(1e-2, optimizer_state=state)
    assert_equal_bits(moments(again, model), moments(optimizer, model))


def test_state_without_names_goes_by_order():
    model, optimizer = trained()
    state = optimizer.state_dict()
    for g in state["param_groups"]:
        del g["param_names"]
    again = model.configure_optimizer(1e-2, optimizer_state=state)
    assert_equal_bits(moments(again, model), moments(optimizer, model))


def test_one_group_without_names_is_in_the_models_order():
    """What `AdamW(model.parameters())` of another program saves."""
    model = make(bias=True)
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, theirs)
    again = model.configure_optimizer(1e-2, optimizer_state=through_a_file(theirs.state_dict()))
    assert_equal_bits(moments(again, model), moments(theirs, model))


def test_names_can_be_given_for_a_state_without_them():
    model, optimizer = trained()
    state = reversed_state(export_optimizer_state(optimizer, model))
    names = [name for g in state["param_groups"] for name in g.pop("param_names")]
    again = model.configure_optimizer(1e-2)
    load_optimizer_state(again, state, names)
    assert_equal_bits(moments(again, model), moments(optimizer, model))


def test_a_state_from_before_the_first_step_is_empty():
    model = make()
    state = export_optimizer_state(model.configure_optimizer(1e-2), model)
    again = model.configure_optimizer(1e-2, optimizer_state=state)
    assert moments(again, model) == {}
    train(model, again)


def test_other_optimizers_are_restored_too():
    model = make()
    theirs = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    train(model, theirs)
    again = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    load_optimizer_state(again, export_optimizer_state(theirs, model))
    assert_equal_bits(moments(again, model), moments(theirs, model))


def test_missing_and_surplus_names_are_listed_up_to_ten():
    model, optimizer = trained()
    other = make(n_layer=1)
    with pytest.raises(CheckpointMismatch, match=r"blocks\.1\.sa\.qkv\.weight is not in this model"):
        other.configure_optimizer(1e-2, optimizer_state=export_optimizer_state(optimizer, model))
    strangers = torch.nn.ModuleDict({"other": make(n_layer=5)})
    with pytest.raises(CheckpointMismatch) as raised:
        configure_optimizer(strangers, 1e-2, optimizer_state=export_optimizer_state(optimizer, model))
    message, count = str(raised.value), len(list(model.named_parameters()))
    assert message.count(" is not in this model") == 10 and f" and {count - 10} more." in message


def test_a_deeper_model_resets_the_moments_of_its_new_layers_and_lists_ten_of_them():
    model, optimizer = trained()
    larger, lines = make(n_layer=5), []
    state = export_optimizer_state(optimizer, model)
    made = larger.configure_optimizer(1e-2, optimizer_state=state, say=lines.append)
    new = [name for name, _ in larger.named_parameters() if name not in dict(model.named_parameters())]
    (line,) = lines
    assert line.startswith(f"reset: {len(new)} new parameters (blocks.2.sa.qkv.weight, ")
    assert line.endswith(f", and {len(new) - 10} more); moments start from zero")
    kept = {name: p for name, p in larger.named_parameters() if name not in new}
    assert_equal_bits(
        {f"{n}.{k}": v for n, p in kept.items() for k, v in made.state[p].items()}, moments(optimizer, model)
    )
    assert not any(made.state[p] for n, p in larger.named_parameters() if n in new)
    for group in made.param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] > 0}, "new ones decay like their kind"


def test_a_state_of_another_width_names_both_shapes():
    model, optimizer = trained()
    with pytest.raises(CheckpointMismatch, match=r"ln_f\.weight: exp_avg is \[16\], expected \[32\]"):
        make(n_embd=32, n_layer=1).configure_optimizer(1e-2, optimizer_state=_only(optimizer, model, "ln_f.weight"))


def _only(optimizer: torch.optim.Optimizer, model: GPT, name: str) -> dict:
    """A state with the names of a one-layer model, of which one has been updated."""
    state = export_optimizer_state(optimizer, model)
    for g in state["param_groups"]:
        pairs = [pair for pair in zip(g["params"], g["param_names"], strict=True) if "blocks.1." not in pair[1]]
        g["params"], g["param_names"] = ([pair[i] for pair in pairs] for i in (0, 1))
    kept = {i for g in state["param_groups"] for i, n in zip(g["params"], g["param_names"], strict=True) if n == name}
    return {
        "state": {i: entry for i, entry in state["state"].items() if i in kept},
        "param_groups": state["param_groups"],
    }


@pytest.mark.parametrize("shape", [[3], []], ids=["other", "scalar"])
def test_a_wrong_state_changes_nothing(shape):
    model, optimizer = trained()
    state = export_optimizer_state(optimizer, model)
    again = model.configure_optimizer(1e-2, optimizer_state=state)
    before = {name: t.clone() for name, t in moments(again, model).items()}
    broken = copy.deepcopy(state)
    broken["state"][0]["exp_avg_sq"] = torch.zeros(shape)
    said = re.escape(f"token_embedding_table.weight: exp_avg_sq is {shape}, expected [11, 16]")
    with pytest.raises(CheckpointMismatch, match=said):
        load_optimizer_state(again, broken)
    assert_equal_bits(moments(again, model), before)


def test_moments_of_a_parameter_that_the_model_lacks_are_refused_unless_told_otherwise():
    model, optimizer = trained()
    state = export_optimizer_state(optimizer, model)
    again = model.configure_optimizer(1e-2)
    lost = state["param_groups"][1]["param_names"].index("ln_f.weight")
    state["param_groups"][1]["param_names"][lost] = "ln_g.weight"
    with pytest.raises(CheckpointMismatch, match=r"optimizer state: ln_g\.weight is not in this model\."):
        load_optimizer_state(again, state)
    assert not again.state
    lines = load_optimizer_state(again, state, strict=False)
    assert [line.partition(":")[0] for line in lines] == ["reset", "dropped"] and "ln_g.weight" in lines[1]


@pytest.mark.parametrize("state", [{}, {"step": 3}, {"state": {}, "param_groups": [{}]}], ids=str)
def test_what_is_no_optimizer_state_is_said(state):
    with pytest.raises(CheckpointMismatch, match="expected state and param_groups"):
        configure_optimizer(make(), 1e-2, optimizer_state=state)


# Schedule


def test_constant_after_warm_up():
    schedule = Schedule(learning_rate=1.0, warmup_iters=4)
    assert [schedule.at(s) for s in (0, 1, 3, 4, 10**9)] == pytest.approx([0.2, 0.4, 0.8, 1.0, 1.0])


def test_without_warm_up_the_first_step_is_full():
    assert Schedule(learning_rate=0.3).at(0) == 0.3


def test_cosine_ends_at_a_tenth_and_stays_there():
    schedule = Schedule("cosine", 1.0, 10, 110)
    assert schedule.at(10) == 1.0
    assert schedule.at(60) == pytest.approx(0.55)
    assert schedule.at(35) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert schedule.at(110) == pytest.approx(0.1) and schedule.at(10**6) == pytest.approx(0.1)
    assert Schedule("cosine", 1.0, 0, 10, min_learning_rate=0.0).at(10) == 0.0


@given(
    warmup=st.integers(0, 50),
    length=st.integers(1, 100),
    step=st.integers(0, 300),
    kind=st.sampled_from(["constant", "cosine"]),
)
def test_rate_is_never_above_the_peak_nor_zero(warmup, length, step, kind):
    schedule = Schedule(kind, 3e-4, warmup, warmup + length)
    assert 0 < schedule.at(step) <= 3e-4 * (1 + 1e-12)
    assert Schedule.from_dict(schedule.to_dict()) == schedule


def test_fields_of_a_later_program_are_left_out():
    assert Schedule.from_dict({"kind": "constant", "learning_rate": 0.5, "cooldown": 9}) == Schedule(learning_rate=0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("linear",), "lr_schedule: found 'linear', expected constant or cosine"),
        (("constant", 0.0), r"learning_rate: found 0\.0"),
        (("constant", float("nan")), "learning_rate: found nan"),
        (("constant", 1.0, -1), "warmup_iters: found -1"),
        (("cosine", 1.0, 5), "cosine needs --lr_decay_iters, the step at which the rate is lowest"),
        (("cosine", 1.0, 5, 5), "lr_decay_iters: found 5, expected more than warmup_iters 5"),
        (("cosine", 1.0, 0, 5, 2.0), r"min_learning_rate \(--min_lr\): found 2\.0"),
    ],
)
def test_impossible_schedules_are_named(values, message):
    with pytest.raises(InputError, match=message):
        Schedule(*values)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"betas": "x"}, "group 0: betas is 'x', expected two numbers of at least 0"),
        ({"betas": 1.5}, "group 0: betas is 1.5, expected two numbers of at least 0"),
        ({"maximize": [None]}, "group 0: maximize is [None], expected true or false"),
        ({"betas": [0.9]}, "group 0: betas is [0.9]"),
        ({"betas": (0.9, None)}, "group 0: betas[1] is None"),
        ({"eps": "x"}, "group 0: eps is 'x'"),
        ({"weight_decay": None}, "group 0: weight_decay is None"),
        ({"amsgrad": True}, "has no max_exp_avg_sq, which amsgrad needs"),
    ],
    ids=str,
)
def test_settings_with_which_no_update_can_be_made_are_named_at_once(settings, said):
    model, optimizer = trained()
    state = optimizer.state_dict()
    state["param_groups"][0].update(settings)
    with pytest.raises(CheckpointMismatch) as raised:
        model.configure_optimizer(1e-2, optimizer_state=export_optimizer_state(optimizer, model) | state)
    assert said in str(raised.value)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_moments_of_a_tied_head_that_was_saved_twice_are_found_by_order(tmp_path, prefix):
    model = GPT(config(tied_head=True, head_bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(number + 1))
    optimizer.step()
    weights = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert f"{prefix}lm_head.weight" in weights
    content = {"model_state_dict": weights, "config": model.config.to_dict(), "step": 1}
    torch.save({**content, "optimizer_state_dict": optimizer.state_dict()}, tmp_path / "latest.pt")
    with open_legacy(tmp_path / "latest.pt") as bundle:
        state = load_optimizer(bundle)
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    expected = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
    assert names == list(expected)
    assert all(torch.equal(state["state"][i]["exp_avg"], expected[name]) for i, name in enumerate(names))
