"""Text to ids and back; what tokenizer.json says; where GPT-2's ranks are found."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.bundle.tokenizer_state import describe, same_vocabulary
from core.data import gpt2_ranks as ranks
from core.data.tokenizer import (
    CharTokenizer,
    Gpt2Tokenizer,
    HfTokenizer,
    make_char,
    tokenizer_from_file,
    tokenizer_from_state,
)
from core.errors import CheckpointMismatch, InputError

HF = pytest.param("hf", marks=pytest.mark.full)
GREEK = "Ἐν ἀρχῇ ἦν ὁ λόγος 🙂\r\n"


@pytest.fixture
def bpe_file(shared) -> Path:
    return shared / "data" / "gpt2.tiktoken"


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without ranks: an empty cache, an empty data folder, and an address where nobody answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ranks, "BESIDE", tmp_path / "data" / "gpt2.tiktoken")
    monkeypatch.setattr(ranks, "URL", f"http://127.0.0.1:{port}/r50k_base.tiktoken")
    monkeypatch.delenv("http_proxy", raising=False)
    return tmp_path


def hf_definition() -> dict:
    """A tokenizer that the library has trained."""
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(["the cat and the dog and the sea"] * 20, trainer)
    return json.loads(library.to_str())


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_char_round_trip(text):
    tokenizer = make_char([text])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chars == sorted(set(text))


@given(st.text(min_size=1))
def test_char_ids_are_positions_in_chars(text):
    chars = sorted(set(text), reverse=True)
    tokenizer = CharTokenizer(chars)
    assert tokenizer.encode(text).tolist() == [chars.index(c) for c in text]


def test_char_vocabulary_above_uint16_has_wide_ids():
    chars = [chr(c) for c in range(0x20, 0x20 + 70_000 + 2048) if not 0xD800 <= c < 0xE000]
    tokenizer = CharTokenizer(chars)
    assert tokenizer.encode(chars[-1]).dtype == np.uint32
    assert tokenizer.encode(chars[-1]).tolist() == [len(chars) - 1]


def test_unknown_character_is_shown_with_its_place():
    tokenizer = make_char(["abc\n"])
    with pytest.raises(InputError) as caught:
        tokenizer.encode("ab\nabécé", where="poem.txt")
    message = str(caught.value)
    assert message.startswith("poem.txt: 'é' (U+00E9) at position 5 (line 2, column 3)")
    assert "--unknown skip" in message


@pytest.mark.parametrize("strange", ["z", "🙂", "\ud800", "\x00"])
def test_unknown_character_is_dropped_on_request(strange):
    tokenizer = make_char(["abc"])
    assert tokenizer.decode(tokenizer.encode(f"a{strange}b{strange}", unknown="skip")) == "ab"
    with pytest.raises(InputError, match=r"position 1 "):
        tokenizer.encode(f"a{strange}b")


def test_empty_text_has_no_ids_and_makes_no_vocabulary():
    assert make_char(["ab"]).encode("").tolist() == []
    with pytest.raises(InputError, match="empty"):
        make_char([])


def test_old_char_state_opens_and_gets_a_fingerprint(shared):
    state = json.loads((shared / "fixtures/lecture_char/bundle/tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = tokenizer_from_state(state)
    assert tokenizer.vocab_size == len(state["chars"])
    assert tokenizer.state() == {**state, "fingerprint": tokenizer.fingerprint}
    assert tokenizer_from_state(tokenizer.state()).state() == tokenizer.state()


QWEN = {"token_kind": "tiktoken", "vocabulary": "qwen"}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({}, "token_kind is None, expected char, gpt2 or hf"),
        ({"token_kind": "bpe"}, "token_kind is 'bpe'"),
        ({"token_kind": ["char"]}, r"token_kind is \['char'\]"),
        ({"token_kind": "char"}, "chars is 'None', expected a list"),
        ({"token_kind": "char", "chars": []}, r"chars is '\[\]'"),
        ({"token_kind": "char", "chars": ["a", "bc"]}, r"chars\[1\] is 'bc', expected one character"),
        ({"token_kind": "char", "chars": ["a", 7]}, r"chars\[1\] is 7"),
        ({"token_kind": "char", "chars": ["a", "b", "a"]}, r"chars\[2\] is 'a', which is chars\[0\] too"),
        ({"token_kind": "char", "chars": ["a"], "fingerprint": "f" * 64}, "recorded is ffffffffffff"),
        ({"token_kind": "gpt2", "fingerprint": "0" * 64}, "306cd27f03c1, recorded is 000000000000"),
        ({"token_kind": "hf", "definition": "x"}, "definition is str"),
        ({"token_kind": "tiktoken"}, "vocabulary is 'None', expected llama3, qwen"),
        ({"token_kind": "tiktoken", "vocabulary": "qwen"}, "ranks is None, expected a list of tokens in base64"),
        (
            {"token_kind": "tiktoken", "vocabulary": "qwen", "ranks": ["IQ==", "?"]},
            r"ranks\[1\] is '\?', expected base64",
        ),
        (
            {"token_kind": "tiktoken", "vocabulary": "qwen", "ranks": ["IQ=="] * 2},
            "ranks has 1 tokens, expected 151,643",
        ),
    ],
)
def test_contradictory_state_is_refused(state, expected):
    with pytest.raises(CheckpointMismatch, match=expected) as caught:
        tokenizer_from_state(state, where="m/tokenizer.json")
    assert str(caught.value).startswith("m/tokenizer.json: ")


def test_same_vocabulary_compares_meaning_not_fields():
    char = make_char(["abc"])
    assert same_vocabulary(char.state(), {"token_kind": "char", "chars": ["a", "b", "c"]})
    assert not same_vocabulary(char.state(), {"token_kind": "char", "chars": ["a", "c", "b"]})
    assert not same_vocabulary(char.state(), {"token_kind": "gpt2"})
    assert same_vocabulary({"token_kind": "gpt2"}, Gpt2Tokenizer().state())


def test_describe_names_kind_size_and_fingerprint():
    char = make_char(["abc"])
    assert describe(char.state()) == f"char, 3 characters, fingerprint {char.fingerprint[:12]}"
    assert describe({"token_kind": "gpt2"}) == "gpt2"


def test_id_outside_the_vocabulary_is_named():
    with pytest.raises(InputError, match="token id 3 is not in the char vocabulary of 3 ids"):
        make_char(["abc"]).decode([0, 3])
    with pytest.raises(InputError, match="token id -1"):
        make_char(["abc"]).decode([-1])


def test_gpt2_ids_are_those_of_tiktoken(bpe_file, shared):
    import tiktoken
    from tiktoken_ext import openai_public as public

    reference = tiktoken.Encoding(
        "reference",
        pat_str=public.r50k_pat_str,
        mergeable_ranks=ranks.read_ranks(bpe_file),
        special_tokens={"<|endoftext|>": 50256},
    )
    text = (
        (shared / "data/dante.txt").read_text(encoding="utf-8")[:200_000] + GREEK + "it's we'll  \n\n  x <|endoftext|>"
    )
    tokenizer = Gpt2Tokenizer(bpe_file)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == reference.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_gpt2_padding_rows_are_not_ids(bpe_file):
    with pytest.raises(InputError, match="token id 50257"):
        Gpt2Tokenizer(bpe_file).decode([50257])


def test_gpt2_survives_half_a_character_from_a_command_line(bpe_file):
    tokenizer = Gpt2Tokenizer(bpe_file)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_gpt2_state_needs_no_ranks(nowhere):
    assert Gpt2Tokenizer().state() == {"token_kind": "gpt2", "fingerprint": ranks.FINGERPRINT}
    assert tokenizer_from_state({"token_kind": "gpt2"}).vocab_size == 50257


def test_gpt2_without_ranks_names_all_three_places_in_one_line(nowhere):
    with pytest.raises(InputError) as caught:
        Gpt2Tokenizer().encode("a")
    message = str(caught.value)
    assert "\n" not in message
    for place in ("--bpe_file", str(nowhere / "data" / "gpt2.tiktoken"), str(nowhere / "cache")):
        assert place in message


def test_gpt2_server_that_never_answers_is_left(nowhere, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(ranks, "URL", f"http://127.0.0.1:{silent.getsockname()[1]}/x")
        monkeypatch.setattr(ranks, "PATIENCE", 0.3)
        with pytest.raises(InputError, match=r"no answer within 0\.3 seconds|timed out"):
            ranks.find_ranks()


@pytest.fixture
def served(nowhere, monkeypatch):
    """An HTTP server whose files are those of a folder."""
    folder = nowhere / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(ranks, "URL", f"http://127.0.0.1:{server.server_port}/r50k_base.tiktoken")
        yield folder / "r50k_base.tiktoken"
        server.shutdown()
        thread.join()


def test_gpt2_download_is_kept_in_tiktokens_cache(served, nowhere, bpe_file):
    served.write_bytes(bpe_file.read_bytes())
    assert Gpt2Tokenizer().encode("Hello world").tolist() == [15496, 995]
    kept = nowhere / "cache" / hashlib.sha1(ranks.URL.encode()).hexdigest()
    assert kept.read_bytes() == bpe_file.read_bytes()
    served.unlink()
    assert len(ranks.find_ranks()) == 50256


def test_gpt2_download_of_other_bytes_is_refused(served, nowhere):
    served.write_bytes(b"<html>please log in</html>")
    with pytest.raises(InputError, match="other bytes than expected"):
        ranks.find_ranks()
    assert not (nowhere / "cache").exists()


def test_gpt2_damaged_cache_is_passed_over(nowhere, bpe_file):
    cached = nowhere / "cache" / hashlib.sha1(ranks.URL.encode()).hexdigest()
    cached.parent.mkdir()
    cached.write_bytes(bpe_file.read_bytes()[:1000])
    with pytest.raises(InputError, match="not in any of the three places"):
        ranks.find_ranks()
    cached.write_bytes(bpe_file.read_bytes())
    assert len(ranks.find_ranks()) == 50256


def test_gpt2_ranks_in_openais_first_format(nowhere, bpe_file, monkeypatch):
    printable = {byte: char for char, byte in ranks.printable_bytes().items()}
    found = ranks.read_ranks(bpe_file)
    entries = {"".join(printable[b] for b in token): rank for token, rank in found.items()} | {"<|endoftext|>": 50256}
    cached = nowhere / "cache" / hashlib.sha1(ranks.OLD_URL.encode()).hexdigest()
    cached.parent.mkdir()
    cached.write_text(json.dumps(entries), encoding="utf-8")
    assert ranks.find_ranks() == found


def test_gpt2_file_beside_the_program_is_found_and_the_named_one_wins(nowhere, bpe_file):
    ranks.BESIDE.parent.mkdir()
    ranks.BESIDE.write_bytes(bpe_file.read_bytes())
    assert len(ranks.find_ranks()) == 50256
    with pytest.raises(InputError, match=r"missing\.tiktoken: No such file"):
        ranks.find_ranks(nowhere / "missing.tiktoken")


def test_gpt2_ranks_that_were_given_are_kept_beside_the_program_in_one_form(nowhere, bpe_file, tmp_path):
    windows = tmp_path / "windows.tiktoken"
    windows.write_bytes(bpe_file.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "other").write_bytes(bpe_file.read_bytes()[:-20])
    for named in (None, tmp_path / "missing", tmp_path / "other"):
        ranks.keep_given(named)
        assert not ranks.BESIDE.exists()
    ranks.keep_given(windows)
    assert ranks.BESIDE.read_bytes() == bpe_file.read_bytes() and len(ranks.find_ranks()) == 50256
    ranks.BESIDE.write_bytes(b"mine")
    ranks.keep_given(windows)
    assert ranks.BESIDE.read_bytes() == b"mine", "what is there already is the user's"


def test_gpt2_ranks_with_other_line_ends_are_the_same_ranks(tmp_path, bpe_file):
    path = tmp_path / "windows.tiktoken"
    path.write_bytes(bpe_file.read_bytes().replace(b"\n", b"\r\n"))
    assert ranks.read_ranks(path) == ranks.read_ranks(bpe_file)


def _swap_two(lines):
    lines[1000], lines[1001] = lines[1001].split()[0] + b" 1000", lines[1000].split()[0] + b" 1001"


def _lose_a_byte(lines):
    lines[0] = base64.b64encode(b"\xff\xfe\xfd\xfc") + b" 0"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda lines: lines.pop(), "50,255 ranks, expected GPT-2's 50,256"),
        (lambda lines: lines.append(b"IGRvZ3M= 50256"), "ranks, expected GPT-2's 50,256"),
        (lambda lines: lines.__setitem__(4, b"hello"), "line 5 is b'hello', expected a token in base64"),
        (lambda lines: lines.__setitem__(4, b"\xff\xff 4"), "line 5"),
        (_lose_a_byte, "no rank for byte 0x21"),
        (_swap_two, r"not GPT-2's \(fingerprint [0-9a-f]{12}, expected 306cd27f03c1\)"),
    ],
)
def test_gpt2_wrong_rank_file_is_refused_before_use(tmp_path, bpe_file, damage, expected):
    lines = bpe_file.read_bytes().splitlines()
    damage(lines)
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(InputError, match=expected) as caught:
        Gpt2Tokenizer(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.full
def test_hf_definition_travels_in_the_state(tmp_path):
    path = tmp_path / "custom.json"
    path.write_text(json.dumps(hf_definition()), encoding="utf-8")
    tokenizer = tokenizer_from_file(path)
    text = "the cat and the dog " + GREEK
    ids = tokenizer.encode(text)
    again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
    assert again.encode(text).tolist() == ids.tolist()
    assert again.decode(ids) == text
    assert again.fingerprint == tokenizer.fingerprint
    assert describe(again.state()) == f"hf, fingerprint {tokenizer.fingerprint[:12]}"
    assert int(ids.max()) < tokenizer.vocab_size


@pytest.mark.full
def test_hf_changed_definition_is_noticed():
    state = HfTokenizer(hf_definition()).state()
    state["definition"]["model"]["vocab"]["zzz"] = 299
    with pytest.raises(CheckpointMismatch, match="fingerprint"):
        tokenizer_from_state(state)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON list"),
        pytest.param('{"a": 1}', "not a Hugging Face tokenizer", marks=pytest.mark.full),
    ],
)
def test_file_that_is_no_tokenizer_is_refused(tmp_path, content, expected):
    path = tmp_path / "t.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=expected):
        tokenizer_from_file(path)


def test_word_that_is_no_tokenization_is_refused():
    with pytest.raises(InputError, match="takes char, gpt2 or a tokenizer's JSON file"):
        tokenizer_from_file(Path("cahr"))


def test_file_may_be_the_tokenizer_of_a_checkpoint(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(make_char(["abc"]).state()), encoding="utf-8")
    assert tokenizer_from_file(path).state() == make_char(["abc"]).state()


@pytest.mark.parametrize("kind", ["char", "gpt2", HF])
def test_stream_shows_whole_characters_and_all_of_them(kind, request):
    text = "the cat " + GREEK + "日本語 end"
    if kind == "char":
        tokenizer = make_char([text])
    elif kind == "gpt2":
        tokenizer = Gpt2Tokenizer(request.getfixturevalue("bpe_file"))
    else:
        tokenizer = HfTokenizer(hf_definition())
    stream = tokenizer.stream()
    shown = [stream.push(int(i)) for i in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) + stream.flush() == text


@pytest.mark.parametrize("kind", ["gpt2", HF])
def test_stream_that_ends_inside_a_character_says_so_at_the_end(kind, request):
    tokenizer = Gpt2Tokenizer(request.getfixturevalue("bpe_file")) if kind == "gpt2" else HfTokenizer(hf_definition())
    ids = tokenizer.encode("a🙂").tolist()[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) == "a"
    assert stream.flush() == tokenizer.decode(ids)[1:]
