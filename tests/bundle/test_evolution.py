"""A config of any age: what it lacks, what we do not know in it, and what cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.bundle.evolution import REPAIRS, Evidence, evolve, notes, one_step_less
from core.config.gpt import ACTIVATIONS, GPTConfig
from core.errors import CheckpointMismatch, InputError
from core.families.fused import recognise
from core.model import GPT
from core.networks.device import resolve_device
from tests.makers.doors import OF_A_FOLDER, edit, generate, legacy, looked_at, refused, single, train
from tests.makers.generations import EXTRA, SIZES, FusedGPT, LectureGPT, trained, write_old_bundle, write_single_file
from tests.makers.models import save_durably
from tests.makers.old_runs import assert_same_logits, manager, resume

COUNTS = ("batch_size", "block_size", "vocab_size", "n_embd", "n_head", "n_layer")
SWITCHES = ("bias", "tied_head", "head_bias", "norm_bias", "mlp_bias")
ALLOWED = {
    **dict.fromkeys(COUNTS, "a whole number of at least 1"),
    **dict.fromkeys((*SWITCHES, "proj_bias"), "true or false"),
    "dropout": "a number of at least 0 and below 1",
    "device": "auto, cpu, cuda or cuda:N",
    "activation": "gelu, gelu_tanh, relu",
}


def without(folder: Path, *fields: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in fields}))


def fits(field: str, value: Any) -> bool:
    """What the documentation of each field promises to take."""
    if field in COUNTS:
        return type(value) is int and 0 < value < 2**31
    if field in SWITCHES:
        return type(value) is bool
    if field == "proj_bias":
        return value is None or type(value) is bool
    if field == "dropout":
        return type(value) in (int, float) and 0 <= value < 1
    if field == "device":
        return isinstance(value, str) and value != ""
    return value in ACTIVATIONS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ACTIVATIONS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(field=st.sampled_from(sorted(ALLOWED)), value=JSON)
@example("n_head", True)
@example("n_layer", 0)
@example("n_embd", 2**31)
@example("dropout", 1)
@example("dropout", math.nan)
@example("bias", 0)
@example("bias", "true")
@example("device", "")
@example("activation", ["relu"])
@example("proj_bias", "no")
@example("n_head", None)
def test_every_value_of_every_field_is_taken_as_it_is_or_refused_by_name(field, value):
    other = {"n_embd": {"n_head": 1}, "n_head": {"n_embd": value}}.get(field, {}) if fits(field, value) else {}
    try:
        config = GPTConfig.from_dict({**other, field: value}, "here/config.json")
    except CheckpointMismatch as error:
        assert not fits(field, value)
        assert f"{field} is {value!r}, expected {ALLOWED[field]}" in str(error)
        assert str(error).startswith("here/config.json: ")
    else:
        assert fits(field, value) and getattr(config, field) is value


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=12), JSON, max_size=6))
@example({"rope_scaling": None, "qk_norm": False})
def test_any_json_as_a_config_is_taken_or_refused_and_what_is_unknown_is_kept(values):
    try:
        config = GPTConfig.from_dict(values)
    except CheckpointMismatch as error:
        assert any(name in str(error) for name in values)
    else:
        kept = {name: value for name, value in values.items() if name not in GPTConfig.NEUTRAL}  # others are settled
        assert {**config.to_dict(), **kept, "format_version": 2} == {**config.to_dict(), "format_version": 2}


def test_several_impossible_values_are_all_named(folder):
    write_old_bundle(folder, FusedGPT(**SIZES), step=3)
    edit(folder / "config.json", n_layer="2", dropout=1.5, bias=None, n_head=0)
    said = [
        "n_head is 0, expected a whole number of at least 1",
        "n_layer is '2', expected a whole number of at least 1",
        "dropout is 1.5, expected a number of at least 0 and below 1",
        "bias is None, expected true or false",
    ]
    for door in OF_A_FOLDER:
        refused(door, folder, f"{folder / 'config.json'}: ", *said, kind=CheckpointMismatch)
    assert f"contradiction: {folder / 'config.json'}: {said[0]}" in looked_at(folder)[0]


def test_heads_that_do_not_divide_the_width_are_told_with_those_that_would(folder):
    write_old_bundle(folder, FusedGPT(**SIZES), step=3)
    edit(folder / "config.json", n_head=5)
    said = f"{folder / 'config.json'}: n_embd 24 is not divisible by n_head 5; n_head may be 1, 2, 3, 4, 6, 8, 12, 24."
    for door in OF_A_FOLDER:
        assert refused(door, folder, kind=CheckpointMismatch) == said


# What other programs computed and ours does not


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("pos_encoding", "alibi", "learned, rotary, none"),
        ("norm_type", "batchnorm", "layernorm, layernorm_1p, rmsnorm, rmsnorm_1p, rmsnorm_no_weight"),
        ("mlp_type", "reglu", "gelu, gelu_tanh, relu, relu_squared, swiglu, geglu"),
    ],
)
def test_what_would_compute_something_else_is_refused_with_what_is_computed(folder, field, value, allowed):
    theirs = FusedGPT(**SIZES, **{field: value})
    said = f"{field} is {value!r}, expected {allowed}"
    write_old_bundle(folder, theirs, step=3)
    for door in OF_A_FOLDER:
        refused(door, folder, f"{folder / 'config.json'}: {said}.", kind=CheckpointMismatch)
    write_single_file(folder / "latest.pt", theirs, step=4, config="object")
    refused(legacy, folder, f"{folder / 'latest.pt'}: {said}.", kind=CheckpointMismatch)


@pytest.mark.parametrize(
    "values", [{"pos_encoding": "learned", "norm_type": "layernorm", "mlp_type": "mlp"}, {"mlp_type": None}]
)
def test_fields_of_other_programs_that_say_what_we_compute_are_taken(folder, values):
    theirs = FusedGPT(**SIZES, **values)
    ours = GPT.load_legacy(write_single_file(folder / "latest.pt", theirs, step=3))[0]
    assert_same_logits(ours, theirs)
    assert ours.config.unknown == values


# Unknown fields


@pytest.mark.parametrize("form", ["dict", "object", "namespace", "bundle"])
def test_unknown_fields_are_reported_and_kept_through_resume_and_save(folder, form):
    theirs = FusedGPT(**SIZES, **EXTRA, nested=(1, None, ("b", 2.5)))
    if form == "bundle":
        write_old_bundle(folder, theirs, step=3)
        where = folder / "config.json"
    else:
        where = write_single_file(folder / "latest.pt", theirs, step=3, config=form)
    names = [*EXTRA, "nested"]
    said = f"{where}: kept as they are, and not used here: {', '.join(names)}"
    assert f"note: {said}\n" in looked_at(folder)[0]
    lines: list[str] = []
    with manager(folder.parent, lines=lines) as made:
        model, optimizer, _ = resume(made)
        save_durably(made, model, optimizer, step=4)
    assert said in lines
    written = json.loads((folder / "config.json").read_text())
    assert {name: written[name] for name in names} == {**EXTRA, "nested": [1, None, ["b", 2.5]]}
    with manager(folder.parent) as made:
        model, optimizer, step = resume(made)
        save_durably(made, model, optimizer, step=5)
    assert step == 4 and json.loads((folder / "config.json").read_text()) == written


def test_field_called_unknown_is_kept_like_any_other(folder):
    write_old_bundle(folder, FusedGPT(**SIZES), step=3)
    edit(folder / "config.json", unknown={"n_head": 7})
    config = GPT.load(folder)[0].config
    assert config.to_dict()["unknown"] == {"n_head": 7} and config.n_head == 3


# Missing fields

OF_LECTURE = {"n_head": 3, "activation": "relu", "bias": False, "proj_bias": True}
OF_FUSED = {"activation": "gelu", "bias": False, "proj_bias": None}
SHOWN = {**SIZES, "mlp_bias": True, "norm_bias": True, "head_bias": True, "tied_head": False}


def evidence(model: torch.nn.Module) -> Evidence:
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    plan = recognise(shapes)
    return Evidence(plan, plan.shapes(shapes))


@pytest.mark.parametrize("field", REPAIRS)
def test_each_missing_field_gets_its_documented_value(field):
    for model, shown in ((LectureGPT(**SIZES), OF_LECTURE), (FusedGPT(**SIZES), OF_FUSED)):
        if field == "n_head" and shown is OF_FUSED:
            continue  # nothing shows it
        expected = {**SHOWN, **shown}
        config = evolve({k: v for k, v in model.config.items() if k != field}, evidence(model), "c")
        assert getattr(config, field) == expected[field]


def test_config_without_any_field_is_that_of_its_lecture_style_tensors(folder):
    theirs = LectureGPT(**SIZES)
    write_old_bundle(folder, theirs, step=3)
    (folder / "config.json").write_text("{}")
    assert generate(folder) == 3
    ours = GPT.load(folder)[0]
    assert_same_logits(ours, theirs)
    assert {name: getattr(ours.config, name) for name in SIZES} == SIZES
    assert (ours.config.batch_size, ours.config.dropout, ours.config.device) == (32, 0.2, "auto")


def test_bias_that_no_field_speaks_of_is_that_of_the_tensors(folder):
    theirs = FusedGPT(**SIZES, bias=True)
    write_old_bundle(folder, theirs, step=3)
    without(folder, "bias")
    ours = GPT.load(folder)[0]
    assert ours.config.bias and ours.config.has_proj_bias
    assert_same_logits(ours, theirs)


def test_missing_heads_are_refused_in_fused_weights(folder):
    write_old_bundle(folder, FusedGPT(**SIZES), step=3)
    without(folder, "n_head")
    said = (
        f"{folder / 'config.json'}: n_head is missing, and fused weights do not show it. Add it: another number of "
        "heads would compute something else from the same tensors."
    )
    for door in OF_A_FOLDER:
        assert refused(door, folder, kind=CheckpointMismatch) == said
    assert f"contradiction: {said}\n" in looked_at(folder)[0]


@pytest.mark.parametrize("form", ["object", "namespace"])
def test_config_pickled_as_an_object_lacks_fields_in_the_same_way(folder, form):
    theirs = LectureGPT(**SIZES)
    for field in ("bias", "n_head", "device", "dropout"):
        del theirs.config[field]
    ours = GPT.load_legacy(write_single_file(folder / "latest.pt", theirs, step=3, config=form))[0]
    assert_same_logits(ours, theirs)
    assert (ours.config.n_head, ours.config.bias, ours.config.has_proj_bias) == (3, False, True)


class DefaultsConfig:
    """A class whose instances pickle without attributes."""


def test_config_object_that_relied_on_the_defaults_of_its_class_is_shown(folder):
    path = single(folder, FusedGPT(**SIZES), None, config=DefaultsConfig())
    said = "its config is tests.bundle.test_evolution.DefaultsConfig(), expected fields by name"
    refused(legacy, folder, f"{path}: {said} (a dict, or an object with attributes).", kind=CheckpointMismatch)


# A device is a wish


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_device_that_is_not_here_falls_back_with_one_line_and_stays_in_the_file(folder, device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    write_old_bundle(folder, FusedGPT(**SIZES), step=3)
    edit(folder / "config.json", device=device)
    ours = GPT.load(folder)[0]
    assert ours.ln_f.weight.device.type == "cpu"
    assert capsys.readouterr().err == f"{folder / 'config.json'}: {device} is not on this machine; using the CPU\n"
    with manager(folder.parent) as made:
        model, optimizer, _ = resume(made)
        save_durably(made, model, optimizer, step=4)
    assert json.loads((folder / "config.json").read_text())["device"] == device


# One step less


def test_last_save_of_old_programs_is_reported_and_used_as_recorded(folder):
    theirs = FusedGPT(**SIZES)
    moments = trained(theirs)
    said = (
        "step 999 is recorded, and training_config has max_iters 1000: the last save of old programs recorded one step "
        "less than was made. 999 is used."
    )
    training = {"max_iters": 1000, "learning_rate": 3e-3}
    write_old_bundle(folder, theirs, moments, step=999, training_config=training)
    lines: list[str] = []
    assert train(folder, lines) == 999 and f"{folder / 'config.json'}: {said}" in lines
    assert f"note: {folder / 'config.json'}: {said}\n" in looked_at(folder)[0]
    path = write_single_file(folder / "latest.pt", theirs, moments, step=1999, training_config={"max_iters": 2000})
    lines = []
    assert train(folder, lines) == 1999
    assert f"{path}: {said.replace('999', '1999').replace('1000', '2000')}" in lines


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"step": 1000, "training_config": {"max_iters": 1000}},
        {"step": 500, "training_config": {"max_iters": 1000}},
        {"step": 999},
        {"step": 999, "training_config": None},
        {"step": 999, "training_config": [1000]},
        {"step": 999, "training_config": {"max_iters": "1000"}},
        {"training_config": {"max_iters": 1000}},
    ],
    ids=str,
)
def test_other_steps_are_not_reported(state):
    assert one_step_less(state) is None and notes("c", None, state) == []


def test_single_file_keeps_its_unusual_config_values_as_text(folder):
    theirs = FusedGPT(**SIZES)
    path = single(folder, theirs, None, config={**theirs.config, "where": Path("data"), "dtype": torch.bfloat16})
    unknown = GPT.load_legacy(path)[0].config.unknown
    assert unknown["dtype"] == "torch.bfloat16" and "data" in unknown["where"]


@pytest.mark.parametrize("name", ["mps", "xpu", "cuda:7"])
def test_any_device_of_another_machine_falls_back_with_a_line(name, capsys):
    assert str(resolve_device(name, "config.json")) == "cpu"
    assert capsys.readouterr().err == f"config.json: {name} is not on this machine; using the CPU\n"


def test_a_device_without_numbers_is_refused():
    with pytest.raises(InputError, match=r"config\.json: meta holds no numbers"):
        resolve_device("meta", "config.json")
