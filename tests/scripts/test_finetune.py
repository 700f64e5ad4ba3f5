"""examples/finetune_classification.py: it learns, survives, and says in one sentence what it cannot use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoint import CheckpointManager
from core.console.commandline import DONE, FAILED, STOPPED, WRONG_USE
from core.data.tokenizer import make_char, named_tokenizer
from core.errors import CheckpointError, InputError
from core.model import GPTFlexAttention
from core.networks.classification import GPTClassification
from core.pretrained import load_classifier, load_pretrained_checkpoint
from examples.classification.encoded import encode, shares
from examples.classification.labelled import read_labelled, read_splits
from examples.finetune_classification import main
from tests.conftest import ROOT
from tests.makers.classification_task import CLASSES, TOKENS, dataset, rows, tokenizer_json, write
from tests.makers.modded_checkpoints import upstream_file
from tests.makers.models import save_durably, state_of

SCRIPT = str(ROOT / "examples/finetune_classification.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

HF = pytest.param("hf", marks=pytest.mark.full)
"""The tokenizer that needs the optional library `tokenizers`."""


@pytest.fixture(scope="module", params=["char", HF])
def made(tmp_path_factory, request):
    """A tokenizer, a dataset, a file as upstream saves it, and a bundle of a smaller model."""
    folder = tmp_path_factory.mktemp("classification")
    tokenizer_json(folder / "tokenizer.json", request.param)
    dataset(folder / "nli")
    dataset(folder / "few", "csv", (24, 8, 8))
    upstream_file(folder / "state_step001770.pt")
    torch.manual_seed(1)
    model = GPTFlexAttention(len(TOKENS), 6, 1, 128, 256, eos_token_id=0)
    torch.nn.init.normal_(model.blocks[0].attn.c_proj.weight, std=0.05)
    model.tokenizer = named_tokenizer(str(folder / "tokenizer.json"))
    model.save_checkpoint_bundle(folder / "pretrained", step=3)
    return folder


def words(made, root, *more, **flags):
    given = {
        "dataset": made / "few", "pretrained_ckpt_path": made / "pretrained", "device": "cpu", "num_epochs": 1,
        "batch_size": 8, "learning_rate": 1e-3, "checkpoint_root": root, "model_name": "nli", **flags,
    }  # fmt: skip
    pairs = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    return [*pairs, *more]


def tune(made, root, *more, **flags):
    command = [sys.executable, SCRIPT, *words(made, root, *more, **flags)]
    return subprocess.run(command, cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_it_learns_from_a_file_of_the_upstream_program(made, tmp_path, capsys):
    flags = {"dataset": made / "nli", "pretrained_ckpt_path": made / "state_step001770.pt", "batch_size": 16}
    flags |= {"tokenizer_name": made / "tokenizer.json", "n_layer": 12, "n_head": 1, "n_embd": 128, "vocab_size": 61}
    assert main(words(made, tmp_path, "--json", **flags)) == DONE
    out, said = capsys.readouterr()
    report = json.loads(out)
    assert report["accuracy"] > 0.9 and report["macro_f"] > 0.9, "chance is a third"
    assert (report["split"], report["rows"], report["step"]) == ("test", 90, 30)
    assert set(report["classes"]) == set(CLASSES)
    assert all(24 <= found["support"] <= 36 for found in report["classes"].values()), "no class is the bulk"
    assert "Format: small (from train_gpt_small.py)" in said
    assert "--vocab_size 61 is not needed: the checkpoint has 61 rows" in said
    state = state_of(tmp_path / "nli")
    assert state["val_accuracy"] > 0.9 and state["best"]["step"] == 30
    lines = [json.loads(line) for line in (tmp_path / "nli/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 31)]

    found = load_classifier(tmp_path / "nli")
    assert (found.classes, found.step) == (sorted(CLASSES), 30)
    examples = encode(read_labelled(made / "nli/test.jsonl"), found.classes, found.tokenizer, 64)
    tokens, mask, labels = examples.batch(range(90), torch.device("cpu"))
    with torch.no_grad():
        logits, loss = found.model(tokens, mask, labels)
    right = (logits.argmax(-1) == labels).float().mean().item()
    assert right == pytest.approx(report["accuracy"]) and loss.item() == pytest.approx(report["loss"], rel=1e-3), (
        "the classifier that was saved is the one that was scored"
    )

    pretrained = load_pretrained_checkpoint(made / "state_step001770.pt", dtype="fp32", say=lambda line: None)[0]
    live = GPTClassification(pretrained, 3).eval()
    assert CheckpointManager("nli", tmp_path).load(live) == 30
    with torch.no_grad():
        assert torch.equal(live(tokens, mask)[0], logits)


def encoded(table, made, classes=CLASSES, length=64):
    return encode(table, classes, named_tokenizer(str(made / "tokenizer.json")), length)


def test_ended_in_mid_epoch_and_started_again_it_ends_with_the_same_bits(made, tmp_path, capsys, monkeypatch):
    flags = {"num_epochs": 2, "save_interval": 2, "class_weights": "balanced"}
    assert main(words(made, tmp_path, "--json", **flags, model_name="whole")) == DONE
    report, save = capsys.readouterr().out, CheckpointManager.save

    def ends_after_step_4(manager, *what, step, **more):
        save(manager, *what, step=step, **more)
        manager.wait()
        if step == 4:
            raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(CheckpointManager, "save", ends_after_step_4)
        main(words(made, tmp_path, "--json", **flags, model_name="ended"))
    assert main(words(made, tmp_path, "--json", **flags, model_name="ended")) == DONE
    again = capsys.readouterr()
    assert "ended: resuming at step 4" in again.err and again.out == report
    for name in ("model.pt", "optimizer.pt", "metrics.jsonl", "tokenizer.json"):
        assert (tmp_path / "ended" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_signal_saves_and_the_same_line_goes_on_and_a_third_time_only_scores(made, tmp_path):
    flags = {"num_epochs": 40, "save_interval": 1000, "dataset": made / "nli"}
    talkative = ROOT / "tests/makers/talkative.py"
    command = [sys.executable, talkative, SCRIPT, *words(made, tmp_path, **flags)]
    run = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    said = b""
    while b"loss" not in said:
        said += run.stderr.read1(4096)
        assert run.poll() is None, said
    run.send_signal(signal.SIGTERM)
    out, rest = run.communicate(timeout=60)
    step = state_of(tmp_path / "nli")["step"]
    assert run.returncode == STOPPED and out == b""
    assert f"stopped by SIGTERM after step {step}, which is saved. Run the same command to continue." in rest.decode()
    done = tune(made, tmp_path, **{**flags, "num_epochs": 1})
    assert done.returncode == DONE and f"resuming at step {step}" in done.stderr, done.stderr
    idle = tune(made, tmp_path, **{**flags, "num_epochs": 1})
    assert idle.stdout == done.stdout and "saved step" not in idle.stderr
    head, names, *table = done.stdout.splitlines()
    assert head.startswith("test: 90 rows, step 60, loss ")
    assert names.split() == ["class", "precision", "recall", "F-score", "rows"]
    assert [line.split()[0] for line in table] == [*sorted(CLASSES), "accuracy", "macro"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_and_resumes_with_its_scale(made, tmp_path, dtype, capsys):
    for epochs, name in ((1, "nli"), (2, "nli"), (2, "whole")):
        assert main(words(made, tmp_path, dtype=dtype, num_epochs=epochs, model_name=name)) == DONE
    assert "resuming at step 3" in capsys.readouterr().err
    extra, whole = state_of(tmp_path / "nli")["extra"], state_of(tmp_path / "whole")["extra"]
    assert extra == whole and ("grad_scaler" in extra) == (dtype == "float16")
    assert (tmp_path / "nli/model.pt").read_bytes() == (tmp_path / "whole/model.pt").read_bytes()
    weights = torch.load(tmp_path / "nli/model.pt", weights_only=True)
    assert {t.dtype for t in weights.values()} == {torch.float32}, "the weights stay what AdamW needs"


def test_the_log_has_no_lines_of_steps_that_were_never_saved(made, tmp_path):
    (tmp_path / "nli").mkdir()
    (tmp_path / "nli/metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    assert main(words(made, tmp_path)) == DONE
    lines = [json.loads(line) for line in (tmp_path / "nli/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [(1, True), (2, True), (3, True), (3, False)]
    assert lines[0]["loss"] < 2


def test_a_run_cannot_change_what_its_steps_are_a_function_of(made, tmp_path, capsys):
    assert main(words(made, tmp_path)) == DONE
    before = (tmp_path / "nli/model.pt").read_bytes()
    for change in ({"batch_size": 4}, {"seed": 2}, {"max_length": 9}, {"dataset": made / "nli"}):
        with pytest.raises(CheckpointError, match=r"in the resumed run, and now .* another --model_name"):
            main(words(made, tmp_path, **{"num_epochs": 2, **change}))
    assert (tmp_path / "nli/model.pt").read_bytes() == before
    capsys.readouterr()
    assert main(words(made, tmp_path, num_epochs=2, learning_rate=1e-4)) == DONE
    said = capsys.readouterr().err
    assert "learning_rate: 0.001 so far, 0.0001 from now on" in said and "num_epochs: 1 so far, 2 from" in said


def test_a_model_of_another_program_is_neither_resumed_nor_a_classifier(made, tmp_path):
    model = torch.nn.Linear(2, 2)
    save_durably(CheckpointManager("nli", tmp_path, say=lambda line: None), model, step=1)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        main(words(made, tmp_path))
    with pytest.raises(CheckpointError, match="step 1 is not a classifier"):
        load_classifier(tmp_path / "nli")


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ({"dataset": None}, WRONG_USE, "--dataset is needed"),
        ({"pretrained_ckpt_path": None}, WRONG_USE, "--pretrained_ckpt_path is needed"),
        ({"dtype": "float8"}, WRONG_USE, "float8"),
        ({"batch_size": 0}, WRONG_USE, "found '0', expected a whole number of at least 1"),
        ({"text_columns": "premise,"}, WRONG_USE, "--text_columns takes names separated by commas"),
        ({"text_colums": "premise"}, WRONG_USE, "unknown flag --text_colums; did you mean --text_columns?"),
        ({"n_layer": 12, "n_embd": 768}, FAILED, "--n_layer is 12, but the checkpoint has 6; --n_embd is 768, but"),
        ({"n_head": 6}, FAILED, "--n_head is 6, but the checkpoint has 1. Leave the flags out"),
        ({"dataset": "nowhere.csv"}, FAILED, f"no such file or folder; looked for {Path.cwd()}/nowhere.csv."),
        ({"pretrained_ckpt_path": "no*/x_*.pt"}, FAILED, f"nothing matches no*/x_*.pt (in {Path.cwd()}). Name the"),
        ({"pretrained_ckpt_path": "nowhere.pt"}, FAILED, "nowhere.pt: cannot be opened"),
        ({"tokenizer_name": "nowhere.json"}, FAILED, "--tokenizer_name: found no file nowhere.json, expected gpt2"),
        ({"tokenizer_name": "gpt2"}, FAILED, f"gpt2: gpt2, but the model has {len(TOKENS)} rows"),
        ({"label_column": "gold"}, FAILED, "train.csv, line 2: no column gold; there are premise, hypothesis, label"),
        ({"text_columns": "premise,claim"}, FAILED, "no column claim"),
        ({"max_length": 2}, FAILED, "--max_length: found 2, which leaves no room for 2 texts"),
        ({"max_length": 300}, FAILED, "--max_length: found 300, expected at most 256"),
        ({"learning_rate": -1}, FAILED, "learning_rate: found -1.0, expected a number above 0"),
        ({"dropout": 1}, FAILED, "dropout: found 1.0"),
        ({"device": "tpuu"}, FAILED, "--device: 'tpuu' is not a device"),
        ({"model_name": "../x"}, FAILED, "model name '../x'"),
    ],
    ids=str,
)
def test_wrong_use_is_one_sentence_and_writes_nothing(made, tmp_path, flags, code, said, capsys):
    root = tmp_path / "root"
    if code == FAILED:  # what core.console.commandline.run makes a line and exit code 1 of
        with pytest.raises(CheckpointError) as raised:
            main(words(made, root, **flags))
        assert said in str(raised.value) and "\n" not in str(raised.value)
    else:
        with pytest.raises(SystemExit) as ended:
            main(words(made, root, **flags))
        assert ended.value.code == WRONG_USE and said in capsys.readouterr().err
    assert not list(root.glob("*/*"))


def test_a_quoted_pattern_names_its_only_match_and_several_are_listed(made, tmp_path, capsys):
    root = tmp_path / "root"
    (tmp_path / "hin_urd_run_1").mkdir()
    (tmp_path / "hin_urd_run_1" / "best_state_7.pt").symlink_to(made / "state_step001770.pt")
    pattern = f"{tmp_path}/hin_urd_run_*/best_state_*.pt"
    with pytest.raises(CheckpointError, match="--n_layer is 8, but the checkpoint has 12"):
        main(words(made, root, pretrained_ckpt_path=pattern, n_layer=8))
    one = f"{tmp_path}/hin_urd_run_1/best_state_7.pt"
    assert f"{pattern}: using {one}, its only match\n" in capsys.readouterr().err
    (tmp_path / "hin_urd_run_1" / "best_state_9.pt").touch()
    with pytest.raises(InputError) as raised:
        main(words(made, root, pretrained_ckpt_path=pattern))
    both = f"{one}, {one.replace('_7', '_9')}"
    assert str(raised.value) == f"--pretrained_ckpt_path: 2 match {pattern}: {both}. Name one."


def test_an_error_of_the_process_is_one_line_and_its_exit_code(made, tmp_path):
    done = tune(made, tmp_path, n_layer=8)
    assert done.returncode == FAILED and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


BAD = {
    "empty.csv": (b"", "no rows"),
    "header.csv": (b"text,label\n", "no rows"),
    "one_class.csv": (b"text,label\nfog,a\nsea,a\n", "one class (a) in the training rows"),
    "one_row.csv": (b"text,label\nfog,a\n", "found 1 row, expected at least 2"),
    "short.csv": (b"text,label\nfog,a\nfog\n", "line 3: found 1 fields, expected 2 as in line 1"),
    "twice.csv": (b"text,text,label\na,b,c\n", "two columns have the same name"),
    "quote.csv": (b'text,label\n"fog,a\n', "not valid CSV"),
    "latin.csv": (b"text,label\nf\xf6g,a\n", "byte 12 is not UTF-8"),
    "no_text.csv": (b"body,label\nfog,a\n", "none of which is a default text column"),
    "blank.csv": (b"text,label\n,a\nfog,b\nsea,a\n", "no tokens in text"),
    "no_class.csv": (b"text,label\nfog, \n", "expected the name or number of a class"),
    "list.jsonl": (b"[1]\n", "line 1: a JSON list, expected an object"),
    "broken.jsonl": (b'\n{"text": "fog"\n', "line 2: not valid JSON"),
    "number.jsonl": (b'{"text": 3, "label": 1}\n', "text is 3, expected a text"),
    "half.jsonl": (b'{"text": "fog", "label": 0.5}\n', "expected the name or number of a class"),
    "rows.parquet": (b"PAR1", "expected a file that ends in .csv, .tsv, .jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(made, tmp_path, name):
    content, said = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        main(words(made, tmp_path, dataset=path))
    assert said in str(raised.value) and str(path) in str(raised.value)


def test_a_class_that_only_the_test_file_has_is_named(made, tmp_path):
    write(tmp_path / "train.tsv", rows(9))
    write(tmp_path / "test.tsv", [{**rows(1)[0], "label": "maybe"}])
    with pytest.raises(InputError, match=r"test.tsv, line 2: class 'maybe', expected one of the training rows: contra"):
        main(words(made, tmp_path, dataset=tmp_path))
    write(tmp_path / "train.csv", rows(9))
    with pytest.raises(InputError, match=r"train.csv and train.tsv, expected one of them"):
        read_splits(tmp_path)


def test_the_three_formats_read_equal(made, tmp_path):
    content = rows(40)
    tables = [read_labelled(write(tmp_path / f"rows.{ending}", content)) for ending in ("csv", "tsv", "jsonl")]
    expected = [(row["premise"], row["hypothesis"]) for row in content]
    for table in tables:
        assert table.columns == ("premise", "hypothesis")
        assert table.texts == expected and table.labels == [row["label"] for row in content]
    assert len({encoded(table, made).fingerprint() for table in tables}) == 1
    assert any('"' in premise for premise, _ in expected), "a quotation mark is text, in a TSV too"


def test_windows_files_and_lines_within_a_field_read_as_they_should(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufefftext,label\r\n"one\ntwo, ""three""",1\r\n\r\nfour,0\r\n'.encode())
    table = read_labelled(path)
    assert table.texts == [('one\ntwo, "three"',), ("four",)]
    assert (table.labels, table.lines, table.classes()) == (["1", "0"], [2, 5], ["0", "1"])


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    content = [{"text": "fog", "label": n} for n in (10, 9, -1)]
    assert read_labelled(write(tmp_path / "rows.jsonl", content)).classes() == ["-1", "9", "10"]


