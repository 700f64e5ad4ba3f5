"""What decides the logits of a converted model has an origin, and the logits are those of its writer."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert_checkpoints import main
from core.checkpoint import CheckpointManager
from core.errors import CheckpointMismatch
from core.inspection.inspect import inspect_path
from core.inspection.report import facts_of
from core.model import GPT
from tests.makers.conversions import converted, our_logits, texts, worst
from tests.makers.small_gpts import SmallGPT

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-5


class GPTConfig:
    """What build-nanogpt pickles as the config of its model."""


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def bundle_of(tmp_path: Path, source: Path, **choices: object) -> dict:
    return converted(source, tmp_path / "bundle", "bundle", choices=choices)


def off(tmp_path: Path, made: SmallGPT, **forward: bool) -> float:
    return worst(our_logits(tmp_path / "bundle", made.ids()), made.logits(made.ids(), **forward))


def said(source: Path, tmp_path: Path, **choices: object) -> str:
    with pytest.raises(CheckpointMismatch) as caught:
        bundle_of(tmp_path, source, **choices)
    assert not (tmp_path / "bundle").exists()
    return str(caught.value)


# The number of heads


@pytest.mark.parametrize(("width", "heads"), [(32, "1, 2, 4, 8, 16 or 32"), (48, "1, 2, 3, 4, 6, 8, 12, 16, 24 or 48")])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "model._orig_mod."])
def test_a_state_dict_alone_is_refused_with_the_flags_and_values_that_fit(tmp_path, width, heads, prefix):
    source = saved(tmp_path / "state.pt", SmallGPT(n_embd=width).nanogpt(prefix))
    assert said(source, tmp_path) == (
        f"{source}: nothing in the file shows its heads and activation, without which its logits are not known. "
        f"Add --n_head {heads}; --activation gelu (nanoGPT since 2023-06-14), gelu_tanh (nanoGPT before, minGPT, "
        "build-nanogpt, OpenAI's GPT-2) or relu."
    )
    assert "its activation, without" in said(source, tmp_path, n_head=4)
    with inspect_path(source) as found:
        shown = {choice["name"]: choice["value"] for choice in facts_of(found)["choices"]}
    assert (shown["n_head"], shown["activation"]) == (None, None)


@given(
    heads=st.sampled_from([1, 2, 3, 4, 6]),
    size=st.sampled_from([4, 8]),
    bias=st.booleans(),
    activation=st.sampled_from(["gelu", "gelu_tanh", "relu"]),
    wrapper=st.sampled_from(["hyper_parameters", "hparams", "config", "args", "cfg.model", "settings"]),
    prefix=st.sampled_from(["", "model.", "_orig_mod."]),
    seed=st.integers(0, 5),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sizes_under_any_key_are_those_of_the_file(
    tmp_path_factory, heads, size, bias, activation, wrapper, prefix, seed
):
    tmp_path = tmp_path_factory.mktemp("sizes")
    made = SmallGPT(n_head=heads, n_embd=heads * size, bias=bias, activation=activation, seed=seed)
    outer, _, inner = wrapper.partition(".")
    fields = {**made.sizes, "activation": activation}
    content = {"state_dict": made.nanogpt(prefix), outer: {inner: fields, "lr": 0.1} if inner else fields, "epoch": 3}
    facts = bundle_of(tmp_path, saved(tmp_path / "x.ckpt", content))
    assert f"heads {heads} (from {wrapper})" in texts(facts)
    assert f"activation {activation} (from {wrapper})" in texts(facts)
    assert off(tmp_path, made) < EXACT


def test_a_flag_that_the_file_contradicts_is_refused(tmp_path):
    made = SmallGPT()
    source = saved(tmp_path / "ckpt.pt", {"model": made.nanogpt(), "model_args": made.sizes})
    assert said(source, tmp_path, n_head=8) == f"{source}: --n_head is 8, but its config has 4. Leave it out."
    assert said(source, tmp_path, rope_theta=1e4).endswith(
        "--rope_theta has no effect on a model of this family. Leave it out."
    )
    alone = saved(tmp_path / "state.pt", made.nanogpt())
    assert said(alone, tmp_path, n_head=5) == f"{alone}: --n_head is 5, which does not divide the width 32."
    lecture = saved(tmp_path / "lecture.pt", made.lecture())
    assert said(lecture, tmp_path, n_head=2) == f"{lecture}: --n_head is 2, but its tensors have 4. Leave it out."


# The activation


def nanogpt_file(made: SmallGPT, kind: str) -> dict:
    args = {**made.sizes, "dropout": 0.0}
    content = {"model": made.nanogpt(), "model_args": args, "iter_num": 7}
    match kind:
        case "today":
            return content | {"optimizer": made.groups(are_old=False)}
        case "sorted groups":
            return content | {"optimizer": made.groups(are_old=True)}
        case "no bias field":
            return content | {"model_args": {k: v for k, v in args.items() if k != "bias"}}
        case "no optimizer":
            return content
    config = GPTConfig()
    config.__dict__.update({k: v for k, v in made.sizes.items() if k != "bias"})
    return {"model": made.nanogpt(), "config": config, "step": 50, "val_loss": 3.25}


@pytest.mark.parametrize(
    ("kind", "activation", "origin", "is_sure"),
    [
        ("today", "gelu", "nanoGPT, since 2023-06-14", True),
        ("no optimizer", "gelu", "nanoGPT, since 2023-06-14", False),
        ("sorted groups", "gelu_tanh", "nanoGPT, before 2023-06-14, told by the groups of its optimizer", True),
        ("no bias field", "gelu_tanh", "nanoGPT, before 2023-06-14, told by model_args without bias", True),
        ("build-nanogpt", "gelu_tanh", "build-nanogpt, told by its keys", True),
    ],
)
def test_the_activation_is_that_of_the_program_and_its_time(tmp_path, kind, activation, origin, is_sure):
    made = SmallGPT(activation=activation)
    source = saved(tmp_path / "ckpt.pt", nanogpt_file(made, kind))
    facts = bundle_of(tmp_path, source)
    assert f"activation {activation} ({origin})" in texts(facts)
    (choice,) = (one for one in facts["choices"] if one["name"] == "activation")
    assert (choice["warning"] is None) is is_sure
    assert off(tmp_path, made) < EXACT
    if not is_sure:
        assert choice["warning"] == (
            f"activation gelu ({origin}): nanoGPT computed gelu_tanh before that date. If this file is of that kind, "
            "add --activation gelu_tanh."
        )
    if kind in ("no optimizer", "today"):  # a flag is of more weight than a program's habit
        other = SmallGPT(activation="gelu_tanh")
        converted(source, tmp_path / "again", "bundle", choices={"activation": "gelu_tanh"})
        assert worst(our_logits(tmp_path / "again", other.ids()), other.logits(other.ids())) < EXACT


def test_hugging_faces_gpt2_without_its_config_needs_heads_and_activation_and_gets_a_config_from_them(shared, tmp_path):
    folder = shared / "fixtures/hf_gpt2"
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    heads = json.loads((folder / "config.json").read_text())["n_head"]
    for source in (tmp_path / "alone", tmp_path / "alone/model.safetensors"):
        assert "its heads and activation" in said(source, tmp_path)
    choices = {"n_head": heads, "activation": "gelu_tanh"}
    converted(tmp_path / "alone", tmp_path / "hf", "hf", choices=choices)
    made = json.loads((tmp_path / "hf/config.json").read_text())
    assert (made["n_head"], made["activation_function"], made["model_type"]) == (heads, "gelu_new", "gpt2")
    ids = torch.arange(8)[None]
    converted(folder, tmp_path / "a", "bundle")
    converted(tmp_path / "hf", tmp_path / "b", "bundle")
    assert torch.equal(our_logits(tmp_path / "a", ids), our_logits(tmp_path / "b", ids))


# Scale, norms and their epsilon


@pytest.mark.parametrize(("scale", "normed_after"), [("n_embd", False), ("head_size", True), (0.2, True)])
@pytest.mark.parametrize("has_config", [True, False])
def test_old_mathematics_under_the_lectures_names_is_computed_once_it_is_told(
    tmp_path, scale, normed_after, has_config
):
    factor = {"n_embd": 32**-0.5, "head_size": 8**-0.5}.get(scale, scale)
    made = SmallGPT(activation="relu", scale=factor, normed_after=normed_after)
    source = saved(tmp_path / "model.pth", made.lecture())
    asked = "its attention scale and norm placement, without"
    if has_config:
        fields = {k: v for k, v in made.sizes.items() if k != "bias"}
        source = saved(tmp_path / "latest.pt", {"model_state_dict": made.lecture(), "config": fields})
        facts = converted(source, tmp_path / "guess", "bundle")
        warned = {one["name"]: one["warning"] for one in facts["choices"] if one["warning"]}
        assert warned.keys() == {"attention_scale", "norm_placement"}
        assert warned["attention_scale"].endswith("If this file is of that kind, add --attention_scale n_embd.")
    else:
        assert asked in said(source, tmp_path)
    placement = "after" if normed_after else "before"
    facts = bundle_of(tmp_path, source, attention_scale=scale, norm_placement=placement)
    assert f"attention scale {scale} (from --attention_scale)" in texts(facts)
    assert off(tmp_path, made, qkv_bias=False) < EXACT
    state = json.loads((tmp_path / "bundle/training_state.json").read_text())
    config = json.loads((tmp_path / "bundle/config.json").read_text())
    assert (config["format_version"], state["format_version"]) == (3, 3)
    assert (config["n_head"], config["dropout"]) == (4, 0.2 if has_config else 0.0)  # a file of ours has our default


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_our_own_names_without_their_config_are_asked_about_too(tmp_path, activation):
    made = SmallGPT(activation=activation)
    source = saved(tmp_path / "state.pt", made.nanogpt())
    bundle_of(tmp_path, source, n_head=4, activation=activation)
    for to, alone in (("safetensors", tmp_path / "m.safetensors"), ("pt", tmp_path / "m.pt")):
        converted(tmp_path / "bundle", alone, to)
        with pytest.raises(
            CheckpointMismatch, match=r"its heads and activation, .* Add --n_head 1, 2, 4, 8, 16 or 32; "
        ):
            converted(alone, tmp_path / "again", "bundle")
        facts = converted(alone, tmp_path / to, "bundle", choices={"n_head": 4, "activation": activation})
        assert {one["name"] for one in facts["choices"] if one["warning"]} == {"attention_scale", "norm_placement"}
        assert worst(our_logits(tmp_path / to, made.ids()), made.logits(made.ids())) < EXACT
        before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("bundle", to))
        assert {**after, "proj_bias": None} == {**before, "proj_bias": None}


def test_a_file_of_ours_with_its_tokenizer_is_asked_and_warned_of_nothing(shared, tmp_path):
    facts = converted(shared / "fixtures/lecture_char/legacy/latest.pt", tmp_path / "bundle", "bundle")
    assert not any(choice["warning"] for choice in facts["choices"])
    assert "attention scale head_size (our GPT, always)" in texts(facts)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_another_epsilon_is_computed_and_leaves_again(tmp_path, eps):
    made = SmallGPT(eps=eps)
    source = saved(tmp_path / "state.pt", made.nanogpt())
    choices = {"n_head": 4, "activation": "gelu", "norm_eps": eps}
    facts = bundle_of(tmp_path, source, **choices)
    assert f"norm epsilon {eps} (from --norm_eps)" in texts(facts) and off(tmp_path, made) < EXACT
    converted(tmp_path / "bundle", tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["layer_norm_epsilon"] == eps
    with pytest.raises(CheckpointMismatch, match=f"norm_eps is {eps}, and nanoGPT computes 1e-05: other logits"):
        converted(tmp_path / "bundle", tmp_path / "ckpt.pt", "nanogpt")


def test_a_model_of_version_3_trains_on_and_is_refused_by_readers_of_less(tmp_path):
    made = SmallGPT(activation="relu", normed_after=True)
    source = saved(tmp_path / "model.pth", made.lecture())
    bundle_of(tmp_path, source, attention_scale="n_embd", norm_placement="after")
    model = GPT.load(tmp_path / "bundle")[0]
    with CheckpointManager("again", tmp_path) as manager:
        manager.save(model, step=1)
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert (config["attention_scale"], config["norm_placement"], config["format_version"]) == ("n_embd", "after", 3)
    assert json.loads((tmp_path / "again/training_state.json").read_text())["format_version"] == 3
    (tmp_path / "again/config.json").write_text(json.dumps({**config, "attention_scale": "head_size"}))
    with pytest.raises(CheckpointMismatch, match="attention_scale is head_size, step 1 was saved with n_embd"):
        GPT.load(tmp_path / "again")


# What a person sees


def test_the_script_takes_the_flags_under_both_spellings_and_prints_the_origins(tmp_path, capsys):
    made = SmallGPT(activation="gelu_tanh")
    source = saved(tmp_path / "state.pt", made.nanogpt())
    words = [str(source), str(tmp_path / "bundle"), "--to", "bundle"]
    assert main([*words, "--num_attention_heads", "4", "--activation", "gelu_new"]) == 0
    out = capsys.readouterr().out
    assert "\nheads 4 (from --n_head)\nactivation gelu_tanh (from --activation)\n" in out
    assert off(tmp_path, made) < EXACT
    with pytest.raises(SystemExit) as wrong:
        main([*words, "--activation", "swish"])
    assert wrong.value.code == 2
    assert "argument --activation: 'swish' is none of gelu, gelu_tanh, relu" in capsys.readouterr().err
    extra = json.loads((tmp_path / "bundle/training_state.json").read_text())["extra"]
    assert "heads 4 (from --n_head)" in extra["choices"]


def test_a_warning_is_printed_behind_its_choice(tmp_path, capsys):
    made = SmallGPT()
    source = saved(tmp_path / "ckpt.pt", {"model": made.nanogpt(), "model_args": made.sizes})
    assert main([str(source), str(tmp_path / "b"), "--to", "bundle", "--dry_run"]) == 0
    assert re.search(
        r"\nactivation gelu \(nanoGPT, since 2023-06-14\)\nWARNING: activation gelu ", capsys.readouterr().out
    )


def test_a_namespace_is_a_config_too(tmp_path):
    made = SmallGPT()
    content = {"model": made.nanogpt(), "args": argparse.Namespace(**made.sizes, activation="relu")}
    facts = bundle_of(tmp_path, saved(tmp_path / "x.pt", content))
    assert "heads 4 (from args)" in texts(facts) and "activation relu (from args)" in texts(facts)
