"""The tokenizer in a folder of transformers: GPT-2's byte pairs, characters and symbols, special tokens with a row."""

from __future__ import annotations

import json
import pickle
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import core.conversion.hf_tokenizer as hf_tokenizer
import core.data.gpt2_ranks as ranks
from core.conversion.hf_tokenizer import SPECIAL, definition_of, gpt2_definition, state_of_words, words_of
from core.conversion.vocabulary import _state_of, tokens_of
from core.errors import CheckpointError, InputError
from tests.conftest import ROOT
from tests.makers.conversions import converted, tensors_of
from tests.makers.small_gpts import SmallGPT


def file_of(path: Path, rows: int) -> Path:
    """A ckpt.pt with this many rows."""
    gpt = SmallGPT(vocab_size=rows, n_layer=1, n_head=2, n_embd=8)
    torch.save({"model": gpt.nanogpt(), "model_args": {**gpt.sizes, "dropout": 0.0}, "iter_num": 3}, path)
    return path


def bundle_of(folder: Path, count: int) -> tuple[Path, list[str]]:
    """A bundle of a model with a row for each of this many characters."""
    chars = [chr(ord("0") + i) for i in range(count)]
    return bundle_with(folder, {"vocab_size": count, "itos": chars}), chars


def bundle_with(folder: Path, meta: dict) -> Path:
    """A bundle of a model with a row for each id of a meta.pkl."""
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    converted(file_of(folder / "ckpt.pt", meta["vocab_size"]), folder / "bundle", "bundle", meta=folder / "meta.pkl")
    return folder / "bundle"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_gpt2s_tokens_and_merges_give_the_ids_of_tiktoken(shared):
    import tiktoken

    found = ranks.read_ranks(shared / "data/gpt2.tiktoken")
    definition = gpt2_definition(found)
    assert _state_of(json.loads(json.dumps(definition))) == {"token_kind": "gpt2"}
    vocab, merges = definition["model"]["vocab"], definition["model"]["merges"]
    assert sorted(vocab.values()) == list(range(50257)) and len(merges) == len(set(merges)) == 50000
    byte_of = ranks.printable_bytes()
    assert {bytes(byte_of[c] for c in token): n for token, n in vocab.items() if n < 50256} == found
    assert [vocab[merge.replace(" ", "", 1)] for merge in merges] == list(range(256, 50256))  # in order of their ranks
    order = {tuple(merge.split(" ")): k for k, merge in enumerate(merges)}
    char_of = {byte: char for char, byte in byte_of.items()}
    encoding = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]+", mergeable_ranks=found, special_tokens={})

    @settings(max_examples=200, deadline=None)
    @given(st.binary(min_size=1, max_size=24) | st.text("the lonÄ1 ", min_size=1, max_size=24).map(str.encode))
    def check(piece: bytes) -> None:
        parts = [char_of[byte] for byte in piece]
        while len(parts) > 1:  # as the library `tokenizers` merges: always the first of the merges that apply
            rank, at = min((order.get(pair, 10**9), i) for i, pair in enumerate(pairwise(parts)))
            if rank == 10**9:
                break
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        assert [vocab[part] for part in parts] == encoding._encode_single_piece(piece)

    check()
    definition["added_tokens"].append({"id": 50257, "content": "[PAD]", "special": True})  # and one of somebody else
    state = _state_of(definition)
    assert state == {"token_kind": "hf", "definition": definition} and tokens_of(state) == 50258


