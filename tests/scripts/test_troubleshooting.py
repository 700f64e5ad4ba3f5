"""The errors on top of docs/troubleshooting.md are what is printed, by the situation that the page tells of."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import convert_checkpoints
import generate
import inspect_model
import train
from core.data import gpt2_ranks
from core.errors import CheckpointError
from tests.conftest import ROOT
from tests.makers.doors import tensor_at
from tests.makers.small_gpts import SmallGPT

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
FIRST = PAGE.partition("## The fifteen that people meet first")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| `([^`]+)` \| `([^`]+)`", FIRST, re.MULTILINE)
"""A message, and the command that prints it."""

SIZES = "--n_layer 1 --n_head 1 --n_embd 8 --block_size 8 --batch_size 2 --eval_iters 1 --device cpu --max_iters 4"
SCRIPTS = {"train.py": train, "generate.py": generate, "inspect_model.py": inspect_model}
SCRIPTS |= {"convert_checkpoints.py": convert_checkpoints}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A working folder in which dante is trained for 4 steps, with files of other programs beside it."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("book.txt").write_text("the cat sat on the mat\n" * 200)
        train.main(shlex.split(f"--model_name dante --input_file book.txt {SIZES}"))
        model = SmallGPT(vocab_size=9)
        args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 12, "vocab_size": 9, "bias": True}
        torch.save({"model": model.nanogpt(), "model_args": args, "iter_num": 3, "config": {}}, "ckpt.pt")
        torch.save(model.nanogpt(), "weights.pt")
        Path("mine.pt").write_text("mine")
        lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 548105171\n"
        Path("model.safetensors").write_text(lfs)
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the working folder, on a machine without a network and without GPT-2's ranks."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(gpt2_ranks, "BESIDE", tmp_path / "gpt2.tiktoken")
    monkeypatch.setattr(gpt2_ranks, "_download", lambda *_: (b"", "no network"))
    return tmp_path / "work"


def damage(place: Path) -> None:
    path = place / "checkpoints/dante/model.pt"
    content = bytearray(path.read_bytes())
    content[tensor_at(path, "position_embedding_table.weight")] ^= 1
    path.write_bytes(content)


BEFORE = {
    "checkpoints: no models here": lambda place: shutil.rmtree(place / "checkpoints"),
    "checkpoints/dante/model.pt: ": damage,
}
"""What happens before a command, by the beginning of its message."""


@pytest.mark.parametrize(("message", "command"), ROWS)
def test_each_of_the_first_errors_is_printed_as_the_page_says(message, command, place, capsys):
    for begins, change in BEFORE.items():
        if message.startswith(begins):
            change(place)
    script, *words = shlex.split(command)
    capsys.readouterr()
    said = ""
    try:
        SCRIPTS[script].main(words)
    except (CheckpointError, SystemExit) as error:
        said = str(error)
    said += capsys.readouterr().err
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert re.search(pattern, said), said


def test_there_are_fifteen():
    assert len(ROWS) == 15 and len({message for message, _ in ROWS}) == 15
