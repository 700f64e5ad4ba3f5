"""What `load` gives back of an optimizer, reports or refuses: its groups, its state, and which optimizer it is."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from core.bundle.training_state import STATE, TrainingState, seal, unseal
from core.checkpoint import CheckpointManager
from core.errors import CheckpointMismatch, InputError
from tests.checkpoint.test_optimizer import make as make_gpt
from tests.checkpoint.test_optimizer import train as train_gpt
from tests.makers.optimizers import Bare, Counting, Fragile, Sharpness

SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.1),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3, cycle_momentum=False),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=2, factor=0.5),
}


@pytest.fixture(autouse=True)
def eager():
    """A compiled module that is called computes as it stands: only its names matter here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def saved(root, module, optimizer, step=3, **settings):
    with CheckpointManager("m", root, say=lambda line: None) as manager:
        manager.save(module, optimizer, step=step, **settings)


def load(root, module, optimizer, **settings):
    said = []
    CheckpointManager("m", root, say=said.append).load(module, optimizer, **settings)
    return [line.removeprefix(f"{root / 'm/optimizer.pt'}: ") for line in said]


def update(module, optimizer, times=2):
    for i in range(times):
        optimizer.zero_grad()
        module(torch.sin(torch.arange(8.0).view(2, 4) + i)).square().sum().backward()
        optimizer.step()


