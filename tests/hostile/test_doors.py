"""Every door that opens a file refuses pipes, devices and files of the system at once, and shows nothing of them."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from core.checkpoint import CheckpointManager
from core.config.gpt import GPTConfig
from core.console.commandline import Parser, size
from core.console.files import Irregular, read_regular
from core.data.tokenizer import Gpt2Tokenizer
from core.errors import CheckpointError, CheckpointMismatch, InputError
from core.kinds.model_methods import save_checkpoint_bundle
from core.model import GPT
from core.pretrained import (
    inspect_checkpoint,
    load_classifier,
    load_flex_checkpoint,
    load_pretrained_checkpoint,
    open_checkpoint,
    open_gpt,
)
from core.training.settings import Settings
from tests.conftest import ROOT
from tests.fuzz.seeds import MAKERS, write_seeds
from tests.makers.doors import FILE, FLAGS, FOLDER
from tests.makers.modded_models import random_batched
from tests.makers.models import TEXT, started, update
from tests.makers.small_gpts import SmallGPT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and pipes with names are those of Linux")


def script(name: str):
    """A script as a module."""
    made = importlib.util.spec_from_file_location(f"door_{Path(name).stem}", ROOT / name)
    module = importlib.util.module_from_spec(made)
    sys.modules[made.name] = module
    made.loader.exec_module(module)
    return module


SCRIPTS = {name: script(name) for name in FLAGS}


class Late(BaseException):
    """It waits for something; no handler of errors takes this for one."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail when the block waits for something."""

    def late(*_: object) -> None:
        raise Late(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def said(main: Callable[[list[str]], int], *argv: object) -> str:
    """All that a script says; it must fail, in one of the ways that `run` turns into a line."""
    out = io.StringIO()
    with within(20), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            assert main([str(word) for word in argv]) in (1, 2), out.getvalue()
        except (CheckpointError, SystemExit) as error:
            out.write(str(error))
    return out.getvalue()


# The table is complete


def parser_of(name: str, monkeypatch) -> argparse.ArgumentParser:
    class Caught(Exception):
        pass

    found = []

    def parse(self: Parser, argv: list[str]) -> argparse.Namespace:
        found.append(self)
        raise Caught

    monkeypatch.setattr(Parser, "parse", parse)
    with pytest.raises(Caught):
        SCRIPTS[name].main([])
    return found[0]


def test_the_table_has_every_script():
    files = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("examples/*.py")]
    assert {str(p.relative_to(ROOT)) for p in files if "run(main)" in p.read_text()} == set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_the_table_has_every_flag_that_may_name_a_file(name, monkeypatch):
    actions = parser_of(name, monkeypatch)._actions
    free = [a for a in actions if a.nargs != 0 and not a.choices and a.type in (None, str, Path)]
    assert {a.option_strings[0] if a.option_strings else a.dest for a in free} == set(FLAGS[name])


def test_the_table_has_every_public_loader():
    methods = {f"{of.__name__}.{n}" for of in (GPT, CheckpointManager) for n in vars(of) if n.startswith("load")}
    functions = set(importlib.import_module("core.pretrained").__all__)
    assert methods | functions == {name.partition(" of ")[0] for name in LOADERS}


# What is refused


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A working folder: a text, rows, a trained bundle m, models without a tokenizer, and what must not be read."""
    root = tmp_path_factory.mktemp("work")
    (root / "text.txt").write_text(TEXT * 20)
    (root / "rows.csv").write_text("text,label\n" + "a,1\nb,2\n" * 5)
    made, model, optimizer = started(root / "checkpoints", "m")
    with made:
        update(model, optimizer)
        made.save(model, optimizer, step=1)
        made.wait()
    shape = {"block_size": 16, "n_embd": 8, "n_head": 2, "n_layer": 1}
    save_checkpoint_bundle(GPT(GPTConfig(vocab_size=9, **shape)), root / "checkpoints/bare", step=1)
    exported = GPT(GPTConfig(vocab_size=50257, tied_head=True, head_bias=False, **shape))
    exported.tokenizer = Gpt2Tokenizer()
    save_checkpoint_bundle(exported, root / "checkpoints/gpt2", step=1)
    torch.save(SmallGPT(vocab_size=9).nanogpt(), root / "bare.pt")
    save_checkpoint_bundle(random_batched("small"), root / "modded", step=3)
    os.mkfifo(root / "pipe")
    (root / "zero").symlink_to("/dev/zero")
    (root / "made_up").symlink_to("/proc/self/environ")
    for refused in REFUSED:
        (root / f"{refused}.csv").symlink_to(refused)
    return root


@pytest.fixture
def place(models, monkeypatch) -> Path:
    """The working folder, as that of the process."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("SECRET", "of-the-environment")
    return models