@pytest.mark.parametrize("rows", [50257, 50304])
def test_a_model_of_gpt2s_tokens_takes_its_tokenizer_along(rows, tmp_path, shared):
    source = file_of(tmp_path / "ckpt.pt", rows)
    facts = converted(source, tmp_path / "hf", "hf", bpe_file=shared / "data/gpt2.tiktoken")
    assert not [note for note in facts["notes"] if note.startswith("WARNING: the folder")]
    settings = read(tmp_path / "hf/tokenizer_config.json")
    assert settings["model_max_length"] == 12
    assert {settings[role] for role in ("bos_token", "eos_token", "unk_token")} == {"<|endoftext|>"}
    config, generation = read(tmp_path / "hf/config.json"), read(tmp_path / "hf/generation_config.json")
    assert config["bos_token_id"] == config["eos_token_id"] == generation["eos_token_id"] == 50256
    assert generation.get("suppress_tokens", []) == list(range(50257, rows))
    assert tensors_of(tmp_path / "hf")["transformer.wte.weight"][1] == (rows, 32 // 4)


def test_without_the_ranks_the_plan_warns_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ranks, "BESIDE", tmp_path / "gpt2.tiktoken")
    monkeypatch.setattr(ranks, "_download", lambda *args: pytest.fail("a conversion downloads nothing"))
    facts = converted(file_of(tmp_path / "ckpt.pt", 50257), tmp_path / "hf", "hf")
    (warning,) = (note for note in facts["notes"] if note.startswith("WARNING: the folder has no tokenizer"))
    assert "--bpe_file FILE" in warning and ranks.URL in warning
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    assert read(tmp_path / "hf/config.json")["eos_token_id"] == 50256  # the ids are known all the same
    with pytest.raises(InputError, match=r"ckpt\.pt: line 1 is .*expected a token in base64"):
        converted(tmp_path / "ckpt.pt", tmp_path / "other", "hf", bpe_file=tmp_path / "ckpt.pt")


@pytest.mark.parametrize(("rows", "to"), [(50257, "bundle"), (30, "hf")])
def test_ranks_that_would_have_no_effect_are_refused(rows, to, tmp_path):
    with pytest.raises(CheckpointError, match=r"--bpe_file: only a tokenizer\.json of --to hf"):
        converted(file_of(tmp_path / "ckpt.pt", rows), tmp_path / "x", to, bpe_file=tmp_path / "ranks")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(TEXTS, min_size=1, unique=True)
    | st.lists(TEXTS.filter(lambda text: len(text) == 1), min_size=1, unique=True)
    | st.integers(1, 20).map(lambda size: words_of({"token_kind": "symbols", "vocab_size": size})),
    st.integers(0, 3),
    st.booleans(),
)
def test_vocabularies_come_back_from_todays_tokenizers_and_from_older_ones(words, free, is_old):
    definition = definition_of(words, SPECIAL[:free])
    if is_old:  # it named a token that was not there
        definition = definition_of(words)
        definition["model"]["unk_token"] = "<unk>"
    state = state_of_words(json.loads(json.dumps(definition)))
    assert state["token_kind"] == ("char" if all(len(word) == 1 for word in words) else "symbols")
    assert words_of(state) == words and tokens_of(state) == len(words)
    vocab, unknown = definition["model"]["vocab"], definition["model"]["unk_token"]
    assert [token["id"] for token in definition["added_tokens"]] == list(range(len(words), len(vocab)))
    assert is_old or (unknown in vocab) == (free > 0)
    definition["normalizer"] = {"type": "NFC"}
    assert state_of_words(definition) is None


WORDS = ["the", " ", "cat", "\n", "a", "c", "."]
META = {"vocab_size": 7, "itos": WORDS}


@pytest.mark.parametrize(("free", "ids"), [(0, None), (1, (7, 7, 7, 7)), (9, (7, 7, 8, 9))])
def test_symbols_go_along_and_come_back(free, ids, tmp_path):
    facts = converted(bundle_with(tmp_path, META), tmp_path / "hf", "hf", vocab_size=7 + free)
    vocab = read(tmp_path / "hf/tokenizer.json")["model"]["vocab"]
    settings = read(tmp_path / "hf/tokenizer_config.json")
    assert list(vocab)[:7] == WORDS and max(vocab.values()) == 6 + min(free, 3)
    notes = " ".join(facts["notes"])
    if ids is None:
        assert not settings.keys() & set(ROLES) and "each row of the model is a symbol" in notes
    else:
        assert tuple(vocab[settings[role]] for role in ROLES) == ids and "<|endoftext|> (row 7: bos, eos" in notes
    assert "one token for each symbol" in (tmp_path / "hf/README.md").read_text()
    if free != 1:  # as many rows as a bundle may have
        converted(tmp_path / "hf", tmp_path / "back", "bundle")
        assert read(tmp_path / "back/tokenizer.json") == {"token_kind": "symbols", "vocab_size": 7, "symbols": WORDS}