def snapshot(module, optimizer):
    """Copies of everything that a failed load may not change."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {k: dict(v) for k, v in optimizer.state.items()}
    return {name: p.detach().clone() for name, p in module.named_parameters()}, groups, state


def assert_unchanged(module, optimizer, before):
    weights, groups, state = snapshot(module, optimizer)
    assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
    assert groups == before[1] and state.keys() == before[2].keys()
    assert all(state[p][key] is value for p, entry in before[2].items() for key, value in entry.items())


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_goes_on_along_its_own_curve(tmp_path, kind):
    def fresh():
        torch.manual_seed(0)
        module = nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        return module, optimizer, SCHEDULERS[kind](optimizer)

    def run(module, optimizer, scheduler, steps):
        rates = []
        for _ in steps:
            update(module, optimizer, 1)
            scheduler.step(*[1.0] if kind == "plateau" else [])
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    whole = fresh()
    rates = run(*whole, range(10))
    module, optimizer, scheduler = fresh()
    run(module, optimizer, scheduler, range(5))
    saved(tmp_path, module, optimizer, step=5)
    position = scheduler.state_dict()
    module, optimizer, scheduler = fresh()
    assert load(tmp_path, module, optimizer) == []
    assert optimizer.param_groups[0]["lr"] == rates[4]
    scheduler.load_state_dict(position)
    assert run(module, optimizer, scheduler, range(5, 10)) == rates[5:]
    assert torch.equal(module.weight, whole[0].weight)


def test_every_value_of_a_group_comes_back_and_the_dicts_stay_those_that_others_hold(tmp_path):
    module = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW([{"params": [module.weight], "name": "matrix"}, {"params": [module.bias]}], lr=0.5)
    group, last = optimizer.param_groups
    group |= {"lr": 0.125, "betas": (0.5, 0.75), "weight_decay": 3.0, "eps": 1e-3, "tokens": 7, "scale": {"a": [1, 2]}}
    last["initial_lr"] = torch.tensor(0.25, dtype=torch.float64)
    update(module, optimizer)
    saved(tmp_path, module, optimizer)
    again = nn.Linear(4, 2)
    other = torch.optim.AdamW([{"params": [again.weight]}, {"params": [again.bias]}], lr=0.5)
    state, groups, first = other.state, other.param_groups, other.param_groups[0]
    assert load(tmp_path, again, other) == []
    assert other.state is state and other.param_groups is groups and groups[0] is first
    assert {k: v for k, v in first.items() if k != "params"} == {k: v for k, v in group.items() if k != "params"}
    assert groups[1]["lr"] == 0.5 and groups[1]["initial_lr"].dtype == torch.float64 and groups[1]["initial_lr"] == 0.25
    update(module, optimizer), update(again, other)
    assert torch.equal(module.weight, again.weight) and torch.equal(module.bias, again.bias)


def test_values_on_which_the_saved_groups_do_not_agree_stay_and_are_reported(tmp_path):
    module = nn.Linear(4, 2)
    optimizer = torch.optim.SGD([{"params": [module.weight], "lr": 0.1}, {"params": [module.bias], "lr": 0.2}])
    optimizer.param_groups[1]["note"] = 1
    saved(tmp_path, module, optimizer)
    again = nn.Linear(4, 2)
    other = torch.optim.SGD(again.parameters(), lr=0.7, momentum=0.9)
    other.param_groups[0]["warm"] = True
    assert load(tmp_path, again, other) == [
        "kept: lr of group 0 stays 0.7; its parameters were saved with 0.1, 0.2",
        "kept: note of group 0 stays unset; its parameters were saved with 1",
        "kept: warm of group 0 stays True; the file has none",
    ]
    assert (other.param_groups[0]["lr"], other.param_groups[0]["momentum"]) == (0.7, 0)


def test_groups_split_or_reordered_get_the_values_of_their_parameters(tmp_path):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    a, b = list(module[0].parameters()), list(module[1].parameters())
    optimizer = torch.optim.AdamW([{"params": a, "lr": 0.1}, {"params": b, "lr": 0.2}])
    update(module, optimizer)
    saved(tmp_path, module, optimizer)
    again = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    other = torch.optim.AdamW(
        [{"params": [again[1].bias]}, {"params": [again[0].bias]}, {"params": [again[1].weight, again[0].weight][:1]}]
    )
    lines = load(tmp_path, again, other)
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.1, 0.2]
    assert lines == ["dropped: the moments of 1 parameter (0.weight), no longer in the optimizer"]
    assert torch.equal(other.state[again[1].bias]["exp_avg"], optimizer.state[module[1].bias]["exp_avg"])


@pytest.mark.parametrize(
    ("make", "made", "said"),
    [
        ("AdamW", "SGD", "found the state of AdamW, expected that of SGD. Load into the optimizer that was saved, or"),
        ("SGD", "AdamW", "found the state of SGD, expected that of AdamW. Load into"),
        ("AdamW", "Adagrad", "found the state of AdamW, expected that of Adagrad. Load into"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_another_optimizer_is_refused_and_nothing_changes(tmp_path, make, made, said, recorded):
    module, again = nn.Linear(4, 2), nn.Linear(4, 2)
    optimizer = getattr(torch.optim, make)(module.parameters(), lr=0.1)
    update(module, optimizer)
    saved(tmp_path, module, optimizer)
    if not recorded:
        forget(tmp_path / "m/training_state.json", "optimizer_class")
        said = "group 0 has no "
    other = getattr(torch.optim, made)(again.parameters(), lr=0.2)
    update(again, other)
    before = snapshot(again, other)
    with pytest.raises(CheckpointMismatch) as caught:
        load(tmp_path, again, other)
    assert str(caught.value).startswith(f"{tmp_path / 'm/optimizer.pt'}: {said}")
    assert str(caught.value).endswith(" Nothing was changed.")
    assert_unchanged(again, other, before)


def forget(path, name):
    """Take an entry out of a training state, as an older program would have left it."""
    state = unseal(path.read_bytes(), STATE)
    older = TrainingState.from_dict({key: value for key, value in state.items() if key != name})
    path.write_bytes(seal(older, state.files))


def test_the_class_is_recorded_by_name(tmp_path):
    module = nn.Linear(4, 2)
    saved(tmp_path, module, torch.optim.NAdam(module.parameters()))
    assert json.loads((tmp_path / "m/training_state.json").read_text())["optimizer_class"] == "NAdam"


def test_an_optimizer_whose_own_load_fails_leaves_all_as_they_were(tmp_path):
    module, again = nn.Linear(4, 2), nn.Linear(4, 2)

    def pair(net):
        return {"a": torch.optim.SGD([net.weight], lr=0.1, momentum=0.5), "b": Fragile([net.bias], momentum=0.5)}

    first = pair(module)
    for one in first.values():
        update(module, one)
    saved(tmp_path, module, first)
    other = pair(again)
    other["a"].param_groups[0]["lr"] = 0.75
    for one in other.values():
        update(again, one)
    befores = {name: snapshot(again, one) for name, one in other.items()}
    with pytest.raises(CheckpointMismatch) as caught:
        load(tmp_path, again, other)
    assert str(caught.value) == (
        f"{tmp_path / 'm/optimizer.pt'}: load_state_dict of Fragile did not take the state (ValueError: no slot 7). "
        "Nothing was changed."
    )
    for name, one in other.items():
        assert_unchanged(again, one, befores[name])


def test_an_optimizer_inside_another_one_is_saved_with_it_or_refused(tmp_path):
    module = nn.Linear(4, 2)
    outer = Sharpness(module.parameters())
    update(module, outer)
    with pytest.raises(InputError) as caught:
        saved(tmp_path, module, outer)
    assert str(caught.value) == (
        "optimizer.pt: Sharpness holds another optimizer (base: AdamW), whose state its state_dict() leaves out. Save "
        'both: {"outer": optimizer, "base": optimizer.base}. Nothing was written.'
    )
    saved(tmp_path, module, {"outer": outer, "base": outer.base})
    again = nn.Linear(4, 2)
    other = Sharpness(again.parameters())
    assert load(tmp_path, again, {"outer": other, "base": other.base}) == []
    update(module, outer), update(again, other)
    assert torch.equal(module.weight, again.weight)


def test_what_has_no_groups_by_parameter_is_refused_at_save(tmp_path):
    module = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(module.parameters())
    optimizer.state_dict = lambda: {"slots": [1]}
    with pytest.raises(InputError, match=r"^optimizer\.pt: state_dict\(\) of SGD has slots, expected state and param_"):
        saved(tmp_path, module, optimizer)
    with pytest.warns(UserWarning, match="duplicate"):
        twice = torch.optim.SGD([module.weight, module.weight])
    with pytest.raises(InputError, match=r"^optimizer\.pt: the optimizer has weight twice, expected once\."):
        saved(tmp_path, module, twice)
    assert not (tmp_path / "m/model.pt").exists()


def test_an_optimizer_without_hooks_is_copied_before_save_returns(tmp_path):
    module = nn.Linear(4, 2)
    optimizer = Bare(module.parameters())
    optimizer.state_dict = lambda: {"state": {}, "param_groups": [{"params": [0, 1], "lr": 0.5}]}
    before = module.weight.detach().clone()
    with CheckpointManager("m", tmp_path, say=lambda line: None) as manager:
        manager.save(module, optimizer, step=1)
        update(module, optimizer)
    assert torch.equal(torch.load(tmp_path / "m/model.pt", weights_only=True)["weight"], before)


def test_state_of_another_dtype_than_its_parameter_stays_and_what_followed_it_follows(tmp_path):
    module = nn.Linear(4, 2)
    optimizer = Counting(module.parameters())
    update(module, optimizer)
    saved(tmp_path, module, optimizer)
    again = nn.Linear(4, 2).bfloat16()
    other = Counting(again.parameters())
    load(tmp_path, again, other)
    entry, was = other.state[again.weight], optimizer.state[module.weight]
    assert entry["z"].dtype == torch.float64 and torch.equal(entry["z"], was["z"])
    adam = torch.optim.AdamW(module.parameters())
    update(module, adam)
    saved(tmp_path / "adam", module, adam)
    small = torch.optim.AdamW(again.parameters())
    load(tmp_path / "adam", again, small)
    assert torch.equal(small.state[again.weight]["exp_avg"], adam.state[module.weight]["exp_avg"].bfloat16())


@pytest.mark.parametrize("kind", ["Adafactor", "NAdam", "SGD", "ASGD", "Rprop"])
def test_a_gpt_goes_on_with_any_optimizer(tmp_path, kind):
    def fresh():
        model = make_gpt()
        settings = {"momentum": 0.9} if kind == "SGD" else {}
        return model, getattr(torch.optim, kind)(model.parameters(), lr=0.01, **settings)

    whole, optimizer = fresh()
    train_gpt(whole, optimizer, 3), train_gpt(whole, optimizer, 3)
    model, optimizer = fresh()
    train_gpt(model, optimizer, 3)
    saved(tmp_path, model, optimizer)
    model, optimizer = fresh()
    assert load(tmp_path, model, optimizer) == []
    train_gpt(model, optimizer, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


class Pair(nn.Module):
    """As GANs have: two networks of one shape."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("container", [dict, list])
