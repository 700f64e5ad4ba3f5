"""nanoGPT's run goes on in train.py: its schedule, settings and moments, whatever the config says and the order is."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from core.conversion.run import Run, config_of, rate_at, run_of
from core.errors import CheckpointMismatch
from core.training.schedule import Schedule
from core.training.settings import Settings
from tests.makers.conversions import converted
from tests.makers.nanogpt_files import CHARS, CONFIG, SORTED, TODAY, ckpt, names_of, rate_of


@st.composite
def configs(draw):
    peak, warmup = draw(st.floats(1e-6, 1.0)), draw(st.integers(0, 50))
    return {
        "learning_rate": peak,
        "min_lr": draw(st.floats(0.0, 1.0)) * peak,
        "decay_lr": draw(st.booleans()),
        "warmup_iters": warmup,
        "lr_decay_iters": warmup + draw(st.integers(1, 100)),
    }


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(0, 200))
def test_every_step_has_the_learning_rate_of_nanogpt(config, step):
    run = run_of(config, step, rate_of(config, step), has_moments=True, is_old=False)
    schedule = Settings.resolve({}, run.settings).schedule()
    assert schedule.at(step) == pytest.approx(rate_of(config, step), rel=1e-9, abs=1e-15)
    assert not [note for note in run.notes if "learning rate" in note or "not taken over" in note]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_decay_iters": 5}, "lr_decay_iters 5 is not above warmup_iters 5: train.py goes on at a constant 0.25"),
        ({"min_lr": 2.0}, "min_lr 2.0 is above learning_rate 0.01: train.py goes on at a constant 0.25"),
        ({"warmup_iters": "5"}, "warmup_iters is '5', lr_decay_iters 100 and min_lr 0.001"),
        ({"decay_lr": "yes"}, "decay_lr is 'yes' and learning_rate 0.01"),
        ({"grad_clip": -1.0, "wandb_log": True}, "not taken over from its config: grad_clip -1.0, "),
        ({"compile": True}, "dataset 'letters', device 'cpu', compile True"),
    ],
)
def test_what_is_not_taken_over_is_reported_by_name_and_value(changes, said):
    run = run_of({**CONFIG, **changes}, 40, 0.25, has_moments=True, is_old=False)
    assert any(said in note for note in run.notes), run.notes
    Settings.resolve({}, run.settings).schedule()  # train.py takes what is left
    assert run.settings.get("grad_clip", 0) >= 0


def test_what_a_config_does_not_record_is_reported_and_nothing_is_recorded_for_it():
    run = run_of({"learning_rate": 0.5}, 3, 0.5, has_moments=False, is_old=True)
    assert run.settings == {"learning_rate": 0.5} and run.batch_size is None
    wanted = "lr_schedule, warmup_iters, grad_clip, batch_size, gradient_accumulation_steps, dtype"
    assert any(f"not recorded, so train.py has its own: {wanted} (flags set them)" in note for note in run.notes)
    run = run_of(CONFIG, 40, rate_of(CONFIG, 40), has_moments=False, is_old=True)
    assert any("beta1 0.9, beta2 0.99" in note for note in run.notes), "they are in the moments alone"
    assert any("gradient_accumulation_steps 5 may be that of each process" in note for note in run.notes)


def test_a_warm_up_of_before_2024_12_09_and_another_rate_are_told_apart():
    early = {**CONFIG, "warmup_iters": 100, "lr_decay_iters": 300}
    (note,) = (n for n in run_of(early, 40, 0.01 * 40 / 100, has_moments=True, is_old=False).notes if "warm-up" in n)
    assert "step 40 has 0.004 there and 0.00405941 here" in note and "from step 100 on both are the same" in note
    notes = run_of(early, 40, 0.5, has_moments=True, is_old=False).notes
    assert "WARNING: its optimizer has the learning rate 0.5, its config at step 40 0.00405941" in notes[0]


@pytest.mark.parametrize(
    ("dtype", "device", "ours"),
    [
        ("float16", "cuda:1", "fp16"),
        ("bfloat16", "cuda", "bf16"),
        ("float16", "cpu", "fp32"),
        ("bfloat16", "mps", "fp32"),
    ],
)
def test_the_arithmetic_is_the_one_that_was_computed(dtype, device, ours):
    values = {**CONFIG, "dtype": dtype, "device": device}
    assert run_of(values, 40, 0.1, has_moments=True, is_old=False).settings["dtype"] == ours


@given(
    peak=st.floats(1e-6, 1.0),
    part=st.floats(0, 1),
    warmup=st.integers(0, 50),
    more=st.integers(1, 200),
    step=st.integers(0, 400),
    kind=st.sampled_from(["cosine", "constant"]),
)
def test_the_rate_that_a_conversion_compares_is_the_one_that_training_computes(peak, part, warmup, more, step, kind):
    """Two rooms compute it, because a conversion may not know of training; here they are held to one formula."""
    lowest, decay, warmup = peak * part, warmup + more, warmup if kind == "cosine" else 0
    settings = {"learning_rate": peak, "lr_schedule": kind, "warmup_iters": float(warmup)}
    settings |= {"lr_decay_iters": decay, "min_lr": lowest} if kind == "cosine" else {}
    ends = (decay, lowest) if kind == "cosine" else (None, None)
    assert rate_at(settings, step) == pytest.approx(Schedule(kind, peak, warmup, *ends).at(step), rel=1e-12)


def flags_of(folder: Path) -> list[str]:
    text = str(folder / "text.txt")
    return ["--checkpoint_root", str(folder / "root"), "--model_name", "m", "--input_file", text]


def test_train_goes_on_with_the_rate_clip_batch_and_accumulation_of_nanogpt(tmp_path, capsys):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(CHARS)), "stoi": CHARS, "vocab_size": 10}))
    (tmp_path / "text.txt").write_text("abc def gh\n" * 400)
    ckpt(tmp_path / "ckpt.pt", order=TODAY, rows=10)
    facts = converted(tmp_path / "ckpt.pt", tmp_path / "root/m", "bundle", meta=tmp_path / "meta.pkl")
    assert "not taken over from its config: dataset 'letters', device 'cpu', compile False" in facts["notes"]
    train.main([*flags_of(tmp_path), "--max_iters", "42"])
    said = capsys.readouterr().err
    assert "continuing with the settings that nanoGPT recorded, unless a flag overrides them: max_iters 100" in said
    assert "WARNING" not in said and "so far" not in said
    lines = [json.loads(line) for line in (tmp_path / "root/m/metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "loss" in line] == [
        pytest.approx(rate_of(CONFIG, step), rel=1e-12) for step in (40, 41)
    ]
    state = json.loads((tmp_path / "root/m/training_state.json").read_text())
    now = state["certificate"]["settings"]
    assert [now[name] for name in ("batch_size", "gradient_accumulation_steps", "grad_clip")] == [12, 5, 1.0]
    assert now["betas"] == [0.9, 0.99] and now["weight_decay"] == [0.1, 0.0]
    assert state["tokens_seen"] == 2 * 5 * 12 * 8 and state["training"]["dtype"] == "fp32"
    train.main([*flags_of(tmp_path), "--max_iters", "43"])
    said = capsys.readouterr().err
    assert "resume is exact" in said and "nanoGPT" not in said


def test_a_state_without_a_config_says_what_train_takes_of_its_own(tmp_path, capsys):
    ckpt(tmp_path / "ckpt.pt", order=TODAY, rows=10, config=None)
    (tmp_path / "text.txt").write_text("abc def gh\n" * 400)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(CHARS)), "stoi": CHARS, "vocab_size": 10}))
    facts = converted(tmp_path / "ckpt.pt", tmp_path / "root/m", "bundle", meta=tmp_path / "meta.pkl")
    assert any("not recorded, so train.py has its own: lr_schedule, " in note for note in facts["notes"])
    assert json.loads((tmp_path / "root/m/training_state.json").read_text())["training"] == {
        "learning_rate": rate_of(CONFIG, 40),
        "weight_decay": 0.1,
    }
    train.main([*flags_of(tmp_path), "--max_iters", "41"])
    said = capsys.readouterr().err
    assert "WARNING: nanoGPT recorded no lr_schedule constant, warmup_iters 100.0, grad_clip 1.0, " in said
    assert "of the program that wrote it" not in said


# whose moments are whose


def moments_in(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    return {name: state["state"][i]["exp_avg"] for i, name in enumerate(names)}


OURS = {
    "transformer.wte.weight": "token_embedding_table.weight",
    "transformer.wpe.weight": "position_embedding_table.weight",
    "transformer.ln_f.weight": "ln_f.weight",
    "transformer.h.0.attn.c_attn.weight": "blocks.0.sa.qkv.weight",
    "transformer.h.10.mlp.c_proj.weight": "blocks.10.fwd.net.2.weight",
    "transformer.h.2.ln_1.weight": "blocks.2.ln1.weight",
    "transformer.h.2.ln_1.bias": "blocks.2.ln1.bias",
}


@pytest.mark.parametrize("order", [TODAY, SORTED])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layers", "prefix", "twice"), [(1, "", True), (3, "_orig_mod.", False), (12, "module.", True)]
)
def test_each_moment_belongs_to_its_parameter_in_both_orders(tmp_path, order, bias, layers, prefix, twice):
    marks = ckpt(tmp_path / "ckpt.pt", order=order, bias=bias, layers=layers, prefix=prefix, head_twice=bool(twice))
    facts = converted(tmp_path / "ckpt.pt", tmp_path / "b", "bundle")
    found = moments_in(tmp_path / "b")
    assert len(found) == len(marks)
    checked = [name for name in OURS if name in marks]
    assert len(checked) >= 4
    for name in checked:
        assert torch.all(found[OURS[name]] == marks[name]), name
    assert any("before 2023-05-06" in note for note in facts["notes"]) is (order is SORTED)
    assert not any("left out" in note for note in facts["notes"])


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 12), st.booleans(), st.sampled_from([TODAY, SORTED]), st.integers(1, 40))
def test_the_rule_is_found_for_every_size(tmp_path_factory, layers, bias, order, rows):
    folder = tmp_path_factory.mktemp("sizes")
    marks = ckpt(folder / "ckpt.pt", order=order, bias=bias, layers=layers, rows=rows)
    converted(folder / "ckpt.pt", folder / "b", "bundle")
    found = sorted(float(value.flatten()[0]) for value in moments_in(folder / "b").values())
    assert found == sorted(map(float, marks.values()))


def test_a_state_that_fits_no_order_is_left_out_with_what_does_not_fit(tmp_path):
    def note_of(name: str, **changes) -> str:
        content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
        for key, value in changes.items():
            content["optimizer"][key] = value(content["optimizer"][key])
        torch.save(content, tmp_path / f"{name}.pt")
        facts = converted(tmp_path / f"{name}.pt", tmp_path / name, "bundle")
        (note,) = (note for note in facts["notes"] if "left out" in note)
        assert not (tmp_path / name / "optimizer.pt").exists() and "another model" not in note
        return note

    ckpt(tmp_path / "ckpt.pt", order=TODAY, layers=2)
    names = names_of(2, bias=False)
    assert len(names) == 15
    other = note_of("fewer", param_groups=lambda groups: [groups[0], {**groups[1], "params": groups[1]["params"][:-1]}])
    assert "found 10 + 4 parameters without names, expected 15 or 10 + 5 or 8 + 7." in other
    other = note_of("swapped", state=lambda state: {**state, 0: state[2], 2: state[0]})
    assert "exp_avg of parameter 0 is (96, 32), and transformer.wte.weight, which is there by the order" in other
    assert other.endswith("(65, 32).")
    assert "expected state and param_groups" in note_of("alone", param_groups=lambda groups: None)


def test_a_second_head_of_other_values_is_no_tied_one(tmp_path):
    ckpt(tmp_path / "ckpt.pt", order=TODAY, layers=2)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    content["model"]["lm_head.weight"] = content["model"]["transformer.wte.weight"] * 2
    torch.save(content, tmp_path / "other.pt")
    facts = converted(tmp_path / "other.pt", tmp_path / "b", "bundle")
    said = "it has no parameter for lm_head.weight, whose values are not those of transformer.wte.weight."
    assert f"its optimizer state is left out: {said}" in facts["notes"]


def test_a_state_that_no_longer_fits_the_parameters_is_left_out_and_reported(tmp_path):
    ckpt(tmp_path / "ckpt.pt", order=TODAY, rows=60)
    facts = converted(tmp_path / "ckpt.pt", tmp_path / "padded", "bundle", vocab_size=64)
    assert any("left out: --vocab_size 64 changes the parameters" in note for note in facts["notes"])
    facts = converted(tmp_path / "ckpt.pt", tmp_path / "untied", "bundle", tied=False)
    assert any("left out: --untied adds a parameter" in note for note in facts["notes"])
    assert math.isclose(rate_of(CONFIG, 40), 0.00730763, rel_tol=1e-5)


@st.composite
def own_settings(draw):
    kind, peak = draw(st.sampled_from(["constant", "cosine"])), draw(st.floats(1e-6, 1.0))
    decay = draw(st.integers(100, 200))
    warmup = draw(st.integers(0, 60).map(float) | (st.just(0.0) if kind == "constant" else st.floats(0.01, 0.5)))
    found = {"lr_schedule": kind, "learning_rate": peak, "warmup_iters": warmup, "max_iters": draw(st.integers(1, 300))}
    if kind == "cosine":
        found |= {
            "lr_decay_iters": decay,
            "min_lr": draw(st.none() | st.floats(0.0, 1.0).map(lambda part: part * peak)),
        }
    return found | draw(st.sampled_from([{}, {"grad_clip": 0}, {"grad_clip": 1, "weight_decay": 0.25, "seed": 7}]))


@settings(max_examples=100, deadline=None)
@given(own_settings(), st.integers(0, 300))
def test_nanogpt_has_the_learning_rate_of_a_run_of_ours_at_every_step(found, step):
    config, rest = config_of(Run(found, batch_size=5), (0.8, 0.75))
    assert rate_of(config, step) == pytest.approx(Settings.resolve({}, found).schedule().at(step), rel=1e-9, abs=1e-15)
    types = {name: type(value) for name, value in config.items()}  # its flags take a value of the default's type
    whole = {"max_iters", "batch_size", "warmup_iters", "lr_decay_iters"}
    assert all(types[name] is (int if name in whole else bool if name == "decay_lr" else float) for name in types)
    assert (config["batch_size"], config["beta1"], config["beta2"]) == (5, 0.8, 0.75)
    assert rest == {name: value for name, value in found.items() if name == "seed"}
    assert config.get("grad_clip", 0.0) == found.get("grad_clip", 0)


def test_the_settings_of_nanogpt_come_back_through_a_bundle(tmp_path):
    config = {**CONFIG, "dtype": "bfloat16", "device": "cuda"}
    ckpt(tmp_path / "ckpt.pt", order=TODAY, rows=len(CHARS), config=config)
    meta = {"vocab_size": len(CHARS), "itos": {i: c for c, i in CHARS.items()}, "stoi": CHARS}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    converted(tmp_path / "ckpt.pt", tmp_path / "b", "bundle", meta=tmp_path / "meta.pkl")
    facts = converted(tmp_path / "b", tmp_path / "out", "nanogpt", include_optimizer=True)
    made = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["config"]
    lost = {"device", "compile", "dataset"}
    assert {name: made[name] for name in config if name not in lost} == {
        n: v for n, v in config.items() if n not in lost
    }
    (command,) = (note for note in facts["notes"] if "python train.py" in note)
    assert f"--init_from=resume --out_dir={tmp_path / 'out'} --dataset=b --block_size=8" in command
    for name in ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "grad_clip", "dtype", "beta2"):
        assert f" --{name}={config[name]}" in command
    again = converted(tmp_path / "ckpt.pt", tmp_path / "again.pt", "nanogpt")
    assert torch.load(tmp_path / "again.pt", weights_only=True)["config"]["dataset"] == "letters"
    assert any("resumes it when --include_optimizer is given" in note for note in again["notes"])


@pytest.mark.parametrize(("target", "place"), [("out", "out/meta.pkl"), ("out/model.pt", "out/meta.pkl")])
def test_sample_py_decodes_characters_with_the_meta_pkl_of_a_conversion(target, place, tmp_path):
    ckpt(tmp_path / "ckpt.pt", order=TODAY, rows=len(CHARS))
    meta = {"vocab_size": len(CHARS), "itos": {i: c for c, i in CHARS.items()}, "stoi": CHARS}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    converted(tmp_path / "ckpt.pt", tmp_path / "dante", "bundle", meta=tmp_path / "meta.pkl")
    (tmp_path / "out").mkdir()
    facts = converted(tmp_path / "dante", tmp_path / target, "nanogpt", overwrite=True)
    file = tmp_path / target if target.endswith(".pt") else tmp_path / target / "ckpt.pt"
    dataset = torch.load(file, weights_only=True)["config"]["dataset"]
    assert dataset == "dante" and f"copy it to data/{dataset}/meta.pkl in nanoGPT's folder" in " ".join(facts["notes"])
    found = pickle.loads((tmp_path / place).read_bytes())
    assert found == meta and [type(value) for value in found.values()] == [int, dict, dict]
    if target.endswith(".pt"):
        (tmp_path / place).write_bytes(pickle.dumps(meta, protocol=0))  # the same characters may be there
        converted(tmp_path / "dante", tmp_path / "out/again.pt", "nanogpt")
        assert (tmp_path / place).read_bytes() == pickle.dumps(meta, protocol=0)
        (tmp_path / place).write_bytes(b"other")
        with pytest.raises(CheckpointMismatch, match=r"meta\.pkl: is there already with another content"):
            converted(tmp_path / "dante", tmp_path / "out/third.pt", "nanogpt")
        assert (tmp_path / place).read_bytes() == b"other" and not (tmp_path / "out/third.pt").exists()


def test_what_sample_py_cannot_decode_is_reported(tmp_path):
    for rows, said in (
        (50304, "sample.py decodes its tokens as GPT-2's; nanoGPT's folder must have no data/"),
        (65, "not known"),
    ):
        ckpt(tmp_path / "ckpt.pt", order=TODAY, width=8, rows=rows, config=None)
        facts = converted(tmp_path / "ckpt.pt", tmp_path / f"{rows}.pt", "nanogpt", include_optimizer=True)
        assert any(said in note for note in facts["notes"])
        assert not (tmp_path / "meta.pkl").exists()
    lost = "decay_lr, grad_clip, batch_size, gradient_accumulation_steps, dtype"
    assert f"WARNING: not recorded, so nanoGPT resumes with its own: {lost}" in facts["notes"]
    assert any("(rename 65.pt to ckpt.pt)" in note for note in facts["notes"])


def test_rows_without_a_character_are_reported_because_sample_py_draws_them(tmp_path):
    ckpt(tmp_path / "ckpt.pt", order=TODAY, rows=len(CHARS))
    meta = {"vocab_size": len(CHARS), "itos": {i: c for c, i in CHARS.items()}, "stoi": CHARS}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    converted(tmp_path / "ckpt.pt", tmp_path / "b", "bundle", meta=tmp_path / "meta.pkl", vocab_size=16)
    said = " ".join(converted(tmp_path / "b", tmp_path / "wide", "nanogpt")["notes"])
    assert "WARNING: 6 rows have no character" in said and "--vocab_size 10 crops them" in said
    assert "WARNING" not in " ".join(converted(tmp_path / "b", tmp_path / "cut", "nanogpt", vocab_size=10)["notes"])
