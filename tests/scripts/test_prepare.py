"""`python data/prepare.py`, as it is typed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.data import gpt2_ranks
from core.data.corpus import find_source, open_corpus
from core.data.dataloader import DataLoader
from core.data.token_shards import read_shard
from core.errors import CheckpointError
from data import prepare as script

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "prepare.py"


def prepare(folder: Path, *words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_dataset_opens_and_has_the_tokens_of_the_text(tmp_path, shared):
    path = shared / "data/tinyshakespeare.txt"
    done = prepare(tmp_path, path, "--output_dir", "set", "--shard_tokens", 300_000)
    assert done.returncode == 0, done.stderr
    assert "1,003,854 tokens to train on, 111,540 to validate with, char, 65 characters" in done.stdout
    assert "train.py --dataset_dir set" in done.stdout
    folder = tmp_path / "set"
    assert [len(read_shard(p)) for p in sorted(folder.glob("train*"))] == [300_000, 300_000, 300_000, 103_854]
    opened = open_corpus(find_source(None, folder, None, "m"))
    direct = open_corpus(find_source(path, None, None, "m"))
    assert np.array_equal(np.concatenate(opened.train.arrays), direct.train.arrays[0])
    assert np.array_equal(np.concatenate(opened.val.arrays), direct.val.arrays[0])
    assert opened.tokenizer.state() == direct.tokenizer.state()
    inputs, _ = DataLoader(opened.train, opened.val, block_size=64, batch_size=12, seed=1).batch(0)
    assert inputs.shape == (12, 64)
    manifest = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert manifest["source"]["digest"] == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_gpt2_dataset_is_what_modded_nanogpt_reads_and_the_given_ranks_are_kept(tmp_path, shared, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("Hello world\n" * 100)
    bpe_file, kept = shared / "data/gpt2.tiktoken", tmp_path / "data/gpt2.tiktoken"
    monkeypatch.setattr(gpt2_ranks, "BESIDE", kept)
    words = [tmp_path / "a.txt", "--output_dir", tmp_path / "set", "--tokenization", "gpt2", "--bpe_file", bpe_file]
    assert script.main([str(word) for word in words]) == 0
    assert kept.read_bytes() == bpe_file.read_bytes()
    said = f"GPT-2's ranks are in {kept} from now on; --bpe_file is not needed again\n"
    assert said in capsys.readouterr().err
    assert script.main([str(word) for word in words]) == 0 and said not in capsys.readouterr().err
    assert script.main([str(word) for word in words[:-2]]) == 0, "found where they were kept"
    raw = (tmp_path / "set/train_000000.bin").read_bytes()
    assert np.frombuffer(raw, "<i4", 256).tolist() == [20240520, 1, (len(raw) - 1024) // 2] + [0] * 253
    assert np.frombuffer(raw, "<u2", 3, offset=1024).tolist() == [15496, 995, 198]


def test_same_line_again_is_done_and_another_never_overwrites(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    assert prepare(tmp_path, "a.txt", "--output_dir", "set").returncode == 0
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").iterdir()}
    assert prepare(tmp_path, "a.txt", "--output_dir", "set").returncode == 0
    (tmp_path / "a.txt").write_text("other words\n" * 50)
    other = prepare(tmp_path, "a.txt", "--output_dir", "set")
    assert other.returncode == 1
    assert re.fullmatch(r"error: set: holds another dataset .*nothing was changed\.\n", other.stderr)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").iterdir()} == before


def test_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine").write_text("mine")
    refused = prepare(tmp_path, "a.txt", "--output_dir", "set")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: set: is there already and holds no dataset.json.")
    assert os.listdir(tmp_path / "set") == ["mine"]  # noqa: PTH208
    assert not (tmp_path / "set.partial").exists()


def test_two_runs_at_once_make_one_dataset(tmp_path):
    (tmp_path / "a.txt").write_text("a few words\n" * 1_000_000)
    command = [sys.executable, str(SCRIPT), "a.txt", "--output_dir", "set"]
    children = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert answers[0] == answers[1]
    assert "10,800,000 tokens to train on" in answers[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "set"]


def test_vocabulary_of_a_checkpoint_can_be_used(tmp_path):
    (tmp_path / "t.json").write_text('{"token_kind": "char", "chars": ["b", "a"]}')
    (tmp_path / "a.txt").write_text("abxab" * 20)
    refused = prepare(tmp_path, "a.txt", "--output_dir", "set", "--tokenization", "t.json")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: a.txt: 'x' (U+0078) at position 2 (line 1, column 3)")
    assert not (tmp_path / "set").exists()
    words = ("a.txt", "--output_dir", "set", "--tokenization", "t.json", "--unknown", "skip", "--val_fraction", "0")
    assert prepare(tmp_path, *words).returncode == 0
    assert read_shard(tmp_path / "set/train_000000.bin").tolist() == [1, 0, 1, 0] * 20


BAD = {
    "none.txt --output_dir set": (CheckpointError, "none.txt: not there"),
    "a.txt --output_dir a.txt/set": (CheckpointError, "Not a directory"),
    "a.txt --output_dir set --tokenization gtp2": (CheckpointError, "gtp2: No such file"),
    "a.txt --output_dir set --val_fraction 1": (SystemExit, "found 1, expected a number of at least 0 and below 1"),
    "a.txt --output_dir set --shard_tokens 0": (SystemExit, "found 0, expected a whole number from 1"),
    "a.txt": (SystemExit, "--output_dir"),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence(home, capsys, words):
    (home / "a.txt").write_text("some words\n" * 50)
    error, said = BAD[words]
    with pytest.raises(error) as ended:
        script.main(words.split())
    assert said in f"{ended.value}\n{capsys.readouterr().err}" and "\n" not in str(ended.value)
