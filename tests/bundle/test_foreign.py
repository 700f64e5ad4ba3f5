"""A checkpoint of another program in a model's folder: no door trains anew beside it, each names what takes it over."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import convert_checkpoints
import generate
import train
from core.bundle.foreign import foreign_checkpoint
from core.checkpoint import CheckpointManager
from core.errors import CheckpointNotFound, Unspecified
from tests.conftest import ROOT
from tests.makers.small_gpts import SmallGPT

GPT = SmallGPT(n_layer=1, n_head=2, n_embd=8, vocab_size=10)
ARGS = {**GPT.sizes, "dropout": 0.0}


def _nanogpt(path: Path, **more: object) -> None:
    torch.save({"model": GPT.nanogpt(), "model_args": ARGS, "iter_num": 3, **more}, path)


def _hf(folder: Path) -> None:
    weights = {f"transformer.{name}": tensor.clone() for name, tensor in GPT.weights.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_head": 2}')


def _old_zip(path: Path) -> None:
    torch.save({"model": GPT.nanogpt(), "model_args": ARGS}, path, _use_new_zipfile_serialization=False)


MAKERS: dict[str, Callable[[Path], object]] = {
    "ckpt.pt": _nanogpt,
    "ckpt_00040.ckpt": lambda path: _nanogpt(path, optimizer={}),
    "without_suffix": _nanogpt,
    "old.pth": _old_zip,
    "lecture_sd.pt": lambda path: torch.save(GPT.lecture(), path),
    "model_19072.pt": lambda path: torch.save({"model": GPT.nanogpt("_orig_mod."), "step": 19072}, path),
    "weights.safetensors": lambda path: save_file({n: t.clone() for n, t in GPT.lecture().items()}, path),
    "": _hf,
}
"""Files of other programs by name; "" is a folder of transformers."""

NEEDED = {
    "lecture_sd.pt": "--attention_scale head_size --norm_placement before",
    "model_19072.pt": "--n_head 2 --activation gelu",
}
NEEDED["weights.safetensors"] = NEEDED["lecture_sd.pt"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "root/mine").mkdir(parents=True)
    return tmp_path / "root/mine"


def command_of(said: str) -> list[str]:
    """The arguments of the command that a message names."""
    line = said.partition("Take it over with python convert_checkpoints.py ")[2].partition(", and use --model_name ")[0]
    return shlex.split(line)


@pytest.mark.parametrize("name", MAKERS)
def test_training_refuses_to_start_beside_it_and_the_named_command_takes_it_over(name, folder, capsys):
    MAKERS[name](folder / name)
    with pytest.raises(Unspecified) as caught:
        CheckpointManager("mine", folder.parent).newest_intact()
    said = str(caught.value)
    assert said.startswith(f"{folder / name}: a checkpoint of ") and said.endswith("add --allow_fresh.")
    command = command_of(said)
    assert command == [str(folder / name), str(folder.parent / "mine_new"), "--to", "bundle"]
    assert convert_checkpoints.main([*command, *NEEDED.get(name, "").split()]) == 0
    opened = CheckpointManager("mine_new", folder.parent).newest_intact()
    assert opened is not None
    opened.close()
    assert command_of(foreign_checkpoint(folder) or "")[1] == str(folder.parent / "mine_new2"), "a name that is free"


def test_every_door_names_the_same_command(folder, capsys):
    _nanogpt(folder / "ckpt.pt")
    (folder / "meta.pkl").write_bytes(b"")
    said = foreign_checkpoint(folder)
    assert said is not None and command_of(said)[-2:] == ["--meta", str(folder / "meta.pkl")]
    root = ["--checkpoint_root", str(folder.parent)]
    with pytest.raises(CheckpointNotFound) as caught:
        generate.main([*root, "--model_name", "mine"])
    assert str(caught.value) == said
    with pytest.raises(CheckpointNotFound) as caught:
        generate.main(root)  # the only model there would be
    assert str(caught.value) == said
    assert convert_checkpoints.main([*root, "--model_name", "mine"]) == 0
    assert said in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"ckpt.pt", "meta.pkl"}


def test_a_damaged_one_and_one_of_an_unknown_program_are_no_reason_to_start_anew(folder):
    _nanogpt(folder / "ckpt.pt")
    data = (folder / "ckpt.pt").read_bytes()
    (folder / "ckpt.pt").write_bytes(data[: len(data) // 2])
    assert "cut off" in str(foreign_checkpoint(folder)) and "copy it again, or move it away" in str(
        foreign_checkpoint(folder)
    )
    torch.save({"encoder.weight": torch.ones(3, 4)}, folder / "ckpt.pt")
    file = folder / "ckpt.pt"
    said = (
        f"{file}: a checkpoint of a program that is not known here. python inspect_model.py {file} shows what is in it."
    )
    assert foreign_checkpoint(folder) == said


def test_other_files_are_no_checkpoint(folder):
    assert foreign_checkpoint(folder) is None and foreign_checkpoint(folder / "nowhere") is None
    np.save(folder / "a.npy", np.ones((3, 4)))
    (folder / "notes.txt").write_text("PK")
    (folder / "train.bin").write_bytes(np.arange(500, dtype=np.uint16).tobytes())
    (folder / "empty.pt").write_bytes(b"")
    torch.save({"labels": torch.arange(5)}, folder / "labels.pt")
    torch.save(torch.ones(3, 4), folder / "embedding.pt")
    shutil.make_archive(str(folder / "code"), "zip", folder.parent, "mine")
    assert foreign_checkpoint(folder) is None
    assert CheckpointManager("mine", folder.parent).newest_intact() is None


def test_on_request_a_run_starts_beside_it_and_leaves_it(folder):
    _nanogpt(folder / "ckpt.pt")
    before, lines = (folder / "ckpt.pt").read_bytes(), []
    assert CheckpointManager("mine", folder.parent, allow_fresh=True, say=lines.append).newest_intact() is None
    assert any("Starting from scratch beside it (--allow_fresh)." in line for line in lines)
    assert CheckpointManager("mine", folder.parent).newest_intact(folder / "ckpt.pt") is None, "the origin of a run"
    assert (folder / "ckpt.pt").read_bytes() == before


def test_train_reads_no_text_before_it_refuses(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    _nanogpt(folder / "ckpt.pt")
    with pytest.raises(Unspecified, match=r"root/mine/ckpt\.pt: a checkpoint of nanoGPT"):
        train.main(["--checkpoint_root", "root", "--model_name", "mine"])
    assert not Path("data").exists()


def test_the_script_exits_with_the_code_of_wrong_use(folder):
    _nanogpt(folder / "ckpt.pt")
    script = [sys.executable, ROOT / "train.py", "--checkpoint_root", str(folder.parent), "--model_name", "mine"]
    ended = subprocess.run(script, capture_output=True, text=True, cwd=folder.parent.parent)
    assert ended.returncode == 2 and ended.stderr.startswith(f"error: {folder / 'ckpt.pt'}: a checkpoint of nanoGPT")
    command = command_of(ended.stderr)
    assert convert_checkpoints.main(command) == 0
    ended = subprocess.run([*script[:-1], "mine_new"], capture_output=True, text=True, cwd=folder.parent.parent)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and last.startswith(f"error: {folder.parent / 'mine_new'}: the text of its")
