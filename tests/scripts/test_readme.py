"""What the README says, done."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.makers.clones import cloned, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")

COMMANDS = [
    command
    for block, span in re.findall(r"```bash\n(.*?)```|`((?:python|pip|timeout|torchrun) [^`]+)`", README, re.DOTALL)
    for command in (block or span).splitlines()
]

HERE = {
    # The environment of the tests stands for a new one; nothing is downloaded.
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/": "",
    ".venv/bin/pip install -r requirements-dev.txt && .venv/bin/": "",
    ". .venv/bin/activate": "true",
    # The tests do not run themselves, and the faults have tests of their own.
    "python -m pytest -n auto --dist loadfile": "true",
    "python -m tests.faults": "true",
    # A fiftieth of every number of steps. The settings of the first run hold for those that resume it.
    "train.py --model_name dante@": "train.py --model_name dante --max_iters 30 --eval_interval 5 --eval_iters 1",
    "--arch llama@": "--arch llama --max_iters 2 --eval_iters 1 --n_layer 1",
    " 1500": " 30",
    " 2000": " 40",
    " 2250": " 45",
    " 2500": " 50",
    "--save_interval 50": "--save_interval 1",
    "--keep_every 500": "--keep_every 10",
    "timeout -s KILL 20": "timeout -s KILL 5",
    "--input_file book.txt": "--input_file book.txt --max_iters 2 --eval_iters 1 --n_layer 1 --n_head 1 --n_embd 16",
}
"""What a command of the README is replaced by where a reader would wait, or download; @ is the end of a command."""


def shortened(command: str) -> str:
    """The command that the test runs in the place of one of the README."""
    command += "@"
    for written, here in HERE.items():
        command = command.replace(written, here)
    return command.removesuffix("@")


@pytest.fixture
def clone(shared, tmp_path) -> Path:
    """A copy of the files that a clone has, and the files of the reader that the README names."""
    folder = cloned(tmp_path / "clone")
    (folder / "book.txt").write_bytes((shared / "data/tinyshakespeare.txt").read_bytes()[:20_000])
    shutil.copyfile(shared / "data/gpt2.tiktoken", folder / "data/gpt2.tiktoken")  # else it would be downloaded
    fixtures = shared / "fixtures"
    for name in ("ckpt.pt", "meta.pkl"):
        shutil.copyfile(fixtures / "nanogpt_char_biasFalse" / name, folder / name)
    for name in ("config.json", "model.safetensors"):
        (folder / "gpt2").mkdir(exist_ok=True)
        shutil.copyfile(fixtures / "hf_gpt2" / name, folder / "gpt2" / name)
    shutil.copytree(fixtures / "dcp_fsdp2_4ranks/0000002", folder / "0000002")
    (folder / "checkpoints/old").mkdir(parents=True)
    shutil.copyfile(fixtures / "lecture_char/legacy/latest.pt", folder / "checkpoints/old/latest.pt")
    return folder


@pytest.mark.slow
def test_every_command_of_the_readme_works_in_the_order_in_which_they_stand(clone, tell):
    assert [written for written in HERE if not any(written in f"{command}@" for command in COMMANDS)] == []
    for command in COMMANDS:
        words = ["bash", "-c", shortened(command)]
        done = subprocess.run(words, cwd=clone, env=environment(), capture_output=True, text=True, timeout=300)
        allowed = (0, 137, -9) if command.startswith("timeout -s KILL") else (0,)
        assert done.returncode in allowed, f"{command}\n{shortened(command)}\n{done.stdout}{done.stderr}"
    tell(f"README: {len(COMMANDS)} commands in their order")
    state = json.loads((clone / "checkpoints/dante/training_state.json").read_text())
    assert state["step"] == 50 and state["training"]["max_iters"] == 50
    for name in ("nano", "gpt2", "old"):
        assert (clone / "checkpoints" / name / "training_state.json").is_file()
    for name in ("dante.html", "dante_hf/model.safetensors", "nano_ckpt.pt", "dante.safetensors", "model.safetensors"):
        assert (clone / name).stat().st_size > 1000


def test_the_readme_fits_on_two_screens_of_a_browser():
    assert len(README.splitlines()) <= 150


def test_the_loop_of_the_readme_saves_and_resumes(tmp_path):
    (loop,) = re.findall(r"```python\n(import torch.*?)```", README, re.DOTALL)
    assert len([line for line in loop.splitlines() if line.strip()]) <= 13
    shorter = loop.replace("300)", "200)")
    for code, step in ((shorter, 200), (loop, 300), (loop, 300)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "checkpoints/linear/training_state.json").read_text())["step"] == step
