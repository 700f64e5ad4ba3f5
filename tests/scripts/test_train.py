from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from core.console.commandline import DONE, FAILED, WRONG_USE
from tests.conftest import ROOT
from tests.makers.models import TEXT

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "eval_iters": 2, "device": "cpu"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 40)
    return path


def command(root, text, *words, **flags):
    sizes = {**SIZES, "checkpoint_root": root, "input_file": text, **flags}
    pairs = [word for name, value in sizes.items() if value is not None for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "train.py"), *pairs, *words]


def train(root, text, *words, **flags):
    return subprocess.run(
        command(root, text, *words, **flags), cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


def state(root, name="default"):
    return json.loads((root / name / "training_state.json").read_text())


def test_one_line_trains_resumes_and_says_when_there_is_nothing_to_do(tmp_path, text):
    done = train(tmp_path, text, max_iters=20, eval_interval=10, model_name="dante")
    assert done.returncode == DONE, done.stderr
    for said in ("a new model", "step 10: train loss", "saved step 20", "done: step 20, validation loss", "next:"):
        assert said in done.stderr
    assert f"text: {text}" in done.stderr
    assert 100 < len(done.stdout) < 300, "the sample, and nothing else, is the result"
    again = train(tmp_path, text, max_iters=30, model_name="dante")
    assert again.returncode == DONE and "resuming at step 20" in again.stderr and state(tmp_path, "dante")["step"] == 30
    idle = train(tmp_path, text, model_name="dante")
    assert idle.returncode == DONE and "step 30, and max_iters is 30: nothing to do" in idle.stderr


def test_a_model_started_from_another_reads_its_own_text_with_the_characters_of_that_one(tmp_path, text):
    train(tmp_path, text, max_iters=5, model_name="dante")
    other = tmp_path / "other.txt"
    other.write_text("of our life and the wood\n" * 40)  # fewer characters than the model knows
    done = train(tmp_path, other, max_iters=5, model_name="tuned", init_from_model="dante")
    assert done.returncode == DONE, done.stderr
    vocabularies = [json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("dante", "tuned")]
    assert vocabularies[0] == vocabularies[1]
    strange = tmp_path / "strange.txt"
    strange.write_text("xyz ~ " * 100)
    refused = train(tmp_path, strange, max_iters=5, model_name="third", init_from_model="dante")
    assert refused.returncode == FAILED and "strange.txt" in refused.stderr


def test_a_resume_keeps_the_steps_that_the_run_was_told_to_keep(tmp_path, text):
    train(tmp_path, text, max_iters=6, save_interval=1, keep=4, model_name="dante")
    train(tmp_path, text, max_iters=8, save_interval=1, model_name="dante")
    assert sorted(path.name for path in (tmp_path / "dante").glob("step_*"))[-4:] == [
        f"step_0000000{step}" for step in (4, 5, 6, 7)
    ]
    train(tmp_path, text, max_iters=9, keep=0, model_name="dante")
    assert state(tmp_path, "dante")["retention"]["keep"] == 0


def test_a_resume_without_flags_goes_on_with_the_recorded_text_and_settings(tmp_path, text):
    train(tmp_path, text, max_iters=10, learning_rate=0.01, weight_decay=0.2)
    resumed = subprocess.run(
        [sys.executable, ROOT / "train.py", "--checkpoint_root", tmp_path, "--max_iters", "12"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert resumed.returncode == DONE, resumed.stderr
    assert "text: text.txt" in resumed.stderr and "recorded by the checkpoint" in resumed.stderr
    assert state(tmp_path)["training"]["weight_decay"] == 0.2 and state(tmp_path)["schedule"]["learning_rate"] == 0.01
    changed = train(tmp_path, text, max_iters=14, learning_rate=0.02)
    assert "learning_rate: 0.01 so far, 0.02 from now on" in changed.stderr


def test_a_changed_text_is_said_on_resume(tmp_path, text):
    train(tmp_path, text, max_iters=5)
    text.write_text(TEXT * 41)
    resumed = train(tmp_path, text, max_iters=8)
    assert resumed.returncode == DONE and re.search(
        r"WARNING: .*text.txt: not the text this checkpoint was trained on \(3,198 bytes.*recorded .*3120 bytes",
        resumed.stderr,
    )


def wait_for_steps(run):
    said = ""
    while "tokens/s" not in said:
        said += run.stderr.read(1)
        assert run.poll() is None, said


def test_settings_come_from_a_file_and_the_command_line_wins(tmp_path, text):
    (tmp_path / "run.json").write_text(json.dumps({"max_iters": 7, "learning_rate": 0.5, "compile": False}))
    done = train(tmp_path, text, "--config_file", str(tmp_path / "run.json"), learning_rate=0.001)
    assert done.returncode == DONE, done.stderr
    assert state(tmp_path)["step"] == 7 and state(tmp_path)["schedule"]["learning_rate"] == 0.001


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--n_lyer", "3"], WRONG_USE, "unknown flag --n_lyer; did you mean --n_layer?"),
        (["--n-layer", "3"], WRONG_USE, "unknown flag --n-layer; did you mean --n_layer?"),
        (
            ["--max_iters", "many"],
            WRONG_USE,
            "argument --max_iters: found 'many', expected a whole number of at least 1",
        ),
        (["--n_head", "3"], FAILED, "n_embd 16 is not divisible by n_head 3; n_head may be 1, 2, 4, 8, 16"),
        (["--dropout", "1.5"], WRONG_USE, "--dropout: found '1.5', expected a number from 0 up to but not including 1"),
        (["--learning_rate", "nan"], WRONG_USE, "argument --learning_rate: found 'nan', expected a number above 0"),
        (["--weight_decay", "-1"], WRONG_USE, "--weight_decay: found '-1', expected 0 or a number above 0"),
        (["--grad_clip", "-1"], WRONG_USE, "--grad_clip: found '-1', expected 0 or a number above 0"),
        (["--grad_clip", "nan"], WRONG_USE, "--grad_clip: found 'nan', expected 0 or a number above 0"),
        (["--warmup_iters", "-1"], WRONG_USE, "--warmup_iters: found '-1', expected 0 or a number above 0"),
        (["--keep", "-1"], WRONG_USE, "--keep: found '-1', expected a whole number of at least 0"),
        (["--resume_from", "-1"], WRONG_USE, "--resume_from: found '-1', expected a whole number of at least 0"),
        (["--seed", "99999999999999999999"], WRONG_USE, "found '99999999999999999999', expected a whole number from 0"),
        (["--stage_memory", "-1"], WRONG_USE, "argument --stage_memory: found '-1', expected a size"),
        (["--prune", "--resume_from", "2"], WRONG_USE, "--prune only removes folders"),
        (["--input_file", "nothere.txt"], FAILED, "nothere.txt"),
        (["--block_size", "99999"], FAILED, "99"),
        (["--lr_schedule", "cosine"], FAILED, "--lr_schedule cosine needs --lr_decay_iters"),
        (["--warmup_iters", "0.1"], FAILED, "--warmup_iters 0.1 is a fraction of --lr_decay_iters, which is not given"),
        (["--model_name", "../x"], FAILED, "model name '../x': expected the name of one folder"),
        (["--device", "tpuu"], FAILED, "'tpuu' is not a device. Use auto, cpu, cuda or cuda:N"),
        (["--config_file", "none.json"], FAILED, "none.json: No such file or directory"),
        (
            ["--stop_after_minutes", "0"],
            WRONG_USE,
            "argument --stop_after_minutes: found '0', expected a number above 0",
        ),
        (
            ["--save_every_minutes", "soon"],
            WRONG_USE,
            "argument --save_every_minutes: found 'soon', expected a number above 0",
        ),
        (
            ["--max_failed_saves", "0"],
            WRONG_USE,
            "argument --max_failed_saves: found '0', expected a whole number of at least 1",
        ),
        (
            ["--stage_memory", "lots"],
            WRONG_USE,
            "--stage_memory: found 'lots', expected a size such as 5GB, 500MB or 2GiB",
        ),
        (["--save_policy", "hope"], WRONG_USE, "argument --save_policy: invalid choice: 'hope'"),
        (["--ema", "1"], WRONG_USE, "--ema: found '1', expected a number from 0"),
        (["--ema", "-0.5"], WRONG_USE, "--ema: found '-0.5', expected a number from 0"),
        (["--ema", "1.5"], WRONG_USE, "--ema: found '1.5', expected a number from 0"),
        (["--max_iters", "0"], WRONG_USE, "argument --max_iters: found '0', expected a whole number of at least 1"),
        (
            ["--eval_interval", "0"],
            WRONG_USE,
            "argument --eval_interval: found '0', expected a whole number of at least 1",
        ),
        (["--init_from_model", "nobody"], FAILED, "nobody: no such folder"),
        (["--tokenization", "nothere.json"], FAILED, "nothere.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_use_is_one_sentence_and_loses_nothing(tmp_path, text, words, code, said):
    done = train(tmp_path, text, *words, max_iters=None if "--max_iters" in words else 5)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*/model.pt"))


def test_a_folder_without_rights_is_one_sentence(tmp_path, text):
    (tmp_path / "file").write_text("")
    done = train(tmp_path, text, max_iters=5, checkpoint_root=tmp_path / "file")
    assert done.returncode == FAILED and "Not a directory" in done.stderr and "Traceback" not in done.stderr


def test_help_is_one_screen_of_groups_with_examples():
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True)
    assert done.returncode == DONE
    for said in ("data:", "optimization:", "evaluation and saving:", "machine:", "examples:", "Ctrl-C"):
        assert said in done.stdout
    assert len(done.stdout.splitlines()) < 90
