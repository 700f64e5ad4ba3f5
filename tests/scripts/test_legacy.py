"""The scripts on single-file checkpoints, as command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from core.console.commandline import DONE, FAILED, WRONG_USE
from core.data.corpus import find_source, open_corpus
from core.data.dataloader import DataLoader
from core.data.tokenizer import tokenizer_from_state
from tests.conftest import ROOT
from tests.makers.generations import CHARS, SIZES, TOKENIZER, LectureGPT, adamw, fuse, trained, write_single_file

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(script, root, *words, **flags):
    pairs = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / script), "--checkpoint_root", str(root), *words, *pairs]
    return subprocess.run(command, cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def root(tmp_path):
    model = LectureGPT(**SIZES)
    write_single_file(tmp_path / "dante" / "latest.pt", model, trained(model, 3), step=3)
    write_single_file(tmp_path / "dante" / "final.pt", model, step=2, training_config={"max_iters": 3})
    write_single_file(tmp_path / "shakespeare" / "final.pt", model, step=3, config="object")
    (tmp_path / "text.txt").write_text("".join(CHARS) * 200)
    return tmp_path


def test_train_goes_on_from_a_single_file_with_the_settings_of_the_old_program(root):
    before = (root / "dante/latest.pt").read_bytes()
    done = run("train.py", root, model_name="dante", input_file=root / "text.txt", max_iters=6, device="cpu")
    assert done.returncode == DONE, done.stderr
    assert f"{root / 'dante'}: using latest.pt (step 3); beside it final.pt (step 2)" in done.stderr
    assert "resuming at step 3" in done.stderr
    assert (
        "learning_rate 0.003, weight_decay 0.01, lr_schedule constant, warmup_iters 0.0, grad_clip 0.0" in done.stderr
    )
    state = json.loads((root / "dante/training_state.json").read_text())
    assert state["step"] == 6 and state["training"]["learning_rate"] == 0.003
    assert [entry["name"] for entry in state["legacy"]] == ["latest.pt", "final.pt"]
    groups = torch.load(root / "dante/optimizer.pt", weights_only=True)["param_groups"]
    assert [(g["betas"], g["weight_decay"], g["lr"]) for g in groups] == [((0.9, 0.999), 0.01, 0.003)]
    assert (root / "dante/latest.pt").read_bytes() == before
    again = run("train.py", root, model_name="dante", input_file=root / "text.txt", max_iters=7)
    assert "using the bundle (step 6)" in again.stderr and "resuming at step 6" in again.stderr


def test_train_makes_the_updates_of_the_old_program(root):
    """The whole script, two steps, against the old program's optimizer fed with the gradients of the same batches."""
    done = run(
        "train.py", root, model_name="dante", input_file=root / "text.txt", max_iters=5, device="cpu", dropout=0.0
    )
    assert done.returncode == DONE, done.stderr
    theirs = LectureGPT(**SIZES, dropout=0.0)
    content = torch.load(root / "dante/latest.pt", weights_only=True)
    theirs.load_state_dict(content["model_state_dict"])
    optimizer = adamw(theirs)
    optimizer.load_state_dict(content["optimizer_state_dict"])
    source = find_source(root / "text.txt", None, None, "dante")
    corpus = open_corpus(source, tokenizer_from_state(TOKENIZER))
    loader = DataLoader(
        corpus.train,
        corpus.val,
        block_size=theirs.config["block_size"],
        batch_size=content["config"]["batch_size"],
        seed=1337,
    )
    for step in (3, 4):
        x, y = loader.batch(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    ours = torch.load(root / "dante/model.pt", weights_only=True)
    for name, tensor in fuse(dict(theirs.named_parameters())).items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-6, rtol=0)


def test_generate_takes_a_single_file_by_name_by_path_or_as_the_only_one(root):
    words = ("--temperature", "0", "--max_new_tokens", "8", "--seed", "1")
    named = run("generate.py", root, *words, model_name="dante", legacy_checkpoint="final.pt")
    assert named.returncode == DONE, named.stderr
    path = root / "dante/final.pt"
    by_path = run("generate.py", root, *words, legacy_checkpoint=path)
    only = run("generate.py", root, *words, legacy_checkpoint="latest.pt")
    assert named.stdout == by_path.stdout == only.stdout and len(named.stdout) > 5
    assert f"{path}: step 2" in named.stderr and f"model: dante (the only one in {root} with latest.pt)" in only.stderr


def test_a_single_file_of_several_models_or_of_none_is_said(root):
    several = run("generate.py", root, legacy_checkpoint="final.pt")
    assert several.returncode == WRONG_USE
    assert "2 models have a final.pt: dante, shakespeare; choose one with --model_name" in several.stderr
    none = run("inspect_model.py", root, legacy_checkpoint="best.pt")
    assert none.returncode == FAILED and f"no model below {root} has one of this name" in none.stderr
    missing = run("generate.py", root, model_name="dante", legacy_checkpoint="best.pt")
    assert missing.returncode == FAILED
    assert f"Torch files in {root / 'dante'}: final.pt, latest.pt" in missing.stderr
    out = run("generate.py", root, model_name="dante", legacy_checkpoint="../shakespeare/final.pt")
    assert out.returncode == WRONG_USE and "leads out of" in out.stderr


def test_inspect_shows_a_single_file_as_it_shows_a_bundle(root):
    done = run("inspect_model.py", root, model_name="dante", legacy_checkpoint="final.pt")
    assert done.returncode == DONE, done.stderr
    out = done.stdout
    assert out.startswith(
        f"=== FORMAT ===\nLegacy single file\nLocation: {root / 'dante/final.pt'}\nLecture-style names"
    )
    assert "=== TRAINING STATE ===\nLast recorded training step: 2\n" in out
    assert "step 2 is recorded, and training_config has max_iters 3" in out
    assert "total              : " in out and "contradiction" not in out
    several = run("inspect_model.py", root, "--json")
    models = {model["name"]: model for model in json.loads(several.stdout)["models"]}
    assert (models["dante"]["legacy"], models["dante"]["step"]) == ("latest.pt", 3)
    assert (models["shakespeare"]["legacy"], models["shakespeare"]["step"]) == ("final.pt", 3)
