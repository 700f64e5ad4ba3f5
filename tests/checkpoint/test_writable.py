"""What a save has to write is checked before training: halves of characters round-trip, numbers have to be finite."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.checkpoint import CheckpointManager
from core.containers.json_files import dump_json, parse_json
from core.data.tokenizer import CharTokenizer, tokenizer_from_state
from core.errors import CheckpointMismatch, InputError
from tests.conftest import ROOT
from tests.makers.conversions import converted
from tests.makers.models import manager, save_steps, tokenizer


@pytest.fixture
def nanogpt(shared) -> Path:
    """A checkpoint of nanoGPT, with its characters."""
    return shared / "fixtures" / "nanogpt_char_biasFalse"


TEXTS = st.text(st.characters(exclude_categories=()) | st.characters(categories=["Cs"]))


@given(st.dictionaries(TEXTS, TEXTS | st.lists(TEXTS)))
def test_any_text_is_written_as_json_and_read_back_or_refused(values):
    try:
        written = dump_json(values)
    except InputError as error:
        assert json.loads(json.dumps(values)) != values and "It is written as JSON." in str(error)
        return
    assert parse_json(written, "x") == values


def test_a_text_without_halves_is_written_as_it_was():
    values = {"chars": ["é", "😀", "\n"], "n": 1.5}
    assert dump_json(values) == (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"a": {"b": [1, math.nan]}}, "a.b.1 is nan, expected a finite number"),
        ({"a": -math.inf}, "a is -inf, expected a finite number"),
        ({"path": Path("x")}, "path is a PosixPath, which is not JSON serializable"),
        ({"a": "\ud83d\ude00"}, "has the two halves of one character as two characters"),
    ],
)
def test_what_json_cannot_hold_is_named(tmp_path, values, said):
    with pytest.raises(InputError) as caught:
        dump_json(values)
    assert said in str(caught.value)
    with pytest.raises(InputError, match="It is written as JSON"):
        manager(tmp_path).record(facts=values)


def dataset(folder: Path, chars: list[str]) -> Path:
    folder.mkdir()
    for part, count in (("train", 600), ("val", 200)):
        np.random.default_rng(0).integers(0, len(chars), count).astype("<u2").tofile(folder / f"{part}.bin")
    tables = {"itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars), **tables}))
    return folder


def test_a_vocabulary_with_half_of_a_pair_trains_and_is_saved_as_it_is(tmp_path):
    chars = ["\udce9", "a", "\ud83d", "\n"]
    data = dataset(tmp_path / "data", chars)
    sizes = ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "8", "--batch_size", "2"]
    flags = ["--checkpoint_root", tmp_path, "--model_name", "a", "--max_iters", "1", "--eval_iters", "1", *sizes]
    command = [sys.executable, ROOT / "train.py", *flags, "--dataset_dir", data]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    state = parse_json((tmp_path / "a" / "tokenizer.json").read_bytes(), "tokenizer.json")
    assert state["chars"] == chars and tokenizer_from_state(state).fingerprint == CharTokenizer(chars).fingerprint
    with CheckpointManager("a", tmp_path) as manager:
        model, _, step = manager.initialize_for_training({}, CharTokenizer(chars), None, 1e-3)
    assert step == 1 and model.tokenizer.state()["chars"] == chars


def test_a_vocabulary_with_half_of_a_pair_goes_to_our_bundle_and_not_to_hugging_face(nanogpt, tmp_path):
    meta = pickle.loads((nanogpt / "meta.pkl").read_bytes())
    chars = ["\udce9", *[meta["itos"][k] for k in range(1, len(meta["itos"]))]]
    tables = {"itos": dict(enumerate(chars)), "stoi": {c: k for k, c in enumerate(chars)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({**meta, **tables}))
    converted(nanogpt / "ckpt.pt", tmp_path / "b", "bundle", meta=tmp_path / "meta.pkl")
    assert parse_json((tmp_path / "b" / "tokenizer.json").read_bytes(), "b")["chars"] == chars
    with pytest.raises(CheckpointMismatch, match=r"chars\[0\] of its tokenizer is '\\udce9', half of a surrogate pair"):
        converted(nanogpt / "ckpt.pt", tmp_path / "hf", "hf", meta=tmp_path / "meta.pkl")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("note", math.nan, "note is nan, expected"),
        ("limits", {"high": [0, math.inf]}, "limits.high.1 is inf, expected"),
    ],
)
def test_a_config_that_no_save_could_write_is_refused_before_training(tmp_path, name, value, said):
    save_steps(tmp_path, 1)
    path = tmp_path / "dante" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with manager(tmp_path) as made, pytest.raises(InputError) as caught:
        made.initialize_for_training({}, tokenizer(), None, 1e-3)
    assert str(caught.value) == (
        f"{path}: {said} a finite number. It is written as JSON. Correct it; nothing was trained."
    )