def test_modules_and_optimizers_in_dicts_and_lists_are_saved_by_name(tmp_path, container):
    def fresh(seed):
        torch.manual_seed(seed)
        nets = {"gen": Pair(), "disc": torch.compile(Pair())}
        made = {
            "gen": torch.optim.AdamW(nets["gen"].parameters(), lr=0.01),
            "disc": torch.optim.SGD(nets["disc"].parameters(), lr=0.02, momentum=0.9),
        }
        return nets, made

    def train(nets, made, steps):
        for i in steps:
            x = torch.sin(torch.arange(8.0).view(2, 4) + i)
            for name in nets:
                made[name].zero_grad()
                nets["disc"](nets["gen"](x)).square().mean().backward()
                made[name].step()

    def given(values):
        return values if container is dict else list(values.values())

    whole = fresh(0)
    train(*whole, range(6))
    nets, made = fresh(0)
    train(nets, made, range(3))
    saved(tmp_path, given(nets), given(made))
    names = ("gen", "disc") if container is dict else ("0", "1")
    weights = torch.load(tmp_path / "m/model.pt", weights_only=True)
    moments = torch.load(tmp_path / "m/optimizer.pt", weights_only=True)
    assert {name.partition(".")[0] for name in weights} == set(names) == set(moments)
    assert moments[names[1]]["param_groups"][0]["param_names"][0] == f"{names[1]}.net.0.weight"
    state = json.loads((tmp_path / "m/training_state.json").read_text())
    assert state["optimizer_class"] == dict(zip(names, ("AdamW", "SGD"), strict=True))
    nets, made = fresh(1)
    assert load(tmp_path, given(nets), given(made)) == []
    train(nets, made, range(3, 6))
    for name in nets:
        for a, b in zip(nets[name].parameters(), whole[0][name].parameters(), strict=True):
            assert torch.equal(a, b)


