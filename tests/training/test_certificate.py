"""The resume certificate: an exact resume is said to be exact, and each thing that differs is named, alone."""

from __future__ import annotations

import json

import pytest
import torch

from core.bundle.training_state import seal
from core.console.commandline import DONE, FAILED
from core.errors import CheckpointMismatch
from core.saving.torch_file import digest_of
from core.training import certificate
from core.training.schedule import Schedule
from tests.makers.models import SMALL, TEXT, started, state_of
from tests.makers.runs import fitted, loader
from tests.scripts.test_train import train

KEPT = "resume is not exact; its weights and moments are. "


CURVE = Schedule("constant", 1e-2, 3)


def go_on(root, end, *, config=SMALL, **settings):
    """Train up to a step in a manager of its own, as a new process would; returns the manager."""
    made, *trained = started(root, config={**config})
    fitted((made, *trained), end, **{"schedule": CURVE, **settings})
    return made


@pytest.fixture
def said(tmp_path, capsys, one_thread):
    """What is said when a run of three steps is resumed: `said(**what differs)`."""
    go_on(tmp_path, 3)

    def resume(**changed):
        capsys.readouterr()
        go_on(tmp_path, 5, **changed)
        return capsys.readouterr().err.splitlines()[0]

    return resume


def test_a_resume_of_the_same_run_is_said_to_be_exact(said):
    assert said() == "resume is exact"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"data_loader": loader(seed=2)}, "Batches and dropout are drawn differently: seed 1 then, 2 now."),
        ({"data_loader": loader(batch_size=8)}, "The next batches differ: batch_size 4 then, 8 now."),
        (
            {"gradient_accumulation_steps": 2},
            "The next batches differ: gradient_accumulation_steps 1 then, 2 now.",
        ),
        ({"config": {**SMALL, "dropout": 0.3}}, "Dropout differs: dropout 0.1 then, 0.3 now."),
    ],
    ids=["seed", "batch size", "accumulation", "dropout"],
)
def test_what_differs_is_named_alone_and_not_what_follows_from_it(said, changed, named):
    assert said(**changed) == KEPT + named


@pytest.mark.parametrize(
    ("name", "value", "begins"),
    [
        ("model.pt", lambda c: c["ln_f.weight"], "Training continues from other weights"),
        ("optimizer.pt", lambda c: c["state"][0]["exp_avg"], "Training continues with other moments"),
    ],
)
def test_a_replaced_file_is_named_with_both_digests(said, tmp_path, name, value, begins):
    content = torch.load(tmp_path / "dante" / name, weights_only=True)
    was = state_of(tmp_path / "dante")["integrity"]["files"][name]["tensors"]
    value(content)[0] += 1e-6
    torch.save(content, tmp_path / "dante" / name)
    assert said() == (
        f"resume is not exact. {begins}: the tensors of {name} differ from those that were saved "
        f"(digest {was}, now {digest_of(content)})."
    )


def test_another_text_is_named(said):
    line = said(data_loader=loader(TEXT[9:] * 51))
    assert line.startswith(f"{KEPT}The next batches differ: other tokens in step 4 (digest ")


def test_another_generator_is_named(said, monkeypatch):
    monkeypatch.setattr(certificate.F, "dropout", lambda x, rate: x * 2)
    assert said().startswith(f"{KEPT}Dropout differs: the generator draws other numbers (digest ")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"grad_clip": 0.5}, "grad_clip 1.0 then, 0.5 now"),
        ({"schedule": Schedule("constant", 2e-2, 3)}, "schedule.learning_rate 0.01 then, 0.02 now"),
        ({"schedule": Schedule("cosine", 1e-2, 3, 9)}, "schedule.kind constant then, cosine now; schedule.decay_iters"),
    ],
    ids=["clip", "rate", "curve"],
)
def test_what_updates_are_computed_with_is_named(said, settings, named):
    assert said(**settings).startswith(f"{KEPT}Updates are computed differently: {named}")


def test_another_weight_decay_is_named_with_that_of_each_group(tmp_path, capsys, one_thread):
    go_on(tmp_path, 3)
    capsys.readouterr()
    made, model, optimizer = started(tmp_path)
    optimizer.param_groups[0]["weight_decay"] = 0.2
    fitted((made, model, optimizer), 4, schedule=CURVE)
    said = "Updates are computed differently: weight_decay [0.1, 0.0] then, [0.2, 0.0] now."
    assert f"{KEPT}{said}\n" in capsys.readouterr().err


def rewrite(folder, **environment):
    """Seal another environment into the training state."""
    state = state_of(folder)
    state["environment"] |= environment
    (folder / "training_state.json").write_bytes(seal(state))


