"""nanoGPT's meta.pkl of any kind: itos as a list, words as symbols, vocab_size alone, as nanoGPT trains with it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.bundle.tokenizer_state import describe, proves_itself, same_vocabulary, state_of_meta
from core.data.corpus import open_corpus
from core.data.source import find_source
from core.data.tokenizer import SymbolTokenizer, tokenizer_from_state
from core.errors import CheckpointMismatch, InputError
from core.kinds.gpt import model_vocab_size
from tests.conftest import ROOT
from tests.makers.conversions import converted
from tests.makers.nanogpt_files import TODAY, ckpt

WORDS = ["the", " ", "cat", "\n", "a", "sat", "."]


def meta_of(symbols: list[str], kind: type = list) -> dict[str, Any]:
    itos: Any = dict(enumerate(symbols)) if kind is dict else kind(symbols)
    return {"vocab_size": len(symbols), "itos": itos, "stoi": {s: i for i, s in enumerate(symbols)}}


@pytest.mark.parametrize("kind", [list, tuple, dict])
@given(st.lists(st.text(max_size=4), min_size=1, max_size=20, unique=True))
def test_symbols_are_decoded_as_nanogpt_joins_them(kind, symbols):
    state = state_of_meta(meta_of(symbols, kind), "meta.pkl")
    tokenizer = tokenizer_from_state(state)
    ids = [*range(len(symbols)), 0]
    assert tokenizer.decode(ids) == "".join(symbols[i] for i in ids)
    assert tokenizer.vocab_size == len(symbols)
    assert tokenizer.kind == ("char" if all(len(s) == 1 for s in symbols) else "symbols")
    again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
    assert again.fingerprint == tokenizer.fingerprint and proves_itself(tokenizer.state())
    assert same_vocabulary(state, tokenizer.state())


def test_text_is_encoded_as_nanogpt_does_and_a_word_is_refused_with_its_place():
    tokenizer = SymbolTokenizer(len(WORDS), WORDS)
    stoi = {s: i for i, s in enumerate(WORDS)}
    assert tokenizer.encode("a a.\n").tolist() == [stoi[c] for c in "a a.\n"]
    assert tokenizer.encode("a cat", unknown="skip").tolist() == [stoi[c] for c in "a a"]
    said = r"--prompt: 'c' at position 2 \(line 1, column 3\) is no symbol of the vocabulary of 7 symbols, by which"
    with pytest.raises(InputError, match=said):
        tokenizer.encode("a cat", where="--prompt")


def test_a_number_of_ids_alone_is_a_vocabulary_without_text():
    tokenizer = tokenizer_from_state(state_of_meta({"vocab_size": 300}, "meta.pkl"))
    assert tokenizer.decode([0, 299]) == "0 299 " and tokenizer.encode("").dtype == np.uint16
    with pytest.raises(InputError, match=r"is no symbol of the vocabulary of 300 ids without symbols\. Leave"):
        tokenizer.encode("x")
    assert describe(tokenizer.state()).startswith("300 ids without symbols, fingerprint ")
    stream = tokenizer.stream()
    assert stream.push(7) + stream.push(8) + stream.flush() == "7 8 "


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 6}, "7 symbols, 7 of them different, expected 6"),
        ({"vocab_size": None}, "vocab_size is None, expected the number of ids"),
        ({"symbols": ["a"] * 7}, "7 symbols, 1 of them different, expected 7, each once"),
        ({"symbols": [1] * 7}, "expected a list of texts"),
        ({"symbols": [*WORDS[:-1], "!"]}, "the symbols vocabulary has fingerprint"),
    ],
)
def test_a_tokenizer_json_of_symbols_that_contradicts_itself_is_refused(change, said):
    state = SymbolTokenizer(len(WORDS), WORDS).state()
    with pytest.raises(CheckpointMismatch, match=said):
        tokenizer_from_state({**state, **change})


def dataset(folder: Path, meta: Any, size: int) -> Path:
    folder.mkdir()
    for part, count in (("train", 600), ("val", 200)):
        np.random.default_rng(0).integers(0, size, count).astype("<u2").tofile(folder / f"{part}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


SMALL = ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "8", "--batch_size", "2"]


def run(script: str, *words: object) -> tuple[str, str]:
    done = subprocess.run([sys.executable, ROOT / script, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("meta", "rows", "kind"),
    [
        pytest.param(meta_of(list("abc\n")), 4, "char", marks=pytest.mark.full, id="list"),
        pytest.param(meta_of(WORDS, dict), 7, "symbols", marks=pytest.mark.full, id="words"),
        pytest.param({"vocab_size": 50}, 50, "symbols", marks=pytest.mark.full, id="size"),
    ],
)
def test_a_run_trains_resumes_and_writes_text_with_any_meta(tmp_path, meta, rows, kind):
    data = dataset(tmp_path / "data", meta, rows)
    flags = ["--checkpoint_root", tmp_path, "--model_name", "a", "--eval_iters", "1", "--dataset_dir", data]
    _, said = run("train.py", *flags, "--max_iters", "1", *SMALL)
    assert "python generate.py" in said and "--prompt" not in said  # none of these vocabularies has "The "
    run("train.py", *flags, "--max_iters", "2")
    config = json.loads((tmp_path / "a/config.json").read_text())
    state = json.loads((tmp_path / "a/tokenizer.json").read_text())
    assert (config["vocab_size"], state["token_kind"]) == (rows, kind)
    assert json.loads((tmp_path / "a/training_state.json").read_text())["step"] == 2
    words = ["--checkpoint_root", tmp_path, "--model_name", "a", "--max_new_tokens", "5", "--seed", "1"]
    text, _ = run("generate.py", *words)
    if meta.get("itos") is None:
        assert [0 <= int(word) < rows for word in text.split()[-5:]] == [True] * 5


@pytest.mark.parametrize("meta", [meta_of(WORDS, dict), {"vocab_size": len(WORDS)}], ids=["words", "size"])
def test_such_a_vocabulary_goes_along_in_conversions(tmp_path, meta):
    torch.manual_seed(0)
    ckpt(tmp_path / "ckpt.pt", order=TODAY, rows=len(WORDS))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    converted(tmp_path / "ckpt.pt", tmp_path / "b", "bundle", meta=tmp_path / "meta.pkl")
    state = json.loads((tmp_path / "b/tokenizer.json").read_text())
    assert state.get("symbols") == (WORDS if "itos" in meta else None) and state["vocab_size"] == len(WORDS)
    facts = converted(tmp_path / "b", tmp_path / "back", "nanogpt")
    if "itos" in meta:
        assert pickle.loads((tmp_path / "back/meta.pkl").read_bytes()) == meta
    else:
        assert any("its tokenizer is a number of ids without symbols" in note for note in facts["notes"])
    with pytest.raises(CheckpointMismatch, match=r"3 symbols, but the model has 7 rows\. It does not fit this model"):
        (tmp_path / "few.pkl").write_bytes(pickle.dumps(meta_of(["a", "bc", "d"])))
        converted(tmp_path / "ckpt.pt", tmp_path / "c", "bundle", meta=tmp_path / "few.pkl")


def test_a_dataset_of_nanogpt_with_any_meta_is_a_corpus_of_that_many_ids(tmp_path):
    for meta, size in ((meta_of(list("abc")), 3), (meta_of(WORDS), 7), ({"vocab_size": 9}, 9)):
        folder = dataset(tmp_path / str(size), meta, size)
        corpus = open_corpus(find_source(None, str(folder), None, "m"))
        assert (corpus.tokenizer.vocab_size, model_vocab_size(corpus.tokenizer)) == (size, size)
        assert len(corpus.train) == 600