@pytest.mark.parametrize(
    ("words", "roles", "ids", "said"),
    [
        (
            ["a", "<pad>", "b c", "<|endoftext|>"],
            ["<|endoftext|>"] * 3 + ["<pad>"],
            [3, 3, 1],
            "<|endoftext|> (row 3: bos, eos, unk), <pad> (row 1: pad); a character outside the vocabulary is unk",
        ),
        (
            ["a", "<pad>"],
            [None, None, None, "<pad>"],
            [None, None, 1],
            "<pad> (row 1: pad); a character outside the vocabulary is an error",
        ),
    ],
)
def test_a_symbol_that_is_spelled_as_a_special_token_is_that_token(words, roles, ids, said, tmp_path):
    facts = converted(bundle_with(tmp_path, {"vocab_size": len(words), "itos": words}), tmp_path / "hf", "hf")
    definition, settings = read(tmp_path / "hf/tokenizer.json"), read(tmp_path / "hf/tokenizer_config.json")
    assert list(definition["model"]["vocab"]) == words and definition["added_tokens"] == []
    assert [settings.get(role) for role in ROLES] == roles
    config = read(tmp_path / "hf/config.json")
    assert [config.get(f"{role}_token_id") for role in ("bos", "eos", "pad")] == ids
    assert f"special tokens, which are symbols of its own: {said}" in facts["notes"]


@pytest.mark.parametrize(("words", "said"), [(["\ud800", "a"], r"chars\[0\]"), (["a", "b\udfff"], r"symbols\[1\]")])
def test_half_of_a_surrogate_pair_is_refused_before_anything_is_written(words, said, tmp_path):
    bundle = bundle_with(tmp_path, {"vocab_size": 2, "itos": words})
    with pytest.raises(CheckpointError, match=f"{said} of its tokenizer is .*half of a surrogate pair"):
        converted(bundle, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("end", "rows"), [(3, 4), (4, 4)])
def test_the_end_of_text_of_anothers_tokenizer_ends_texts_if_the_model_has_its_row(end, rows, tmp_path):
    bundle, _ = bundle_of(tmp_path, rows)
    definition = definition_of(["a", "b", "c"], ["<|endoftext|>"])
    definition["pre_tokenizer"] = None  # somebody else's
    definition["added_tokens"][0]["id"] = definition["model"]["vocab"]["<|endoftext|>"] = end
    (bundle / "tokenizer.json").write_text(json.dumps({"token_kind": "hf", "definition": definition}))
    converted(bundle, tmp_path / "hf", "hf")
    assert read(tmp_path / "hf/tokenizer.json") == definition
    eos = read(tmp_path / "hf/tokenizer_config.json").get("eos_token")
    expected = (3, "<|endoftext|>") if end < rows else (None, None)
    assert (read(tmp_path / "hf/config.json")["eos_token_id"], eos) == expected


def test_what_lies_beside_the_weights_or_in_their_config_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_tokenizer, "local_ranks", lambda _: {bytes([byte]): byte for byte in range(256)})
    converted(file_of(tmp_path / "ckpt.pt", 50257), tmp_path / "hf", "hf")
    (tmp_path / "hf/tokenizer.json").unlink()
    (tmp_path / "hf/tokenizer_config.json").write_text('{"eos_token": "!"}')
    config = read(tmp_path / "hf/config.json") | {"eos_token_id": 0}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    converted(tmp_path / "hf", tmp_path / "again", "hf")
    assert read(tmp_path / "again/tokenizer_config.json") == {"eos_token": "!"}
    assert len(read(tmp_path / "again/tokenizer.json")["model"]["vocab"]) == 257
    assert [read(tmp_path / "again/config.json")[name] for name in ("eos_token_id", "bos_token_id")] == [0, 50256]