@pytest.mark.parametrize(
    ("then", "named"),
    [
        ({"torch": "1.13.1"}, f"torch 1.13.1 then, {torch.__version__} now"),
        ({"threads": 7}, "threads 7 then, 1 now"),
        ({"device": "cuda"}, "device cuda then, cpu now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_another_machine_is_named(said, tmp_path, then, named):
    rewrite(tmp_path / "dante", **then)
    assert said() == f"{KEPT}Kernels may differ in the last bits: {named}."


def test_another_number_of_threads_is_named(said):
    torch.set_num_threads(2)  # the fixture sets it back
    assert said() == f"{KEPT}Kernels may differ in the last bits: threads 1 then, 2 now."


def test_the_same_tensors_in_another_file_are_exact(said, tmp_path):
    for name in ("model.pt", "optimizer.pt"):
        path = tmp_path / "dante" / name
        torch.save(torch.load(path, weights_only=True), path)
    assert said() == "resume is exact"


def test_several_differences_are_named_in_one_line(said):
    line = said(data_loader=loader(seed=2), gradient_accumulation_steps=2, config={**SMALL, "dropout": 0.2})
    for part in ("seed 1 then, 2 now", "gradient_accumulation_steps 1 then, 2 now", "dropout 0.1 then, 0.2 now"):
        assert part in line


def test_a_step_without_a_certificate_is_said_to_have_none(said, tmp_path):
    path = tmp_path / "dante/training_state.json"
    state = json.loads(path.read_text())
    del state["certificate"]
    path.write_bytes(seal(state))
    rewrite(tmp_path / "dante", torch="1.0")
    assert said() == (
        "cannot tell whether the resume is exact: step 3 was saved without a certificate. Kernels may differ in "
        f"the last bits: torch 1.0 then, {torch.__version__} now."
    )


def test_a_certificate_of_another_step_counts_for_nothing(tmp_path, capsys, one_thread):
    """What a caller saves by hand after `fit` carries the facts of the last step of `fit`."""
    made = go_on(tmp_path, 3)
    loaded, model, optimizer = started(tmp_path)
    loaded.facts = made.facts
    model.step = 7
    with loaded:
        loaded.save(model, optimizer, step=7)
    capsys.readouterr()
    go_on(tmp_path, 8)
    assert "step 7 was saved without a certificate" in capsys.readouterr().err


def test_a_second_fit_in_the_same_process_is_no_resume(tmp_path, capsys, one_thread):
    run = started(tmp_path)
    for end in (2, 4):
        fitted(run, end)
    assert "resume" not in capsys.readouterr().err


def test_parts_of_a_certificate_change_from_step_to_step(tmp_path, one_thread):
    go_on(tmp_path, 3)
    first = state_of(tmp_path / "dante")
    go_on(tmp_path, 4)
    second = state_of(tmp_path / "dante")
    for name in ("batch", "noise"):
        assert first["certificate"][name] != second["certificate"][name]
    for name in ("model.pt", "optimizer.pt"):
        assert first["integrity"]["files"][name]["tensors"] != second["integrity"]["files"][name]["tensors"]


def test_the_digest_of_a_file_is_that_of_its_content_and_follows_every_bit(tmp_path):
    go_on(tmp_path, 1)
    for name in ("model.pt", "optimizer.pt"):
        content = torch.load(tmp_path / "dante" / name, weights_only=True)
        assert state_of(tmp_path / "dante")["integrity"]["files"][name]["tensors"] == digest_of(content)
    weights = torch.load(tmp_path / "dante/model.pt", weights_only=True)
    before = digest_of(weights)
    flipped = weights["ln_f.weight"].view(torch.int32)
    for bit in range(31):
        flipped[5] ^= 1 << bit
        assert digest_of(weights) != before, bit
        flipped[5] ^= 1 << bit
    assert digest_of(weights) == before


def test_strict_resume_goes_on_where_nothing_differs_and_refuses_before_anything_changes(tmp_path, one_thread):
    go_on(tmp_path, 3)
    go_on(tmp_path, 4, strict_resume=True)
    with (tmp_path / "dante/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n')  # of a step that was not committed: a resume cuts it off
    before = {p: p.read_bytes() for p in (tmp_path / "dante").rglob("*") if p.is_file()}
    refused = (
        r"dante: resume is not exact; its weights and moments are\. Batches .*: seed 1 then, 2 now\. This run asked"
    )
    with pytest.raises(CheckpointMismatch, match=refused):
        go_on(tmp_path, 5, data_loader=loader(seed=2), strict_resume=True)
    after = {p: p.read_bytes() for p in (tmp_path / "dante").rglob("*") if p.is_file()}
    assert {p: d for p, d in after.items() if p.name != ".lock"} == {
        p: d for p, d in before.items() if p.name != ".lock"
    }


def test_the_script_refuses_a_strict_resume_with_an_edited_text_and_else_says_what_differs(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    assert train(tmp_path, text, max_iters=5, dropout=0.1).returncode == DONE
    text.write_text(TEXT * 39 + TEXT.replace("dark", "mark"))
    before = {p: p.read_bytes() for p in (tmp_path / "default").rglob("*.*") if p.is_file() and p.name != ".lock"}
    refused = train(tmp_path, text, "--strict_resume", max_iters=9)
    assert refused.returncode == FAILED
    assert "The next batches differ: the text or tokens of text.txt were changed" in refused.stderr, refused.stderr
    assert before == {p: p.read_bytes() for p in before}
    resumed = train(tmp_path, text, max_iters=9)
    assert resumed.returncode == DONE and "resume is not exact; its weights and moments are. " in resumed.stderr
