"""What the scripts say of their flags: one screen of help, the flag that is meant, errors as JSON."""

from __future__ import annotations

import json
import sys

import pytest

import convert_checkpoints
import generate
import inspect_model
from core.console.commandline import DONE, FAILED, WRONG_USE, Parser, run
from core.console.synonyms import PATH, suggested
from core.console.words import Output, is_shown
from core.errors import InputError, Unspecified
from core.training import flags

MAINS = {
    "train.py": flags.parse,
    "generate.py": generate.main,
    "inspect_model.py": inspect_model.main,
    "convert_checkpoints.py": convert_checkpoints.main,
}


@pytest.fixture(autouse=True)
def output(monkeypatch):
    """What a command line asks for ends with its test."""
    for name in ("as_json", "quiet"):
        monkeypatch.setattr(Output, name, False)


def said(capsys, script: str, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        MAINS[script](list(words))
    out, err = capsys.readouterr()
    return left.value.code, out, err


@pytest.mark.parametrize("script", MAINS)
def test_help_fits_one_screen_and_help_all_has_every_flag(script, capsys, monkeypatch):
    parsers = []
    monkeypatch.setattr(
        Parser, "parse", lambda self, argv, parse=Parser.parse: parsers.append(self) or parse(self, argv)
    )
    code, page, _ = said(capsys, script, "--help")
    assert code == DONE and 20 < len(page.splitlines()) <= 40 and max(map(len, page.splitlines())) <= 118
    assert "\nexamples:\n" in page and "--help_all shows every one" in page and "--model_name NAME" in page
    code, everything, _ = said(capsys, script, "--help_all")
    assert code == DONE and "more examples:" in everything
    every = {flag for flag in parsers[-1]._option_string_actions if flag.startswith("--")}
    assert [flag for flag in sorted(every) if flag not in everything] == []
    assert {"--quiet", "--version", "--config_file"} < every
    names = {name.lstrip("-") for name in every} | {a.dest for a in parsers[-1]._actions}
    assert set(parsers[-1].common) <= names, "each flag of --help is there"


MEANT = [
    ("train.py", "--lr", "--learning_rate"),
    ("train.py", "--LR", "--learning_rate"),
    ("train.py", "--lr_min", "--min_lr"),
    ("train.py", "--batch", "--batch_size"),
    ("train.py", "--per-device-train-batch-size", "--batch_size"),
    ("train.py", "--iters", "--max_iters"),
    ("train.py", "--steps", "--max_iters"),
    ("train.py", "--epochs", "--max_iters (which counts steps, not passes over the text)"),
    ("train.py", "--num_train_epochs", "--max_iters (which counts steps, not passes over the text)"),
    ("train.py", "--context", "--block_size"),
    ("train.py", "--seq_len", "--block_size"),
    ("train.py", "--layers", "--n_layer"),
    ("train.py", "--heads", "--n_head"),
    ("train.py", "--d_model", "--n_embd"),
    ("train.py", "--warmup_ratio", "--warmup_iters (a number below 1 is a fraction of --lr_decay_iters)"),
    ("train.py", "--out_dir", "--checkpoint_root (the folder of all models; --model_name names the one in it)"),
    ("train.py", "--resume", "--resume_from (the same command resumes by itself; this goes back to a kept step)"),
    ("train.py", "--bf16", "--dtype bf16"),
    ("train.py", "--fsdp", "--parallel fsdp"),
    ("train.py", "--data", "--input_file"),
    ("train.py", "--tokenizer", "--tokenization"),
    ("train.py", "--save_total_limit", "--keep"),
    ("train.py", "--n-layer", "--n_layer"),  # by letters
    ("generate.py", "--start", "--prompt"),
    ("generate.py", "--max_tokens", "--max_new_tokens"),
    ("generate.py", "--ckpt", "PATH (a path needs no flag)"),
    ("inspect_model.py", "--ckpt_path", "PATH (a path needs no flag)"),
    ("inspect_model.py", "--compare", "--diff"),
    ("convert_checkpoints.py", "--out_dir", "--output_path"),
    ("convert_checkpoints.py", "--format", "--to"),
]


@pytest.mark.parametrize(("script", "flag", "meant"), MEANT)
def test_the_usual_spelling_of_a_flag_suggests_ours(script, flag, meant, capsys):
    expected = f"{script}: error: unknown flag {flag}; did you mean {meant}? (--help shows the flags)\n"
    assert said(capsys, script, flag, "3") == (WRONG_USE, "", expected)


def test_a_flag_of_no_program_suggests_nothing_and_a_script_suggests_only_what_it_has(capsys):
    assert (
        said(capsys, "train.py", "--zzzzzz")[2] == "train.py: error: unknown flag --zzzzzz (--help shows the flags)\n"
    )
    assert suggested("--lr", {"prompt"}) is None
    assert suggested("--ckpt", {PATH}) == "PATH (a path needs no flag)"


FILES = {
    "the config of a model, which is found in its folder (--model_name)": {"vocab_size": 65, "n_embd": 8},
    "the config of a Hugging Face model, which is read where it lies, beside the tensors": {"model_type": "gpt2"},
    "the training state of a model, which is found in its folder (--model_name)": {
        "commit_id": "a",
        "format_version": 2,
    },
    "the tokenizer of a model, which is found in its folder (--model_name)": {"token_kind": "char"},
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_of_a_model_as_config_file_is_named(what, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(FILES[what]))
    code, _, err = said(capsys, "train.py", "--config_file", str(tmp_path / "config.json"))
    assert code == WRONG_USE
    assert f"{tmp_path / 'config.json'}: {what}, and --config_file takes flags by name (--help" in err


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("generate.py", ["--json", "--max_tokens", "3"]),
        ("inspect_model.py", ["--max_tokens", "--json"]),
        ("convert_checkpoints.py", ["a", "b", "--json", "--max_tokens"]),
    ],
)
def test_wrong_use_under_json_is_one_object(script, words, capsys):
    code, out, err = said(capsys, script, *words)
    assert code == WRONG_USE and err.startswith(f"{script}: error: ")
    assert list(json.loads(out)) == ["error"] and json.loads(out)["error"].startswith("unknown flag --max_tokens")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("x: found 1, expected 2."), FAILED, "x: found 1, expected 2."),
        (Unspecified("which? Add --to."), WRONG_USE, "which? Add --to."),
        (FileNotFoundError(2, "No such file or directory", "x.pt"), FAILED, "x.pt: No such file or directory"),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_an_error_under_json_is_one_object_on_stdout(error, code, message, as_json, capsys, monkeypatch):
    def main(argv):
        Parser("x.py", "").parse([])
        Output.as_json = as_json
        raise error

    monkeypatch.setattr("signal.signal", lambda *_: None)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit) as left:
        run(main)
    out, err = capsys.readouterr()
    assert left.value.code == code and err == f"error: {message}\n"
    assert (json.loads(out) == {"error": message}) if as_json else out == ""


def test_quiet_leaves_warnings_errors_and_how_a_run_ended():
    results = ["WARNING: x", "error: x", "done: step 9, validation loss 1.2", "stopped by SIGTERM after step 9"]
    lines = [*results, "step 5: train loss 2.1", "saved step 5"]
    assert [line for line in lines if is_shown(line)] == lines
    Parser("x.py", "").parse(["--quiet"])
    assert [line for line in lines if is_shown(line)] == results