@pytest.mark.parametrize("added", [5, None, [7], [{"id": "x", "content": "<|endoftext|>", "special": True}]])
def test_damaged_additions_to_a_tokenizer_count_for_nothing(added):
    definition = {"added_tokens": added, "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "merges": []}}
    state = _state_of(definition)
    assert state == {"token_kind": "hf", "definition": definition} and tokens_of(state) == 2


ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@pytest.mark.parametrize(
    ("free", "ids"),
    [(0, None), (1, (0, 0, 0, 0)), (2, (0, 0, 1, 0)), (3, (0, 0, 1, 2)), (11, (0, 0, 1, 2))],
)
def test_special_tokens_of_characters_are_on_rows_that_no_character_has(free, ids, tmp_path):
    bundle, chars = bundle_of(tmp_path, 13)
    rows = 13 + free
    facts = converted(bundle, tmp_path / "hf", "hf", vocab_size=rows)
    vocab = read(tmp_path / "hf/tokenizer.json")["model"]["vocab"]
    settings, config = read(tmp_path / "hf/tokenizer_config.json"), read(tmp_path / "hf/config.json")
    assert list(vocab)[:13] == chars and len(vocab) == 13 + min(free, 3)
    assert tensors_of(tmp_path / "hf")["transformer.wte.weight"][1] == (rows, 8)
    notes = " ".join(facts["notes"])
    if ids is None:
        assert not settings.keys() & set(ROLES) and config["eos_token_id"] is None
        assert "no bos, eos, pad and unk token" in notes and "--vocab_size 16 adds" in notes
    else:
        assert tuple(vocab[settings[role]] - 13 for role in ROLES) == ids
        assert (config["bos_token_id"], config["pad_token_id"]) == (13, 13 + ids[3])
        assert f"<|endoftext|> (row 13: {'bos, eos' if free > 2 else 'bos, eos, '}" in notes
        assert read(tmp_path / "hf/generation_config.json")["suppress_tokens"] == list(range(13, rows))
    if free in (1, 2):
        with pytest.raises(CheckpointError, match=f"{rows} rows for 13 characters.* --vocab_size 13 crops them"):
            converted(tmp_path / "hf", tmp_path / "back", "bundle")
    else:  # as many rows as a bundle of characters may have
        converted(tmp_path / "hf", tmp_path / "back", "bundle")
        assert read(tmp_path / "back/tokenizer.json") == {"token_kind": "char", "chars": chars}


@pytest.mark.full
@pytest.mark.parametrize("free", [0, 1, 3])
def test_transformers_opens_a_tokenizer_of_characters(free, tmp_path):
    from transformers import AutoTokenizer, pipeline

    bundle, chars = bundle_of(tmp_path, 13)
    converted(bundle, tmp_path / "hf", "hf", vocab_size=13 + free)
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path / "hf"), "".join(reversed(chars))
    ids = tokenizer(text)["input_ids"]
    assert ids == list(range(12, -1, -1)) and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 13 + free
    (made,) = pipeline("text-generation", model=str(tmp_path / "hf"))("012", max_new_tokens=8)
    assert len(made["generated_text"]) == 11 and set(made["generated_text"]) <= set(chars)
    if not free:
        assert tokenizer.unk_token is tokenizer.eos_token is tokenizer.pad_token is None
        with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
            tokenizer("\u4e2d")
        return
    assert tokenizer("0\u4e2d")["input_ids"] == [0, tokenizer.unk_token_id]
    assert tokenizer(["0", "01"], padding=True)["input_ids"] == [[0, tokenizer.pad_token_id], [0, 1]]
    assert tokenizer.decode(tokenizer.eos_token_id) == "<|endoftext|>"