def test_other_names_of_optimizers_are_refused_and_nothing_changes(tmp_path):
    module, again = nn.Linear(4, 2), nn.Linear(4, 2)
    one = torch.optim.SGD(module.parameters(), momentum=0.9)
    saved(tmp_path, module, {"a": one, "b": torch.optim.SGD([module.bias], lr=1.0)})
    other = torch.optim.SGD(again.parameters(), lr=0.5)
    before = snapshot(again, other)
    for given, expected in (
        (other, "one optimizer"),
        ({"a": other}, "the optimizers a"),
        ([other], "the optimizers 0"),
    ):
        with pytest.raises(CheckpointMismatch) as caught:
            load(tmp_path, again, given)
        assert str(caught.value) == (
            f"{tmp_path / 'm/optimizer.pt'}: found the optimizers a, b, expected {expected}. Load with the names that "
            "were saved. Nothing was changed."
        )
        assert_unchanged(again, other, before)
    with pytest.raises(InputError, match=r"^optimizer is of type dict, expected an optimizer, or a dict or list"):
        load(tmp_path, again, {"a": 1})


def test_states_by_name_fill_optimizers_by_name(tmp_path):
    module, again = nn.Linear(4, 2), nn.Linear(4, 2)
    one = {"w": torch.optim.Adam([module.weight]), "b": torch.optim.SGD([module.bias], lr=0.5, momentum=0.9)}
    for optimizer in one.values():
        update(module, optimizer)
    saved(tmp_path, module, {name: optimizer.state_dict() for name, optimizer in one.items()})
    other = {"w": torch.optim.Adam([again.weight]), "b": torch.optim.SGD([again.bias], lr=0.1)}
    assert load(tmp_path, again, other) == []
    assert torch.equal(other["w"].state[again.weight]["exp_avg"], one["w"].state[module.weight]["exp_avg"])
    assert (other["b"].param_groups[0]["lr"], other["b"].param_groups[0]["momentum"]) == (0.5, 0.9)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({}, r"model is of type dict, expected a module, or a dict or list of modules\. Nothing"),
        ({"a": 1}, r"model\['a'\] is of type int, expected a module\. Nothing"),
        (
            {"a.b": nn.Linear(1, 1)},
            r"model: module name can't contain \"\.\", got: a\.b\. Expected are names without dots",
        ),
        ({"type": nn.Linear(1, 1)}, r"model: attribute 'type' already exists\. Expected are"),
        (7, r"model is of type int, expected a module"),
    ],
)
def test_what_is_no_module_is_refused(tmp_path, models, said):
    with pytest.raises(InputError, match=said):
        saved(tmp_path, models, None)
    with pytest.raises(InputError, match=said):
        load(tmp_path, models, None)


def test_what_is_no_optimizer_among_others_is_refused(tmp_path):
    module = nn.Linear(4, 2)
    with pytest.raises(InputError) as caught:
        saved(tmp_path, module, {"a": torch.optim.SGD(module.parameters()), "b": {"state": {}}, 3: None})
    assert str(caught.value) == (
        "optimizer['b'] is of type dict; optimizer[3] is of type NoneType; the name 3 is no text, expected optimizers "
        "by name. Nothing was changed."
    )
