from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

import train as script
from core.console.commandline import DONE, FAILED, WRONG_USE, Parser, spelled
from core.errors import CheckpointError
from core.training.flags import make_parser
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
    assert done.stdout == "" and "no sample: the loss is not yet 1 below that of a uniform guess" in done.stderr
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


WRONG = {
    "--n_lyer 3": "unknown flag --n_lyer; did you mean --n_layer?",
    "--n-layer 3": "unknown flag --n-layer; did you mean --n_layer?",
    "--max_iters many": "argument --max_iters: found 'many', expected a whole number of at least 1",
    "--dropout 1.5": "--dropout: found '1.5', expected a number from 0 up to but not including 1",
    "--learning_rate nan": "argument --learning_rate: found 'nan', expected a number above 0",
    "--weight_decay -1": "--weight_decay: found '-1', expected 0 or a number above 0",
    "--grad_clip -1": "--grad_clip: found '-1', expected 0 or a number above 0",
    "--grad_clip nan": "--grad_clip: found 'nan', expected 0 or a number above 0",
    "--warmup_iters -1": "--warmup_iters: found '-1', expected 0 or a number above 0",
    "--keep -1": "--keep: found '-1', expected a whole number of at least 0",
    "--resume_from -1": "--resume_from: found '-1', expected a whole number of at least 0",
    "--seed 99999999999999999999": "found '99999999999999999999', expected a whole number from 0",
    "--stage_memory -1": "argument --stage_memory: found '-1', expected a size",
    "--prune --resume_from 2": "--prune only removes folders",
    "--stop_after_minutes 0": "argument --stop_after_minutes: found '0', expected a number above 0",
    "--save_every_minutes soon": "argument --save_every_minutes: found 'soon', expected a number above 0",
    "--max_failed_saves 0": "argument --max_failed_saves: found '0', expected a whole number of at least 1",
    "--stage_memory lots": "--stage_memory: found 'lots', expected a size such as 5GB, 500MB or 2GiB",
    "--lose_at_most 1d": "argument --lose_at_most: found '1d', expected a time above 0 such as 30s, 5m or 1h",
    "--skip_steps=": "argument --skip_steps: found '', expected A:B",
    "--skip_steps 5": "argument --skip_steps: found '5', expected A:B with A from 1 to B, such as 120:125",
    "--skip_steps 3:5,9:8": "argument --skip_steps: found '9:8', expected A:B",
    "--skip_steps 0:5": "argument --skip_steps: found '0:5', expected A:B",
    "--save_policy hope": "argument --save_policy: invalid choice: 'hope'",
    "--ema 1": "--ema: found '1', expected a number from 0",
    "--ema -0.5": "--ema: found '-0.5', expected a number from 0",
    "--ema 1.5": "--ema: found '1.5', expected a number from 0",
    "--max_iters 0": "argument --max_iters: found '0', expected a whole number of at least 1",
    "--eval_interval 0": "argument --eval_interval: found '0', expected a whole number of at least 1",
}
"""What is wrong on the command line, and what is said of it."""

UNFIT = {
    "--n_head 3": "n_embd 16 is not divisible by n_head 3; n_head may be 1, 2, 4, 8, 16",
    "--input_file nothere.txt": "nothere.txt",
    "--block_size 99999": "99",
    "--lr_schedule cosine": "--lr_schedule cosine needs --lr_decay_iters",
    "--warmup_iters 0.1": "--warmup_iters 0.1 is a fraction of --lr_decay_iters, which is not given",
    "--model_name ../x": "model name '../x': expected the name of one folder",
    "--device tpuu": "'tpuu' is not a device. Use auto, cpu, cuda or cuda:N",
    "--config_file none.json": "none.json: No such file or directory",
    "--init_from_model nobody": "nobody: no such folder",
    "--tokenization nothere.json": "nothere.json",
}
"""What only shows when a run begins."""


def arguments(root, text, words):
    return command(root, text, *words.split(), max_iters=None if "--max_iters" in words else 5)[2:]