REFUSED = ("pipe", "zero", "made_up")

NAMED = {
    ("train.py", "--config_file"): [],
    ("train.py", "--input_file"): [],
    ("train.py", "--dataset_dir"): [],
    ("train.py", "--tokenization"): ["--input_file", "text.txt"],
    ("train.py", "--bpe_file"): ["--input_file", "text.txt", "--tokenization", "gpt2"],
    ("generate.py", "--config_file"): [],
    ("generate.py", "--tokenization"): ["--model_name", "bare"],
    ("generate.py", "--meta"): ["bare.pt"],
    ("generate.py", "--bpe_file"): ["--model_name", "bare", "--tokenization", "gpt2"],
    ("inspect_model.py", "--config_file"): [],
    ("inspect_model.py", "--check_text"): ["checkpoints/m"],
    ("convert_checkpoints.py", "--config_file"): [],
    ("convert_checkpoints.py", "--meta"): ["bare.pt", "new", "--to", "bundle"],
    ("convert_checkpoints.py", "--bpe_file"): ["checkpoints/gpt2", "new", "--to", "hf"],
    ("convert_checkpoints.py", "--check_text"): ["checkpoints/m", "new", "--to", "pt"],
    ("data/prepare.py", "--config_file"): [],
    ("data/prepare.py", "input"): ["--output_dir", "made"],
    ("data/prepare.py", "--tokenization"): ["text.txt", "--output_dir", "made"],
    ("data/prepare.py", "--bpe_file"): ["text.txt", "--output_dir", "made", "--tokenization", "gpt2"],
    ("examples/finetune_classification.py", "--config_file"): [],
    ("examples/finetune_classification.py", "--dataset"): ["--pretrained_ckpt_path", "checkpoints/m"],
    ("examples/finetune_classification.py", "--tokenizer_name"): [
        *("--pretrained_ckpt_path", "modded", "--dataset", "rows.csv"),
    ],
    ("examples/finetune_classification.py", "--bpe_file"): [
        *("--pretrained_ckpt_path", "modded", "--dataset", "rows.csv", "--tokenizer_name", "gpt2"),
    ],
}
"""The words beside each flag that names a file, with which its script gets as far as to open it."""


def test_every_flag_that_opens_a_file_is_tried():
    opened = {(name, flag) for name, flags in FLAGS.items() for flag in flags if flags[flag] in (FILE, FOLDER)}
    assert set(NAMED) == opened


@pytest.mark.parametrize("refused", REFUSED)
@pytest.mark.parametrize(("name", "flag"), NAMED)
def test_no_flag_opens_what_is_no_regular_file(name, flag, refused, place):
    path = place / (f"{refused}.csv" if flag == "--dataset" else refused)
    out = said(SCRIPTS[name].main, *([flag] if flag.startswith("--") else []), path, *NAMED[name, flag])
    assert str(path) in out and "SECRET" not in out and "of-the-environment" not in out
    kinds = "a device or a pipe|a file that the system makes up|found no file|a file, expected"
    assert re.search(kinds, out), out
    assert not (place / "new").exists() and not (place / "made").exists()


