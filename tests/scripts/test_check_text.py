"""--check_text: the loss of a model over a text, whatever program wrote its checkpoint, and what is said of it."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import convert_checkpoints
import inspect_model
from core.bundle.training_state import TrainingState, seal, unseal
from core.checkpoint import CheckpointManager
from core.errors import CheckpointError, InputError
from core.loading.check_text import TOKENS, check_text
from tests.makers.models import SMALL, started
from tests.makers.small_gpts import SmallGPT

pytestmark = pytest.mark.usefixtures("one_thread")

CHARS = ["\n", " ", *"abcdefghijklmnopqrstuvwxyz", "."]


@pytest.fixture
def made() -> SmallGPT:
    return SmallGPT(vocab_size=len(CHARS), block_size=12)


@pytest.fixture
def source(made, tmp_path) -> Path:
    """A nanoGPT checkpoint and its meta.pkl."""
    meta = {"vocab_size": len(CHARS), "itos": dict(enumerate(CHARS)), "stoi": {c: i for i, c in enumerate(CHARS)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    content = {"model": made.nanogpt(), "model_args": made.sizes, "iter_num": 3, "best_val_loss": torch.tensor(1.5)}
    torch.save({**content, "optimizer": made.groups(are_old=False)}, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def loss_of(made: SmallGPT, text: str) -> float:
    """The mean loss in blocks of 12, from logits of our own, a last block that is shorter included."""
    ids = torch.tensor([CHARS.index(c) for c in text])[: TOKENS + 1]
    total, count = 0.0, len(ids) - 1
    for start in range(0, count, made.block_size):
        stop = min(start + made.block_size, count)
        logits = made.logits(ids[None, start:stop])[0]
        total += F.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="sum").item()
    return total / count


def converted(source: Path, target: Path, *words: object) -> int:
    command = [str(source), str(target), "--to", "bundle", "--meta", str(source.parent / "meta.pkl"), *map(str, words)]
    return convert_checkpoints.main(command)


TEXT = "the quick brown fox jumps over the lazy dog.\n" * 3


def test_the_loss_is_that_of_an_independent_forward_pass_with_a_rest_that_fills_no_block(made, source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert converted(source, tmp_path / "bundle") == 0
    found = check_text(tmp_path / "bundle", text)
    assert found.tokens == len(TEXT) - 1 and (len(TEXT) - 1) % made.block_size
    assert found.loss == pytest.approx(loss_of(made, TEXT), abs=1e-5)
    assert found.uniform == pytest.approx(math.log(len(CHARS)))


def test_only_the_first_tokens_of_a_long_text_are_computed(made, source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 200)
    converted(source, tmp_path / "bundle")
    found = check_text(tmp_path / "bundle", text)
    assert found.tokens == TOKENS and found.loss == pytest.approx(loss_of(made, TEXT * 200), abs=1e-5)


def test_characters_outside_the_vocabulary_are_counted(made, source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT.replace("quick", "QuICK"), encoding="utf-8")
    converted(source, tmp_path / "bundle")
    found = check_text(tmp_path / "bundle", text)
    assert found.skipped == 12 and found.loss == pytest.approx(loss_of(made, TEXT.replace("quick", "u")), abs=1e-5)


def test_a_conversion_whose_model_is_worse_than_a_guess_ends_in_1_and_says_the_numbers(source, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert converted(source, tmp_path / "bundle", "--check_text", text) == 1  # its weights are random
    out, err = capsys.readouterr()
    uniform = math.log(len(CHARS))
    assert re.search(
        rf"\nnot proven: loss [0-9.]+ over 134 tokens of {text} \(recorded 1\.5000, a uniform guess has "
        rf"{uniform:.4f}\)\n",
        out,
    )
    assert re.search(
        rf"error: {text}: loss [0-9.]+, worse than a uniform guess, {uniform:.4f}\. {tmp_path}/bundle was", err
    )


@pytest.mark.parametrize(("above", "code"), [(0.4, 0), (0.6, 1)])
def test_the_loss_to_expect_may_be_half_a_nat_lower(tmp_path, capsys, above, code):
    saving, model, optimizer = started(tmp_path, config={**SMALL, "tied_head": False, "head_bias": True})
    with saving, torch.no_grad():  # it knows one character better than the others
        model.lm_head.weight.zero_()
        model.lm_head.bias[0] = 1.0
        saving.save(model, optimizer, step=1)
    folder, text = tmp_path / "dante", tmp_path / "text.txt"
    text.write_text(model.tokenizer.chars[0] * 50)
    loss = check_text(folder, text).loss
    words = [str(folder), "--check_text", str(text), "--check_loss", f"{loss - above:.4f}", "--json"]
    capsys.readouterr()
    assert loss == pytest.approx(math.log(math.e + len(model.tokenizer.chars) - 1) - 1, abs=1e-5)
    assert inspect_model.main(words) == code
    check = json.loads(capsys.readouterr().out)["check"]
    assert check["loss"] == loss and check["expected"] == pytest.approx(loss - above, abs=1e-4)
    assert any("more than 0.5 above --check_loss" in fault for fault in check["faults"]) is bool(code)


def test_the_recorded_loss_is_held_against_the_text_it_was_measured_on_and_no_other(source, tmp_path):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(TEXT)
    other.write_text(TEXT + " ")
    converted(source, tmp_path / "bundle")
    state = tmp_path / "bundle/training_state.json"

    told = unseal(state.read_bytes(), str(state)).to_dict()
    files = told.pop("integrity")["files"]
    told["data"] = {"kind": "text", "path": "text.txt", "digest": hashlib.sha256(TEXT.encode()).hexdigest()}
    state.write_bytes(seal(TrainingState.from_dict(told), files))
    found = check_text(tmp_path / "bundle", text)
    assert found.is_recorded_text and any("above the recorded loss, 1.5000" in fault for fault in found.faults)
    assert not check_text(tmp_path / "bundle", other).is_recorded_text


def test_a_model_of_another_program_is_computed_as_it_lies_there(made, source, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert check_text(source, text).loss == pytest.approx(loss_of(made, TEXT), abs=1e-5)
    (tmp_path / "meta.pkl").unlink()
    found = check_text(source, text)
    assert found.loss is None and "its tokenizer is not known" in found.line and found.faults == []
    tokenizer = {"token_kind": "char", "chars": CHARS}
    assert check_text(source, text, tokenizer=tokenizer).loss == pytest.approx(loss_of(made, TEXT), abs=1e-5)
    alone = tmp_path / "state.pt"
    torch.save(made.nanogpt(), alone)
    assert inspect_model.main([str(alone), "--check_text", str(text)]) == 0
    assert "not computed: " in (out := capsys.readouterr().out) and "nothing in the file shows its heads" in out


def test_a_family_that_is_not_computed_is_no_failure(shared, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert inspect_model.main([str(shared / "fixtures/hf_llama_gqa_untied"), "--check_text", str(text)]) == 0
    assert "not computed: " in capsys.readouterr().out


@pytest.mark.parametrize("script", [convert_checkpoints, inspect_model])
def test_a_loss_without_a_text_and_a_text_that_is_not_there_are_wrong(script, source, tmp_path, capsys):
    words = [str(source)] if script is inspect_model else [str(source), str(tmp_path / "b"), "--to", "bundle"]
    with pytest.raises(SystemExit) as wrong:
        script.main([*words, "--check_loss", "1.5"])
    assert wrong.value.code == 2 and "--check_loss needs --check_text" in capsys.readouterr().err


def test_what_cannot_be_computed_says_why(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with CheckpointManager("line", tmp_path, say=lambda line: None) as saving:
        saving.save(torch.nn.Linear(2, 1), step=1)
    assert "a Linear is not a model of this program" in check_text(tmp_path / "line", text).line
    (tmp_path / "short.txt").write_text("x")
    saving, model, optimizer = started(tmp_path)
    with saving:
        saving.save(model, optimizer, step=1)
    with pytest.raises(InputError, match=r"short\.txt: \d tokens of the model's vocabulary, expected at least 2"):
        check_text(tmp_path / "dante", tmp_path / "short.txt")
    with pytest.raises(InputError, match=r"none\.txt: No such file or directory, expected a text for --check_text"):
        check_text(tmp_path / "dante", tmp_path / "none.txt")


def test_a_single_file_of_ours_is_computed_as_it_is(shared, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog did not. " * 9)
    single = shared / "fixtures/lecture_char/legacy/latest.pt"
    converted_ = tmp_path / "bundle"
    assert convert_checkpoints.main([str(single), str(converted_), "--to", "bundle"]) == 0
    found, again = check_text(single, text), check_text(converted_, text)
    assert found.loss is not None and found.loss == pytest.approx(again.loss, abs=1e-6)


def test_tokens_of_gpt2_skip_no_character(shared, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    made = SmallGPT(vocab_size=50257, n_layer=1)
    torch.save({"model": made.nanogpt(), "model_args": made.sizes}, tmp_path / "ckpt.pt")
    found = check_text(tmp_path / "ckpt.pt", text, bpe_file=shared / "data/gpt2.tiktoken")
    assert found.skipped == 0 and found.tokens > 80 and found.loss is not None


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), (b"", "empty, expected a text"), (b"a\xffb", "byte 1 does not belong to UTF-8")],
)
def test_a_text_that_cannot_be_read_is_refused_before_anything_is_written(source, tmp_path, content, said):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(InputError, match=said):
        converted(source, tmp_path / "bundle", "--check_text", text)
    assert not (tmp_path / "bundle").exists()


def test_where_there_is_nothing_to_compute_the_flag_is_refused(source, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    for command, words, said in (
        (convert_checkpoints.main, [str(source), "b", "--to", "bundle", "--dry_run"], "--dry_run writes nothing"),
        (inspect_model.main, [str(source), "--history"], "leave out --history"),
    ):
        with pytest.raises(SystemExit) as wrong:
            command([*words, "--check_text", str(text)])
        assert wrong.value.code == 2 and said in capsys.readouterr().err
    for name in ("a", "b"):
        converted(source, tmp_path / "root" / name)
    with pytest.raises(CheckpointError, match="root: holds 2 models, and --check_text computes one"):
        inspect_model.main([str(tmp_path / "root"), "--check_text", str(text)])


@pytest.mark.parametrize("to", ["safetensors", "pt", "nanogpt", "hf"])
def test_a_result_without_a_config_is_computed_with_the_choices_of_its_source(made, source, tmp_path, capsys, to):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert converted(source, tmp_path / "bundle") == 0
    target = {"safetensors": "m.safetensors", "pt": "m.pt", "nanogpt": "ckpt2.pt", "hf": "hf"}[to]
    words = [str(tmp_path / "bundle"), str(tmp_path / target), "--to", to, "--check_text", str(text)]
    convert_checkpoints.main(words)
    assert f": loss {loss_of(made, TEXT):.4f} over 134 tokens of " in capsys.readouterr().out