@pytest.mark.parametrize("words", WRONG)
def test_wrong_use_is_one_sentence_and_loses_nothing(tmp_path, text, words, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(arguments(tmp_path, text, words))
    assert ended.value.code == WRONG_USE and WRONG[words] in capsys.readouterr().err
    assert not list(tmp_path.glob("*/model.pt"))


@pytest.mark.parametrize("words", UNFIT)
def test_what_cannot_be_trained_is_one_sentence_and_loses_nothing(tmp_path, text, words):
    with pytest.raises(CheckpointError) as raised:  # of which the script makes a line and exit code 1
        script.main(arguments(tmp_path, text, words))
    assert UNFIT[words] in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.glob("*/model.pt"))


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("", {}),
        ("--tied_head", {"tied_head": True}),
        ("--untied_head", {"tied_head": False}),
        ("--head_bias", {"head_bias": True}),
        ("--untied_head --head_bias", {"tied_head": False, "head_bias": True}),
        ("--config_file flags.json", {"tied_head": False, "head_bias": True}),
        ("--config_file flags.json --tied_head", {"tied_head": True, "head_bias": True}),
    ],
)
def test_flags_of_the_head_are_fields_of_the_config(tmp_path, monkeypatch, words, fields):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flags.json").write_text('{"tied_head": false, "head_bias": true}')
    given = vars(make_parser().parse(words.split()))
    assert {name: given[name] for name in ("tied_head", "head_bias") if given[name] is not None} == fields


def test_the_head_of_before_comes_back_by_flags_and_belongs_to_the_model(tmp_path, text, capsys):
    assert script.main([*arguments(tmp_path, text, "--untied_head --head_bias --max_iters 1")]) == DONE
    config = json.loads((tmp_path / "default/config.json").read_text())
    assert (config["tied_head"], config["head_bias"]) == (False, True)
    assert script.main(arguments(tmp_path, text, "--max_iters 2")) == DONE
    assert "resume is exact" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="tied_head is True here and False in the checkpoint"):
        script.main(arguments(tmp_path, text, "--tied_head"))


def test_a_folder_without_rights_is_one_sentence(tmp_path, text):
    (tmp_path / "file").write_text("")
    done = train(tmp_path, text, max_iters=5, checkpoint_root=tmp_path / "file")
    assert done.returncode == FAILED and "Not a directory" in done.stderr and "Traceback" not in done.stderr


def test_help_all_is_groups_with_examples():
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help_all"], capture_output=True, text=True)
    assert done.returncode == DONE
    for said in ("data:", "optimization:", "evaluation and saving:", "machine:", "examples:", "Ctrl-C"):
        assert said in done.stdout


@pytest.mark.parametrize("name", ["dante", "-x", "--keep", "a b", "it's", "$HOME", "*"])
def test_a_name_is_spelled_so_that_a_shell_and_the_parser_give_it_back(name):
    parser = Parser("train.py", "")
    assert parser.parse(shlex.split(spelled("--model_name", name))).model_name == name


def test_a_second_resume_from_keeps_the_seed_in_use_unless_a_seed_is_given(tmp_path, text):
    def trained(*words, **flags):
        assert script.main(command(tmp_path, text, *words, **flags)[2:]) == DONE
        return state(tmp_path)["seed"], state(tmp_path)["training"]["seed"]

    assert trained(max_iters=2, save_interval=1, keep=5) == (1337, 1337)
    assert trained(max_iters=2, resume_from=1, seed=42) == (42, 42)
    assert trained(max_iters=3, resume_from=1) == (42, 42)  # step 1 was made with 1337
    assert trained(max_iters=3, resume_from=1, seed=7) == (7, 7)


def test_a_new_run_says_once_which_steps_it_keeps(tmp_path, text, capsys):
    words = command(tmp_path, text, max_iters=1)[2:]
    assert script.main(words) == DONE and script.main([*words[:-2], "--max_iters", "2"]) == DONE
    assert capsys.readouterr().err.count("kept: the newest two steps, the best one, and older ones at growing") == 1
    assert state(tmp_path)["retention"]["keep_within"] == 10**9
    assert script.main([*words[:-2], "--max_iters", "3", "--keep", "1"]) == DONE
    assert "keep_within" not in state(tmp_path)["retention"]
