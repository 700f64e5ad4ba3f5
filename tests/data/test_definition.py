"""Hugging Face definitions of strangers: checked by their numbers, tried in a process that may be killed."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from core.data import definition
from core.data.definition import LARGEST_ID, sound_definition
from core.data.tokenizer import HfTokenizer, tokenizer_from_file, tokenizer_from_state
from core.errors import InputError

WORDS = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}


def of(model: object = WORDS, **more) -> dict:
    """A definition of two tokens, with some of its parts changed."""
    parts = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"))
    return {"version": "1.0", "added_tokens": [], **parts, "model": model, **more}


NUMBERS = {
    "an id above all": (of(WORDS | {"vocab": {"a": 0, "b": 2**32 - 1}}), "a token has the id 4294967295, expected"),
    "an id just above": (of(WORDS | {"vocab": {"a": LARGEST_ID + 1}}), "the id 16777216, expected a whole number"),
    "a negative id": (of(WORDS | {"vocab": {"a": -1}}), "a token has the id -1"),
    "an id that is none": (of(WORDS | {"vocab": {"a": True}}), "a token has the id True"),
    "an added id": (of(added_tokens=[{"id": 2**32 - 1, "content": "q"}]), "a token has the id 4294967295"),
    "an added token without an id": (of(added_tokens=[{"content": "q"}]), "a token has the id None"),
    "added tokens that are none": (of(added_tokens=[5]), "added_tokens is not a list of objects"),
    "no model": (of(None), "model is NoneType, expected an object"),
    "no tokens": (of({"type": "BPE"}), "model.vocab is NoneType, expected tokens"),
    "a dropout that is none": (of(WORDS | {"dropout": float("nan")}), "model.dropout is nan"),
    "an unknown token below 0": (of({"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": -1}), "model.unk_id is -1"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_no_definition_has_are_refused_before_the_library_sees_them(name, monkeypatch):
    values, expected = NUMBERS[name]
    monkeypatch.setattr(definition, "_trial", lambda text: pytest.fail("it was tried"))
    with pytest.raises(InputError) as caught:
        sound_definition(values, "x.json")
    assert str(caught.value).startswith("x.json: ") and expected in str(caught.value)


LIBRARY = """
import os, time
class Library:
    normalizer = None
    def no_truncation(self): pass
    no_padding = no_truncation
    def get_vocab(self, with_added_tokens): return {"a": 0}
    def encode(self, text, add_special_tokens): raise Exception("unknown")
    def decode(self, ids, skip_special_tokens): raise Exception("unknown")
class Tokenizer:
    @staticmethod
    def from_str(text):
        open(os.environ["TRIED"], "a").write("x")
        %s
        return Library()
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Put another library in the place of `tokenizers`, which does this when a tokenizer is made."""

    def put(what: str) -> Path:
        (tmp_path / "tokenizers.py").write_text(LIBRARY % what)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("TRIED", str(tmp_path / "tried"))
        monkeypatch.setattr(definition, "_tried", {})
        return tmp_path / "tried"

    return put


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are a thing of POSIX")
@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("os.abort()", "it ends the process that tries it, which may use 512 MiB"),
        ("os.kill(os.getpid(), 9)", "it ends the process that tries it"),
        ("bytearray(1 << 30)", "not a Hugging Face tokenizer (MemoryError)"),
        ("while True: pass", "a short text takes it more than 1 seconds"),
        ("raise Exception('no such model')", "not a Hugging Face tokenizer (no such model)"),
        ("raise type('PanicException', (BaseException,), {})('out of range')", "(the library panics: out of range)"),
    ],
)
def test_what_a_definition_does_to_the_process_that_tries_it_is_one_sentence(what, expected, library, monkeypatch):
    library(what)
    monkeypatch.setattr(definition, "_SECONDS", 1)
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            sound_definition(of(), "x.json")
        assert str(caught.value).startswith("x.json: ") and expected in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_sound_definition_is_tried_once_in_a_process(library):
    tried = library("pass")
    assert json.loads(sound_definition(of(), "x.json")) == of() == json.loads(sound_definition(of(), "y.json"))
    assert tried.read_text() == "x"
    sound_definition(of(version="2.0"), "z.json")
    assert tried.read_text() == "xx"


def test_a_definition_that_is_larger_than_any_is_not_tried(library, monkeypatch):
    tried = library("pass")
    monkeypatch.setattr(definition, "LARGEST", 20)
    with pytest.raises(InputError, match="at most 40 are read"):
        sound_definition(of(), "x.json")
    assert not tried.exists()


def charsmap(data: bytes) -> dict:
    return of(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()})


def replaced(times: int) -> dict:
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    return of(normalizer={"type": "Sequence", "normalizers": [one] * times})


def split(pattern: str) -> dict:
    return of(pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})


BREAKS = {
    "a character map that ends the process": charsmap(b"\xff" * 16),
    "an empty character map": charsmap(b""),
    "a character map that leads out of itself": charsmap((400).to_bytes(4, "little") + b"\xff" * 400),
    "a text that grows a billion times": replaced(9),
    "a text that grows a thousand times": replaced(3),
    "a pattern without an end": split("(x+x+)+y"),
    "another": split(r"(?:(.+)+)+\d$"),
    "pieces of no length": of(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a prefix longer than its tokens": of(
        {"type": "BPE", "vocab": {"a": 0, "##": 1, "ab": 2, "##b": 3}, "merges": [["a", "##b"]],
         "continuing_subword_prefix": "##" * 10}
    ),
    "a decoder that strips all": of(decoder={"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}),
    "no tokens": of({"type": "Unigram", "unk_id": 0, "vocab": [], "byte_fallback": False}),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", BREAKS)
def test_the_library_itself_is_not_broken_by_a_definition(name, tmp_path, capfd):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(BREAKS[name]))
    with pytest.raises(InputError, match=r"tokenizer\.json: not a Hugging Face tokenizer \(") as caught:
        tokenizer_from_file(path)
    with pytest.raises(InputError):
        tokenizer_from_state({"token_kind": "hf", "definition": BREAKS[name]})
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


@pytest.mark.full
def test_an_unknown_character_is_one_sentence_and_no_fault_of_the_definition():
    tokenizer = HfTokenizer(of({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "nowhere"}), "x.json")
    assert tokenizer.encode("a").tolist() == [0]
    with pytest.raises(InputError, match=r"x\.json: this Hugging Face tokenizer fails on the text \("):
        tokenizer.encode("b")
