"""Which text is used, how it is cut, and that the tokens are the same however much memory there is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data import corpus, text
from core.data.corpus import find_source, open_corpus
from core.data.tokenizer import Gpt2Tokenizer, make_char
from core.errors import InputError, SaveFailed, Unspecified
from tests.makers.datasets import ids, shard


class TestFindSource:
    def test_flag_wins_over_everything(self, home):
        for name in ("flag.txt", "old.txt", "data/dante.txt"):
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text("x")
        found = find_source("flag.txt", None, {"kind": "text", "path": "old.txt"}, "dante")
        assert found.path == Path("flag.txt")
        assert "--input_file" in found.line()

    def test_recorded_wins_over_the_models_name(self, home):
        for name in ("old.txt", "data/dante.txt"):
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text("x")
        recorded = find_source("old.txt", None, None, "dante").record()
        found = find_source(None, None, recorded, "dante")
        assert found.path == Path("old.txt")
        assert "recorded" in found.line()

    def test_text_with_the_models_name_wins_over_the_default(self, home):
        Path("data").mkdir()
        Path("data/dante.txt").write_text("x")
        assert find_source(None, None, None, "dante").path == Path("data/dante.txt")
        assert find_source(None, None, None, "other").path == Path("data/python_reference.txt")

    @pytest.mark.parametrize("record", [None, {}, {"kind": "text"}])
    def test_weights_without_a_recorded_text_never_get_the_default(self, home, record):
        with pytest.raises(Unspecified) as caught:
            find_source(None, None, record, "m", weights=Path("checkpoints/m"))
        said = str(caught.value)
        assert said.startswith("checkpoints/m: the text of its training is not recorded")
        assert "--input_file FILE or --dataset_dir DIR, or put it at data/m.txt." in said and not Path("data").exists()
        Path("data").mkdir()
        Path("data/m.txt").write_text("x")
        assert find_source(None, None, record, "m", weights=Path("checkpoints/m")).path == Path("data/m.txt")
        assert find_source("data/m.txt", None, record, "x", weights=Path("checkpoints/x")).path == Path("data/m.txt")

    def test_weights_with_the_default_recorded_get_it_again(self, home):
        record = find_source(None, None, None, "m").record()
        shutil.rmtree("data")
        found = find_source(None, None, record, "m", weights=Path("checkpoints/m"))
        assert found.path == Path("data/python_reference.txt") and found.changed(record) is None

    def test_default_is_written_once_and_then_used_as_it_is(self, home):
        found = find_source(None, None, None, "default")
        assert found.path.stat().st_size > 300_000
        assert "assert_stmt" in found.path.read_text(encoding="utf-8")
        assert os.listdir("data") == ["python_reference.txt"]  # noqa: PTH208
        found.path.write_text("mine now")
        assert find_source(None, None, None, "default").path.read_text() == "mine now"
        assert "data/default.txt" in found.line()
        assert "--input_file" in found.line()

    def test_default_that_was_recorded_and_removed_is_written_again(self, home):
        record = find_source(None, None, None, "m").record()
        shutil.rmtree("data")
        again = find_source(None, None, record, "m")
        assert again.path == Path("data/python_reference.txt")
        assert again.changed(record) is None

    def test_python_without_the_default_text_gets_one_sentence(self, home, monkeypatch):
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(InputError, match="does not carry the default text") as caught:
            find_source(None, None, None, "m")
        assert "--input_file" in str(caught.value)

    def test_folder_that_cannot_be_written_gets_one_sentence(self, home):
        Path("data").write_text("a file")
        with pytest.raises(SaveFailed, match="the default text cannot be written"):
            find_source(None, None, None, "m")

    def test_recorded_text_that_is_gone_says_what_to_pass(self, home):
        with pytest.raises(InputError, match=r"old\.txt: not there any more.*--input_file"):
            find_source(None, None, {"kind": "text", "path": "old.txt"}, "m")
        with pytest.raises(InputError, match=r"tokens: not there any more.*--dataset_dir"):
            find_source(None, None, {"kind": "dataset", "path": "tokens"}, "m")

    def test_wrong_flags_are_named(self, home):
        Path("tokens").mkdir()
        shard(Path("tokens/train.bin"), range(9))
        Path("a.txt").write_text("x")
        with pytest.raises(InputError, match="only one can be used"):
            find_source("a.txt", "tokens", None, "m")
        with pytest.raises(InputError, match=r"missing\.txt: not there"):
            find_source("missing.txt", None, None, "m")
        with pytest.raises(InputError, match="--dataset_dir tokens"):
            find_source("tokens", None, None, "m")
        with pytest.raises(InputError, match=r"a\.txt: a file, expected a folder"):
            find_source(None, "a.txt", None, "m")

    def test_folder_without_text_says_what_counts(self, home):
        Path("pictures").mkdir()
        with pytest.raises(InputError, match=r"pictures: no text here.*\.txt, \.md, \.py"):
            open_corpus(find_source("pictures", None, None, "m"))


class TestRecordOfAStranger:
    """What a checkpoint names is followed where a person of this machine could have named it."""

    @pytest.fixture
    def secret(self, home) -> Path:
        (home / "private").mkdir()
        path = home / "private/key.txt"
        path.write_text("do not print me")
        (home / "work/data").mkdir(parents=True)
        os.chdir(home / "work")
        return path

    def record(self, path: Path | str, kind: str = "text", **changes) -> dict:
        return {"kind": kind, "path": str(path), "bytes": 15, "mtime_ns": 1, "digest": "00", **changes}

    @pytest.mark.parametrize("spelled", ["{0}", "../private/key.txt", "data/../../private/key.txt", "data/link.txt"])
    def test_a_text_elsewhere_is_not_read_by_its_name(self, spelled, secret):
        Path("data/link.txt").symlink_to(secret)
        with pytest.raises(InputError, match=r"recorded by the checkpoint, but what it holds is not") as caught:
            find_source(None, None, self.record(spelled.format(secret)), "m")
        assert "--input_file" in str(caught.value) and "print me" not in str(caught.value)

    def test_a_text_elsewhere_with_the_recorded_content_is_followed(self, secret):
        recorded = find_source(secret, None, None, "m").record()
        os.utime(secret, ns=(5, 5))
        assert find_source(None, None, recorded, "m").path == secret
        secret.write_text("DO not print me")
        with pytest.raises(InputError, match=f"name it with --input_file {secret}"):
            find_source(None, None, recorded, "m")

    def test_a_folder_whose_links_lead_elsewhere_is_not_read(self, secret):
        Path("data/books").mkdir()
        Path("data/books/a.txt").symlink_to(secret)
        with pytest.raises(InputError, match=f"leads to {secret}"):
            find_source(None, None, self.record("data/books", "folder"), "m")
        Path("data/books/a.txt").unlink()
        Path("data/own.txt").write_text("mine")
        Path("data/books/a.txt").symlink_to(Path("data/own.txt").absolute())
        assert find_source(None, None, self.record("data/books", "folder"), "m").size == 4

    def test_tokens_whose_links_lead_elsewhere_are_not_read(self, secret):
        Path("data/set").mkdir()
        Path("data/set/train.bin").symlink_to(secret)
        with pytest.raises(InputError, match=r"leads to .*key\.txt\. Name it with --dataset_dir data/set"):
            find_source(None, None, self.record("data/set", "dataset"), "m")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are a thing of POSIX")
    @pytest.mark.parametrize("target", ["pipe", "/dev/zero", "/proc/self/environ"])
    def test_no_regular_file_is_refused_also_in_the_data_folder(self, target, home):
        Path("data").mkdir()
        os.mkfifo("pipe")
        for place in ("data/x.txt", "data/set/train.bin", "data/books/a.txt"):
            Path(place).parent.mkdir(exist_ok=True)
            Path(place).symlink_to(Path(target).absolute())
        for path, kind in {"data/x.txt": "text", "data/set": "dataset", "data/books": "folder"}.items():
            with pytest.raises(InputError, match=r"by the checkpoint|a device or a pipe|makes up|no text here"):
                open_corpus(find_source(None, None, self.record(path, kind), "m"))

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are a thing of POSIX")
    @pytest.mark.parametrize("name", ["meta.pkl", "dataset.json"])
    def test_a_dataset_is_not_waited_for(self, name, home):
        shard(Path("train.bin"), range(9))
        os.mkfifo(name)
        with pytest.raises(InputError, match=f"{name}: a device or a pipe, expected"):
            find_source(None, ".", None, "m")


class TestRecord:
    def test_same_contents_are_no_change_wherever_they_are(self, home):
        Path("a.txt").write_text("hello")
        record = find_source("a.txt", None, None, "m").record()
        assert record["bytes"] == 5
        assert record["path"] == "a.txt"
        assert record["digest"] == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
        Path("a.txt").rename("b.txt")
        assert find_source("b.txt", None, record, "m").changed(record) is None
        assert json.loads(json.dumps(record)) == record

    def test_changed_text_is_said_with_both_sizes(self, home):
        Path("data").mkdir()
        Path("data/a.txt").write_text("hello")
        record = find_source("data/a.txt", None, None, "m").record()
        Path("data/a.txt").write_text("hello you")
        said = find_source(None, None, record, "m").changed(record)
        assert said.startswith("data/a.txt")
        assert "9 bytes" in said
        assert "5 bytes, 2cf24dba5fb0" in said

    def test_contents_are_read_again_only_when_size_or_time_moved(self, home):
        Path("data").mkdir()
        path = Path("data/a.txt")
        path.write_text("hello")
        record = find_source(path, None, None, "m").record() | {"digest": "as recorded"}
        assert find_source(None, None, record, "m").digest == "as recorded"
        os.utime(path, ns=(1, 1))
        assert find_source(None, None, record, "m").digest.startswith("2cf24dba5fb0")

    def test_file_added_to_a_folder_is_a_change(self, home):
        Path("books").mkdir()
        Path("books/a.txt").write_text("hello")
        record = find_source("books", None, None, "m").record()
        assert record["kind"] == "folder"
        Path("books/b.md").write_text("")
        os.utime("books", ns=(record["mtime_ns"], record["mtime_ns"] + 1))
        assert find_source(None, None, record, "m").record()["mtime_ns"] != record["mtime_ns"]


class TestText:
    def test_split_is_nanogpts(self, shared):
        path = shared / "data/tinyshakespeare.txt"
        content = path.read_text(encoding="utf-8")
        opened = open_corpus(find_source(path, None, None, "m"))
        cut = int(len(content) * 0.9)
        assert opened.tokenizer.decode(opened.train.arrays[0]) == content[:cut]
        assert opened.tokenizer.decode(opened.val.arrays[0]) == content[cut:]
        assert opened.tokenizer.vocab_size == 65

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff")), min_size=1, max_size=4
        ),
        st.floats(0, 0.99),
        st.integers(1, 40),
    )
    def test_nothing_is_lost_between_chunks_files_and_parts(self, tmp_path_factory, contents, fraction, chunk):
        folder = tmp_path_factory.mktemp("t")
        files = []
        for index, content in enumerate(contents):
            files.append(folder / f"{index}.txt")
            files[-1].write_bytes(content.encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "CHUNK", chunk)
            train, val = ("".join(text.pieces(part)) for part in text.split(files, fraction))
        whole = "\n".join(contents)
        assert whole in (train + val, train + "\n" + val)
        assert len(train.encode()) >= int(len(whole.encode()) * (1 - fraction)) - 1
        assert len(train.encode()) <= int(len(whole.encode()) * (1 - fraction)) + 3

    def test_byte_order_mark_is_dropped(self, home):
        Path("a.txt").write_bytes(b"\xef\xbb\xbfabc\r\n" * 1 + b"def")
        assert "".join(text.pieces(text.split([Path("a.txt")], 0.0)[0])) == "abc\r\ndef"

    def test_byte_that_is_no_text_is_named_with_its_offset(self, home, monkeypatch):
        Path("a.txt").write_bytes("é".encode() * 1000 + b"caf\xe9 au lait")
        for chunk in (1 << 20, 7, 1):
            monkeypatch.setattr(text, "CHUNK", chunk)
            with pytest.raises(InputError, match=r"a\.txt: byte 2,003 .*iconv -f LATIN1"):
                list(text.pieces(text.split([Path("a.txt")], 0.0)[0]))

    def test_utf16_is_recognised(self, home):
        Path("a.txt").write_text("hello", encoding="utf-16")
        with pytest.raises(InputError, match=r"a\.txt: byte 0 .*iconv -f UTF-16"):
            open_corpus(find_source("a.txt", None, None, "m"))

    def test_text_that_ends_inside_a_character_is_named(self, home):
        Path("a.txt").write_bytes("aé".encode()[:-1])
        with pytest.raises(InputError, match=r"byte 1 does not belong"):
            open_corpus(find_source("a.txt", None, None, "m"))

    def test_folder_is_joined_in_the_order_of_paths(self, home):
        Path("books/sub").mkdir(parents=True)
        Path("books/.git").mkdir()
        for name, content in {"b.txt": "B", "a.txt": "A", "sub/c.md": "C", ".git/x.txt": "no", "p.png": "no"}.items():
            Path("books", name).write_text(content)
        opened = open_corpus(find_source("books", None, None, "m"), val_fraction=0.0)
        assert opened.tokenizer.decode(opened.train.arrays[0]) == "A\nB\nC"

    def test_unknown_character_is_placed_in_the_whole_text(self, home, monkeypatch):
        monkeypatch.setattr(text, "CHUNK", 16)
        Path("a.txt").write_text("aaa bbb\n" * 20 + "aé", encoding="utf-8")
        chosen = find_source("a.txt", None, None, "m")
        with pytest.raises(InputError, match=r"a\.txt: 'é' \(U\+00E9\) at position 161 \(line 21, column 2\)"):
            open_corpus(chosen, make_char(["ab \n"]))
        assert len(open_corpus(chosen, make_char(["ab \n"]), unknown="skip").val) == 15

    def test_empty_text_is_refused(self, home):
        Path("a.txt").write_text("")
        with pytest.raises(InputError, match="empty"):
            open_corpus(find_source("a.txt", None, None, "m"))

    def test_unreadable_text_is_one_sentence(self, home):
        Path("a.txt").mkdir()
        with pytest.raises(InputError, match=r"a\.txt: Is a directory"):
            list(text.pieces([text.Segment(Path("a.txt"), 0, 5)]))


class TestStreaming:
    @pytest.mark.parametrize("kind", ["char", "gpt2"])
    def test_streamed_tokens_are_those_in_memory(self, home, shared, monkeypatch, kind):
        Path("a.txt").write_bytes((shared / "data/dante.txt").read_bytes()[:300_000])
        monkeypatch.setattr(text, "CHUNK", 10_000)
        bpe_file = shared / "data/gpt2.tiktoken"
        chosen = find_source("a.txt", None, None, "m")
        memory = open_corpus(chosen, kind, bpe_file=bpe_file)
        assert not Path("data").exists()
        monkeypatch.setattr(corpus, "STREAM_ABOVE", 1000)
        streamed = open_corpus(chosen, kind, bpe_file=bpe_file)
        assert ids(streamed.train) == ids(memory.train)
        assert ids(streamed.val) == ids(memory.val)
        assert streamed.tokenizer.state() == memory.tokenizer.state()
        [folder] = Path("data/cache").iterdir()
        assert folder.name.startswith("a-")
        assert folder.name.endswith(memory.tokenizer.fingerprint[:12])

    def test_cut_changes_no_gpt2_token(self, shared, home, monkeypatch):
        content = (
            (shared / "data/dante.txt").read_text(encoding="utf-8")[:60_000]
            + "  \n\n  x\n \n" * 300
            + "\u2003\n a" * 99
        )
        Path("a.txt").write_bytes(content.encode())
        tokenizer = Gpt2Tokenizer(shared / "data/gpt2.tiktoken")
        for chunk in (64, 1009):
            monkeypatch.setattr(text, "CHUNK", chunk)
            parts = list(text.pieces(text.split([Path("a.txt")], 0.0)[0]))
            assert len(parts) > 10
            cut = np.concatenate([tokenizer.encode(part) for part in parts])
            assert cut.tolist() == tokenizer.encode(content).tolist()

    def test_text_without_a_border_is_cut_where_the_read_ends(self, home, monkeypatch):
        monkeypatch.setattr(text, "CHUNK", 100)
        Path("a.txt").write_text("x" * 1050)
        parts = list(text.pieces(text.split([Path("a.txt")], 0.0)[0]))
        assert [len(part) for part in parts] == [100] * 10 + [50]

    def test_cache_is_used_again(self, home, monkeypatch):
        Path("a.txt").write_text("some words and more\n" * 100)
        monkeypatch.setattr(corpus, "STREAM_ABOVE", 10)
        first = open_corpus(find_source("a.txt", None, None, "m"))
        [folder] = Path("data/cache").iterdir()
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        again = open_corpus(find_source("a.txt", None, None, "m"))
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
        assert ids(again.train) == ids(first.train)
        Path("a.txt").write_text("other words and more\n" * 100)
        open_corpus(find_source("a.txt", None, None, "m"))
        assert len(list(Path("data/cache").iterdir())) == 2

    def test_text_that_changes_while_it_is_read_leaves_no_cache(self, home, monkeypatch):
        path = Path("a.txt")
        path.write_text("some words and more\n" * 100)
        monkeypatch.setattr(corpus, "STREAM_ABOVE", 10)
        tokenizer = make_char([path.read_text()])
        encode = tokenizer.encode

        def touch(*args):
            os.utime(path, ns=(5, 5))
            return encode(*args)

        tokenizer.encode = touch
        with pytest.raises(InputError, match=r"a\.txt: changed while it was read"):
            open_corpus(find_source("a.txt", None, None, "m"), tokenizer)
        assert list(Path("data/cache").iterdir()) == []

    def test_leftovers_of_a_killed_writer_are_replaced(self, home, monkeypatch):
        Path("a.txt").write_text("some words and more\n" * 100)
        monkeypatch.setattr(corpus, "STREAM_ABOVE", 10)
        open_corpus(find_source("a.txt", None, None, "m"))
        [folder] = Path("data/cache").iterdir()
        partial = folder.with_name(folder.name + ".partial")
        folder.rename(partial)
        (partial / "dataset.json").unlink()
        (partial / "train_000007.bin").write_bytes(b"half")
        opened = open_corpus(find_source("a.txt", None, None, "m"))
        assert len(opened.train) == 1800
        assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "train_000000.bin", "val_000000.bin"]
        assert not partial.exists()


def test_preparing_imports_no_torch():
    code = "import core.data.corpus, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