SETTINGS = {
    "too deep": ("[" * 100_000, "not valid JSON"),
    "a NUL": ('{"model_name": "a\\u0000b"}', "model_name is 'a\\x00b', expected what a command line can hold"),
    "half a character": ('{"model_name": "\\ud800"}', "model_name: expected what a command line can hold"),
    "a number of 5,000 digits": ('{"model_name": ' + "9" * 5000 + "}", "not valid JSON"),
}


@pytest.mark.parametrize("what", SETTINGS)
@pytest.mark.parametrize("name", [name for name in FLAGS if name != "data/prepare.py"])
def test_settings_that_no_command_line_can_hold_are_one_sentence(name, what, tmp_path):
    content, expected = SETTINGS[what]
    (tmp_path / "settings.json").write_text(content)
    out = said(SCRIPTS[name].main, "--config_file", tmp_path / "settings.json")
    assert out.startswith(f"{tmp_path / 'settings.json'}: ") and expected in out and len(out) < 500


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a/b", "..", ""])
def test_a_name_that_no_folder_can_have_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="expected the name of one folder"):
        CheckpointManager(name, tmp_path)


def test_a_class_of_thousands_of_digits_is_a_text(tmp_path):
    labelled = importlib.import_module("examples.classification.labelled")
    (tmp_path / "rows.csv").write_text(f"text,label\na,{'9' * 5000}\n" + "b,10\nb,9\n" * 5)
    assert labelled.read_labelled(tmp_path / "rows.csv").classes() == ["10", "9", "9" * 5000]


@pytest.mark.parametrize("word", ["9" * 400, "9" * 5000 + "GB", "1e9", "inf"])
def test_a_size_beyond_all_is_a_wrong_word(word):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size"):
        size(word)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ema", {}), ("ema", "x"), ("learning_rate", True), ("learning_rate", float("nan")), ("max_iters", 1.5),
        ("eval_iters", 2**70), ("lr_schedule", "steep"), ("lr_schedule", []), ("seed", "1"), ("compile", 1),
    ],
)  # fmt: skip
def test_a_recorded_setting_of_another_type_is_named(name, value):
    with pytest.raises(CheckpointMismatch, match=rf"^training\.{name} in the checkpoint's .* is .*--{name}\."):
        Settings.resolve({}, {name: value})
    assert getattr(Settings.resolve({name: 1}, {name: value}), name) == 1


# The files of a bundle, through every door of a checkpoint

LOADERS: dict[str, Callable[[Path], object]] = {
    "GPT.load": GPT.load,
    "GPT.load_legacy": lambda folder: GPT.load_legacy(folder / "model.pt"),
    "CheckpointManager.load": lambda folder: resumed(folder),
    "CheckpointManager.load_for_inference": lambda f: CheckpointManager.load_for_inference(f.name, f.parent),
    "load_pretrained_checkpoint": load_pretrained_checkpoint,
    "load_pretrained_checkpoint of a file": lambda folder: load_pretrained_checkpoint(folder / "model.pt"),
    "inspect_checkpoint": lambda folder: inspect_checkpoint(folder / "model.pt"),
    "load_flex_checkpoint": load_flex_checkpoint,
    "load_classifier": load_classifier,
    "open_checkpoint": open_checkpoint,
    "open_gpt": open_gpt,
    "open_gpt of a file": lambda folder: open_gpt(folder / "model.pt", training=True),
}
"""What a person's own program calls."""


def resumed(folder: Path) -> int:
    made, model, optimizer = started(folder.parent.parent / "scratch", "n")
    made.close()
    with CheckpointManager(folder.name, folder.parent, say=lambda line: None) as manager:
        return manager.load(model, optimizer)


def words_of(name: str, folder: Path) -> list[object]:
    """The words with which a script opens a bundle."""
    model = ["--model_name", folder.name, "--checkpoint_root", folder.parent]
    return {
        "train.py": [*model, "--max_iters", "3", "--input_file", "text.txt"],
        "generate.py": model,
        "inspect_model.py": [folder],
        "convert_checkpoints.py": [folder, folder.parent.parent / "new", "--to", "pt"],
        "examples/finetune_classification.py": ["--pretrained_ckpt_path", folder, "--dataset", "rows.csv"],
    }[name]


