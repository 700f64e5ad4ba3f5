"""The vocabulary in a conversion: tokenizers that go along, and rows that are cropped or padded."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from core.bundle.tokenizer_state import describe, proves_itself
from core.data.tokenizer import tokenizer_from_state
from core.errors import CheckpointError
from core.model import GPT
from core.pretrained import open_gpt
from tests.makers.byte_pairs import known, write_ranks
from tests.makers.conversions import converted, expected, hf_logits, tensors_of, worst
from tests.makers.doors import Shell
from tests.makers.small_gpts import SmallGPT


def test_a_vocabulary_that_does_not_fit_or_is_no_data_is_refused(nanogpt, tmp_path):
    def error(content) -> str:
        path = tmp_path / "meta.pkl"
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError) as caught:
            converted(nanogpt / "ckpt.pt", tmp_path / "b", "bundle", meta=path)
        assert not (tmp_path / "b").exists()
        return str(caught.value).removeprefix(f"{path}: ")

    few = {"itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
    assert error(few) == "2 characters, but the model has 34 rows. It does not fit this model."
    assert "expected a character for each id from 0" in error({"itos": {0: "a", 2: "b"}})
    assert "its stoi is not the inverse of its itos" in error({**few, "stoi": {"a": 1, "b": 0}})
    assert "expected vocab_size, itos and stoi by name" in error(Shell(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.full
def test_a_vocabulary_of_characters_goes_to_hugging_face_and_back(nanogpt, tmp_path):
    from transformers import AutoTokenizer

    converted(nanogpt / "ckpt.pt", tmp_path / "hf", "hf", meta=nanogpt / "meta.pkl")
    meta = pickle.loads((nanogpt / "meta.pkl").read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "".join(meta["stoi"])
    assert tokenizer(text)["input_ids"] == list(range(34)) and tokenizer.decode(range(34)) == text
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        tokenizer("\u4e2d")
    converted(tmp_path / "hf", tmp_path / "b", "bundle")
    assert json.loads((tmp_path / "b/tokenizer.json").read_text()) == {"token_kind": "char", "chars": list(text)}
    assert GPT.load(tmp_path / "b")[1]["token_kind"] == "char"


@pytest.mark.full
def test_a_tokenizer_of_hugging_face_goes_into_a_bundle_and_back(hf, tmp_path):
    from tests.data.test_tokenizer import hf_definition

    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    definition = hf_definition()
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    converted(folder, tmp_path / "b", "bundle")
    made = json.loads((tmp_path / "b/tokenizer.json").read_text())
    assert made == {"token_kind": "hf", "definition": definition}
    assert GPT.load(tmp_path / "b")[0].tokenizer.kind == "hf"
    converted(tmp_path / "b", tmp_path / "back", "hf")
    assert json.loads((tmp_path / "back/tokenizer.json").read_text()) == definition


def test_gpt2s_own_tokenizer_is_known_by_its_tokens(shared):
    from core.conversion.vocabulary import _state_of

    tokens = {"!": 0, "\u0120t": 256, "\u0120the": 262, "\u0120gazed": 50255, "<|endoftext|>": 50256}
    vocab = {**{f"other {k}": k for k in range(50257) if k not in tokens.values()}, **tokens}
    definition = {"model": {"type": "BPE", "vocab": vocab, "merges": ["a b"] * 50000}}
    assert _state_of(definition) == {"token_kind": "gpt2"}
    vocab["\u0120the"] = 1
    assert _state_of(definition)["token_kind"] == "hf"
    ranks = [line.split() for line in (shared / "data/gpt2.tiktoken").read_bytes().splitlines()]
    numbers = {base64.b64decode(token): int(number) for token, number in ranks}
    assert [numbers[word] for word in (b"!", b" t", b" the", b" gazed")] == [0, 256, 262, 50255]


def test_the_vocabulary_is_cropped_and_padded(hf, tmp_path):
    converted(hf, tmp_path / "wide", "hf", vocab_size=256)
    assert tensors_of(tmp_path / "wide")["transformer.wte.weight"][1] == (256, 48)
    converted(tmp_path / "wide", tmp_path / "same", "hf", vocab_size=211)
    assert tensors_of(tmp_path / "same") == tensors_of(hf)


@pytest.mark.full
def test_transformers_computes_the_same_logits_and_zeros_from_a_padded_vocabulary(hf, tmp_path):
    ids, logits = expected(hf)
    converted(hf, tmp_path / "wide", "hf", vocab_size=256)
    found = hf_logits(tmp_path / "wide", ids)
    assert worst(found[..., :211], logits) < 2e-6 and not found[..., 211:].any()


def model_with(folder: Path, rows: int) -> Path:
    """A file of nanoGPT with this many rows."""
    small = SmallGPT(vocab_size=rows, n_layer=1)
    torch.save({"model": small.nanogpt(), "model_args": small.sizes, "iter_num": 1}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


@pytest.mark.parametrize("name", ["tokenizer.model", "small.tiktoken"])
def test_ranks_beside_a_model_are_its_tokenizer_and_stay_it_in_a_bundle(shared, tmp_path, monkeypatch, name):
    ranks = known(monkeypatch, shared)
    write_ranks(tmp_path / name, ranks)
    path = model_with(tmp_path, 640)
    opened = open_gpt(path)
    assert f"{tmp_path / name}: 600 ranks, taken to be Small's" in opened.notes
    tokenizer, text = opened.model.tokenizer, "The well 2024\n\u4e2d<|end_of_text|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and {ranks[b" we"], ranks[b"ll"]} <= set(ids.tolist()) <= set(range(600))
    assert (tokenizer.vocab_size, tokenizer.end_of_text, ids.dtype) == (602, 601, "uint16")
    converted(path, tmp_path / "b", "bundle")
    kept = GPT.load(tmp_path / "b")[1]
    assert tokenizer_from_state(kept).state() == tokenizer.state() and proves_itself(tokenizer.state())
    assert describe(kept) == f"tiktoken, Small's 602 ids, fingerprint {tokenizer.fingerprint[:12]}"
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps({**config, "vocab_size": 601}))
    with pytest.raises(CheckpointError, match="Small's 602 ids, but vocab_size is 601"):
        GPT.load(tmp_path / "b")


def test_ranks_that_do_not_fit_are_said_and_not_used(shared, tmp_path, monkeypatch):
    ranks = known(monkeypatch, shared)
    path = model_with(tmp_path, 640)

    def said(data: dict[bytes, int] | bytes) -> str:
        if isinstance(data, bytes):
            (tmp_path / "tokenizer.model").write_bytes(data)
        else:
            write_ranks(tmp_path / "tokenizer.model", data)
        opened = open_gpt(path)
        assert opened.model.tokenizer is None
        return next(note for note in opened.notes if "tokenizer.model" in note)

    assert "600 tokens, expected 600 different ones" in said({**ranks, b"!": 600})
    assert "599 ranks, of no vocabulary that is known here" in said(dict(list(ranks.items())[:599]))
    assert "A model of SentencePiece is not read" in said(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    path = model_with(tmp_path, 601)
    assert "600 ranks, and the model has 601 rows" in said(ranks)


@pytest.mark.full
def test_ranks_become_a_tokenizer_json_with_their_ids(shared, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    write_ranks(tmp_path / "tokenizer.model", known(monkeypatch, shared))
    path = model_with(tmp_path, 640)
    converted(path, tmp_path / "hf", "hf")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), open_gpt(path).model.tokenizer
    book = (shared / "data/tinyshakespeare.txt").read_text()[:20_000]
    for text in (book, "I'LL 12345  x\r\n\n \u4e2d\u6587 \U0001f600 it's", ""):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (600, 601)
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 601
