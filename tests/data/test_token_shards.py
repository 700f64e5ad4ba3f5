"""Folders of prepared tokens: our own, nanoGPT's and modded-nanogpt's."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from core.data.corpus import find_source, open_corpus, prepare
from core.data.token_shards import open_dataset, read_shard
from core.data.tokenizer import Gpt2Tokenizer, make_char
from core.errors import CheckpointDamaged, CheckpointMismatch, InputError
from tests.makers.datasets import ids, shard
from tests.makers.doors import Shell


class TestDataset:
    def test_nanogpt_folder_with_characters(self, home, shared):
        Path("set").mkdir()
        shutil.copy(shared / "fixtures/nanogpt_char_biasFalse/meta.pkl", "set/meta.pkl")
        np.arange(30, dtype="<u2").tofile("set/train.bin")
        np.arange(5, dtype="<u2").tofile("set/val.bin")
        opened = open_corpus(find_source(None, "set", None, "m"))
        assert ids(opened.train) == list(range(30))
        assert ids(opened.val) == list(range(5))
        assert opened.tokenizer.vocab_size == 34
        assert opened.tokenizer.decode([0, 1, 4, 33]) == "\n Aï"
        assert opened.notes == ()

    @pytest.mark.parametrize(
        ("meta", "error", "expected"),
        [
            ({"itos": {0: "a", 2: "b"}}, InputError, "no table `itos`"),
            ({"itos": {0: "a"}, "vocab_size": 2}, InputError, "vocab_size is 2, but itos has 1"),
            ({"itos": {0: 7}}, InputError, "expected a text for each id, each once"),
            ({"itos": ["a", "a"]}, InputError, "expected a text for each id, each once"),
            ({"itos": ["a", "bc"], "stoi": {"a": 1, "bc": 0}}, InputError, "its stoi is not the inverse of its itos"),
            ({"vocab_size": 0}, InputError, "no table `itos`"),
            ([1], InputError, "no table `itos`"),
            ({"itos": Shell("trapped"), "stoi": {}, "vocab_size": 3}, InputError, "no table `itos`"),
            (None, CheckpointDamaged, r"meta\.pkl"),
        ],
    )
    def test_meta_pickle_that_is_no_vocabulary_is_refused(self, home, meta, error, expected):
        Path("set").mkdir()
        np.arange(30, dtype="<u2").tofile("set/train.bin")
        Path("set/meta.pkl").write_bytes(pickle.dumps(meta) if meta is not None else b"\x80\x04]")
        with pytest.raises(error, match=expected):
            open_corpus(find_source(None, "set", None, "m"))
        assert not Path("trapped").exists()

    def test_modded_shards_are_gpt2_and_keep_their_order(self, home):
        Path("set").mkdir()
        shard(Path("set/fineweb_train_000002.bin"), [7, 8])
        shard(Path("set/fineweb_train_000001.bin"), [5, 6])
        shard(Path("set/fineweb_val_000000.bin"), [9])
        opened = open_corpus(find_source(None, "set", None, "m"))
        assert opened.tokenizer.kind == "gpt2"
        assert ids(opened.train) == [5, 6, 7, 8]
        assert ids(opened.val) == [9]

    def test_without_validation_shards_the_last_tokens_are_used_and_it_is_said(self, home):
        Path("set").mkdir()
        for index in range(3):
            shard(Path(f"set/train_{index}.bin"), range(index * 10, index * 10 + 10))
        opened = open_corpus(find_source(None, "set", None, "m"), val_fraction=0.5)
        assert ids(opened.train) == list(range(15))
        assert ids(opened.val) == list(range(15, 30))
        assert opened.notes == ("set: no validation shards; the last 15 tokens are used for it.",)

    def test_wide_shards_need_a_named_tokenizer(self, home):
        Path("set").mkdir()
        shard(Path("set/train.bin"), [100_000], header=(20240801, 7), dtype="<u4")
        assert read_shard(Path("set/train.bin")).tolist() == [100_000]
        with pytest.raises(InputError, match=r"set: uint32 tokens.*--tokenization"):
            open_corpus(find_source(None, "set", None, "m"))

    @pytest.mark.parametrize("count", [9, 11, -1, 2**31 - 1])
    def test_header_that_contradicts_the_file_is_named_with_both_sizes(self, home, count):
        path = shard(Path("t.bin"), range(10), count=count)
        with pytest.raises(InputError) as caught:
            read_shard(path)
        expected = f"expected {1024 + 2 * count:,} for the {count:,} tokens of its header"
        assert str(caught.value).startswith(f"t.bin: found 1,044 bytes, {expected}")

    def test_odd_and_future_shards_are_refused(self, home):
        Path("odd.bin").write_bytes(b"123")
        with pytest.raises(InputError, match=r"odd\.bin: found 3 bytes, expected a whole number of uint16"):
            read_shard(Path("odd.bin"))
        with pytest.raises(InputError, match="shard version 2, expected 1"):
            read_shard(shard(Path("new.bin"), [1], header=(20240520, 2)))
        Path("empty.bin").write_bytes(b"")
        assert len(read_shard(Path("empty.bin"))) == 0

    def test_folder_without_shards_says_what_was_looked_for(self, home):
        Path("set").mkdir()
        Path("set/notes.txt").write_text("x")
        with pytest.raises(InputError, match=r"set: no training shards.*dataset\.json.*train\.bin.*found notes\.txt"):
            find_source(None, "set", None, "m")

    def test_tokens_of_another_tokenizer_are_refused_with_both(self, home):
        Path("set").mkdir()
        shard(Path("set/train.bin"), range(50))
        chosen = find_source(None, "set", None, "m")
        mine = make_char(["abc"])
        with pytest.raises(CheckpointMismatch, match=r"taken for gpt2, this run has char, 3 characters"):
            open_corpus(chosen, mine)
        with pytest.raises(InputError, match="taken for gpt2, found --tokenization char"):
            open_corpus(chosen, "char")
        assert open_corpus(chosen, Gpt2Tokenizer()).tokenizer.kind == "gpt2"

    def test_own_dataset_that_lost_tokens_is_refused(self, home):
        Path("a.txt").write_text("some words and more\n" * 100)
        chosen = find_source("a.txt", None, None, "m")
        prepare(chosen, make_char([Path("a.txt").read_text()]), Path("set"))
        shard(Path("set/val_000000.bin"), [1, 2, 3])
        with pytest.raises(InputError, match=r"val_000000\.bin: found 3 tokens, expected 200 as in dataset\.json"):
            open_dataset(Path("set"))
        Path("set/val_000000.bin").unlink()
        with pytest.raises(InputError, match=r"val_000000\.bin: No such file"):
            open_dataset(Path("set"))

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"format_version": 1, "train": 3}', '{"format_version": "x"}']
    )
    def test_broken_dataset_json_is_one_sentence(self, home, content):
        Path("set").mkdir()
        Path("set/dataset.json").write_text(content)
        with pytest.raises(InputError, match=r"set/dataset\.json: not what data/prepare\.py writes"):
            open_dataset(Path("set"))

    def test_dataset_of_the_future_is_refused_with_both_versions(self, home):
        Path("set").mkdir()
        Path("set/dataset.json").write_text('{"format_version": 2}')
        with pytest.raises(InputError, match="format_version 2, this program reads up to 1"):
            open_dataset(Path("set"))

    def test_record_of_a_dataset_sees_other_tokens(self, home):
        Path("data/set").mkdir(parents=True)
        shard(Path("data/set/train.bin"), range(50))
        record = find_source(None, "data/set", None, "m").record()
        assert record["kind"] == "dataset"
        assert record["bytes"] == 1124
        shard(Path("data/set/train.bin"), range(1, 51))
        os.utime("data/set/train.bin", ns=(1, 1))
        assert "not the text" in find_source(None, None, record, "m").changed(record)