def test_without_a_validation_file_a_tenth_of_the_rows_validates(tmp_path):
    path = write(tmp_path / "rows.jsonl", rows(50))
    splits = read_splits(path, seed=1)
    assert {split: len(table) for split, table in splits.items()} == {"train": 45, "validation": 5}
    assert sorted(splits["train"].lines + splits["validation"].lines) == [*range(1, 51)]
    assert splits["validation"].lines == read_splits(path, seed=1)["validation"].lines
    assert splits["validation"].lines != read_splits(path, seed=2)["validation"].lines


TWO_TEXTS = [{"premise": "fogse", "hypothesis": "ly", "label": "neutral"}]


@pytest.mark.parametrize("made", [HF], indirect=True)
def test_rows_are_the_end_of_text_token_and_the_texts_divided_by_it(made, tmp_path):
    table = read_labelled(write(tmp_path / "rows.csv", TWO_TEXTS))
    end = "<|endoftext|>"
    for length, expected in (
        (64, [end, *"fogse", end, *"ly"]),
        (7, [end, *"fog", end, *"ly"]),
        (4, [end, "f", end, "l"]),
    ):
        assert encoded(table, made, length=length).ids[0].tolist() == [TOKENS.index(token) for token in expected]


def test_rows_are_texts_divided_by_a_new_line_or_a_space_where_no_token_ends_a_text(tmp_path):
    table = read_labelled(write(tmp_path / "rows.csv", TWO_TEXTS))
    for mark in ("\n", " "):
        chars = make_char([f"fogsely{mark}"])
        assert chars.decode(encode(table, CLASSES, chars, 64).ids[0]) == f"fogse{mark}ly"
        assert chars.decode(encode(table, CLASSES, chars, 6).ids[0]) == f"fog{mark}ly"
    assert shares([5, 1, 9], 10) == [4, 1, 5] and shares([2, 3], 10) == [2, 3] and shares([0, 8], 4) == [0, 4]


def test_every_epoch_sees_each_row_once_in_an_order_of_its_own(made):
    examples = encoded(read_labelled(made / "few/train.csv"), made)
    device, orders = torch.device("cpu"), []
    for epoch in range(2):
        batches = [examples.step(7, 5 * epoch + number, 5, device) for number in range(5)]
        assert [len(labels) for _, _, labels in batches] == [5, 5, 5, 5, 4]
        seen = [tokens[mask].tolist() for b in batches for tokens, mask in zip(b[0], b[1], strict=True)]
        assert sorted(seen) == sorted(row.tolist() for row in examples.ids)
        orders.append(seen)
    again = examples.step(7, 7, 5, device)
    assert orders[0] != orders[1] and again[0][again[1]].tolist() == [i for row in orders[1][10:15] for i in row]
    tokens, mask, _ = again
    assert np.array_equal(mask.sum(1), [len(row) for row in orders[1][10:15]]) and not tokens[~mask].any()