OF_SCRIPTS = {
    name: lambda folder, name=name: SCRIPTS[name].main([str(word) for word in words_of(name, folder)])
    for name in FLAGS
    if name != "data/prepare.py"
}
DOORS: dict[str, Callable[[Path], object]] = {**LOADERS, **OF_SCRIPTS}
FIVE = ("model.pt", "config.json", "tokenizer.json", "training_state.json", "optimizer.pt")


@pytest.mark.parametrize("refused", ["pipe", *(pytest.param(name, marks=pytest.mark.full) for name in REFUSED[1:])])
@pytest.mark.parametrize("door", DOORS)
def test_no_door_reads_what_is_no_regular_file_in_a_bundle(door, refused, place, tmp_path, capsys):
    for file in FIVE:
        folder = tmp_path / file / "m"
        shutil.copytree(place / "checkpoints/m", folder, ignore=lambda *_, file=file: [".lock", file])
        (folder / file).symlink_to(place / refused)
        with within(20), contextlib.suppress(CheckpointError, SystemExit):  # what does not need the file works
            DOORS[door](folder)
        shown = capsys.readouterr()
        assert "of-the-environment" not in shown.out + shown.err


# The files of every other container: DCP, Megatron, rank files, folders of Hugging Face, single files


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    write_seeds(folder)
    return folder


@pytest.mark.parametrize("name", MAKERS)
def test_no_reader_of_another_container_waits_for_a_file(name, seeds, place, tmp_path, capsys):
    sound = seeds / name
    files = [p.relative_to(sound) for p in sorted(sound.rglob("*")) if p.is_file()] if sound.is_dir() else [Path()]
    for number, file in enumerate(files):
        made = tmp_path / str(number) / name
        made.parent.mkdir()
        shutil.copytree(sound, made) if sound.is_dir() else shutil.copy(sound, made)
        (made / file if sound.is_dir() else made).unlink()
        (made / file if sound.is_dir() else made).symlink_to(place / REFUSED[number % 3])
        for main, words in ((SCRIPTS["inspect_model.py"].main, [made]), (SCRIPTS["convert_checkpoints.py"].main, [
            made, made.parent / "out.pt", "--to", "pt"
        ])):  # fmt: skip
            with within(20), contextlib.suppress(CheckpointError, SystemExit):
                main([str(word) for word in words])
            shown = capsys.readouterr()
            assert "of-the-environment" not in shown.out + shown.err


# Giants, and files that change their kind


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "training_state.json", "metrics.jsonl"])
def test_a_sparse_giant_is_refused_by_its_size(name, place, tmp_path):
    folder = tmp_path / "checkpoints/m"
    shutil.copytree(place / "checkpoints/m", folder, ignore=lambda *_: [".lock", name])
    (folder / name).touch()
    os.truncate(folder / name, 3 << 30)
    out = said(SCRIPTS["train.py"].main, *words_of("train.py", folder))
    assert f"{folder / name}: " in out and re.search("3221225472|3,221,225,472", out), out


def test_a_file_that_becomes_a_pipe_while_it_is_opened_is_never_waited_for(tmp_path):
    path, pipe, plain = tmp_path / "x", tmp_path / "pipe", tmp_path / "plain"
    os.mkfifo(pipe)
    plain.write_bytes(b"content")
    path.symlink_to(plain)
    done = threading.Event()

    def swap() -> None:
        for number in itertools.count():
            if done.is_set():
                return
            other = tmp_path / f"link{number % 2}"
            other.symlink_to((pipe, plain)[number % 2])
            other.replace(path)

    thread = threading.Thread(target=swap)
    thread.start()
    found = Counter()
    try:
        with within(30):
            while min(found["content"], found["refused"]) < 200:
                try:
                    found[read_regular(path).decode()] += 1
                except Irregular:
                    found["refused"] += 1
    finally:
        done.set()
        thread.join()
    assert found.keys() == {"content", "refused"}