@pytest.mark.full
@pytest.mark.parametrize("meta", [META, {"vocab_size": 7}, {"vocab_size": 3, "itos": ["", "a\u0308", "a"]}])
def test_transformers_encodes_and_joins_symbols_as_here(meta, tmp_path):
    from transformers import AutoTokenizer, pipeline

    from core.data.tokenizer import tokenizer_from_state

    bundle = bundle_with(tmp_path, meta)
    size, ours = meta["vocab_size"], tokenizer_from_state(read(bundle / "tokenizer.json"))
    for rows in (size, size + 3):
        converted(bundle, tmp_path / f"hf{rows}", "hf", vocab_size=rows)
    tokenizer, padded = (AutoTokenizer.from_pretrained(tmp_path / f"hf{rows}") for rows in (size, size + 3))
    known = [text for text in meta.get("itos", ()) if len(text) == 1]
    texts = st.text(known) if known else st.just("")

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(0, size - 1)), texts, st.characters(categories=["L"]))
    def check(ids: list[int], text: str, other: str) -> None:
        assert tokenizer.decode(ids) == padded.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        assert tokenizer(text)["input_ids"] == padded(text)["input_ids"] == ours.encode(text).tolist()
        if other not in known:
            assert padded(text + other)["input_ids"] == [*ours.encode(text).tolist(), padded.unk_token_id]

    check()
    if known:
        (made,) = pipeline("text-generation", model=str(tmp_path / f"hf{size + 3}"))(known[0], max_new_tokens=8)
        assert made["generated_text"].startswith(known[0])


@pytest.mark.full
def test_transformers_gives_texts_the_ids_of_tiktoken(tmp_path, shared):
    from transformers import AutoTokenizer

    from core.data.tokenizer import Gpt2Tokenizer

    ours = Gpt2Tokenizer(shared / "data/gpt2.tiktoken")
    converted(file_of(tmp_path / "ckpt.pt", 50304), tmp_path / "hf", "hf", bpe_file=shared / "data/gpt2.tiktoken")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    code_points = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x20000))))
    for text in ("Hello world", "  it's \n\n\t 3.14 ", (ROOT / "docs/convert.md").read_text(), code_points):
        ids = tokenizer(text)["input_ids"]
        assert ids == ours.encoding.encode(text, allowed_special="all") and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 50256 and len(tokenizer) == 50257

    assert tokenizer.decode(ours.end_of_text) == "<|endoftext|>"

    pieces = st.sampled_from(["<|endoftext|>", " ", "\n", "'s", "'LL", " the", "\u00a0", "\u3000", "e\u0301", "\0"])

    @settings(max_examples=1000, deadline=None)
    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | pieces).map("".join))
    def check(text: str) -> None:
        ids = tokenizer(text)["input_ids"]
        assert ids == ours.encoding.encode(text, allowed_special="all") and tokenizer.decode(ids) == text

    check()


@pytest.mark.full
def test_transformers_writes_text_from_a_model_of_gpt2s_tokens(tmp_path, shared):
    from transformers import pipeline

    converted(file_of(tmp_path / "ckpt.pt", 50304), tmp_path / "hf", "hf", bpe_file=shared / "data/gpt2.tiktoken")
    writer = pipeline("text-generation", model=str(tmp_path / "hf"))
    (made,) = writer("Hello world", max_new_tokens=8, do_sample=False)
    assert made["generated_text"].startswith("Hello world") and writer.model.generation_config.eos_token_id == 50256


@pytest.mark.full
def test_gpt2s_tokenizer_takes_less_than_two_seconds_of_a_processor(shared):
    begun = time.process_time()
    json.dumps(gpt2_definition(ranks.read_ranks(shared / "data/gpt2.tiktoken")))
    assert time.process_time() - begun < 2
