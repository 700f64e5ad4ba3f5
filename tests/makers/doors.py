"""The doors through which a user meets a checkpoint, and checkpoints with something wrong."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import inspect_model
from core.checkpoint import CheckpointManager
from core.containers.torch_files.file import open_torch_file
from core.data.tokenizer import tokenizer_from_state
from core.errors import CheckpointError
from core.model import GPT
from tests.conftest import ROOT
from tests.makers.generations import SIZES, TOKENIZER, FusedGPT, LectureGPT, trained

# The doors


def train(folder: Path, lines: list[str] | None = None) -> int:
    say = (lines if lines is not None else []).append
    with CheckpointManager(folder.name, folder.parent, say=say) as made:
        return made.initialize_for_training({}, tokenizer_from_state(TOKENIZER), None, 1e-3)[2]


def generate(folder: Path) -> int:
    return CheckpointManager.load_for_inference(folder.name, folder.parent).step


def load(folder: Path) -> int:
    return GPT.load(folder)[2]


def legacy(folder: Path) -> int:
    return GPT.load_legacy(folder / "latest.pt")[2]


OF_A_FOLDER = (train, generate, load)
OF_A_FILE = (*OF_A_FOLDER, legacy)


def refused(door: Callable[[Path], int], folder: Path, *parts: str, kind: type = CheckpointError) -> str:
    """The message with which a door refuses; it has all `parts`, begins with a path, and no file is changed."""
    before = digests(folder)
    with pytest.raises(kind) as caught:
        door(folder)
    message = str(caught.value)
    assert message.startswith(str(folder)) and "\n" not in message and message.endswith("."), message
    assert [part for part in parts if part not in message] == [], message
    assert digests(folder) == before, f"{door.__name__} changed a file"
    return message


def looked_at(path: Path, code: int = 0) -> tuple[str, str]:
    """What inspect_model.py prints on stdout and stderr, called in this process."""
    before = digests(path)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert inspect_model.main([str(path)]) == code, err.getvalue()
    assert digests(path) == before
    return out.getvalue(), err.getvalue()


def digests(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run(script: str, *argv: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


def errors(done: subprocess.CompletedProcess, code: int = 1) -> str:
    """The one error line of a script that failed."""
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""
    found = [line for line in done.stderr.splitlines() if re.match(r"(\w+\.py: )?error: ", line)]
    assert len(found) == 1 and done.stderr.endswith(found[0] + "\n"), done.stderr
    return found[0]


# The files


class Old:
    """A fused and a lecture-style model with their optimizers, trained once for all tests."""

    def __init__(self) -> None:
        self.fused, self.lecture = FusedGPT(**SIZES), LectureGPT(**SIZES)
        self.moments, self.lecture_moments = trained(self.fused), trained(self.lecture)


def single(folder: Path, model: Any, moments: Any, name: str = "latest.pt", **changes: Any) -> Path:
    """A single file, with some of its entries changed."""
    folder.mkdir(exist_ok=True)
    content = {"model_state_dict": model.state_dict(), "config": model.config, "tokenizer": TOKENIZER, "step": 3}
    content["optimizer_state_dict"] = moments.state_dict() if moments is not None else None
    torch.save({**content, **changes}, folder / name)
    return folder / name


def changed(moments: torch.optim.Optimizer, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    state = copy.deepcopy(moments.state_dict())
    change(state)
    return state


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class Shell:
    """What runs a command when it is unpickled by Python."""

    def __init__(self, marker: Path | str) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def hide(path: Path, marker: Path) -> None:
    """Put a call before the content of a torch file, and POP its result."""
    call = pickle.dumps(Shell(marker), protocol=2)[2:-1] + pickle.POP
    hidden = path.with_suffix(".hidden")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(hidden, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = data[:2] + call + data[2:]
            target.writestr(entry.filename, data)
    hidden.replace(path)


def tensor_at(path: Path, name: str) -> int:
    """Where the bytes of a tensor begin."""
    with path.open("rb") as file:
        return open_torch_file(file, str(path)).tensors[name].offset


# The flags of the scripts, by what they open: each flag that takes a value and is no number stands here

FILE, FOLDER, CHECKPOINT, WRITTEN, NOTHING = "a file", "a file or folder", "a checkpoint", "a file to write", "no file"

SHARED_FLAGS = {"--config_file": FILE, "--model_name": CHECKPOINT, "--checkpoint_root": CHECKPOINT}
FLAGS: dict[str, dict[str, str]] = {
    "train.py": {
        **SHARED_FLAGS,
        "--input_file": FILE,
        "--dataset_dir": FOLDER,
        "--tokenization": FILE,
        "--bpe_file": FILE,
        "--init_from_model": CHECKPOINT,
        "--init_from_checkpoint": CHECKPOINT,
        "--log": NOTHING,  # names of loggers
        "--device": NOTHING,
    },
    "generate.py": {
        **SHARED_FLAGS,
        "--legacy_checkpoint": CHECKPOINT,
        "path": CHECKPOINT,
        "--checkpoint": CHECKPOINT,
        "--tokenization": FILE,
        "--meta": FILE,
        "--bpe_file": FILE,
        "--device": NOTHING,
        "--prompt": NOTHING,
        "--out": WRITTEN,
    },
    "inspect_model.py": {
        **SHARED_FLAGS,
        "paths": CHECKPOINT,
        "--legacy_checkpoint": CHECKPOINT,
        "--check_text": FILE,
        "--diff": CHECKPOINT,
        "--html": WRITTEN,
        "--tensors": NOTHING,
        "--stats": NOTHING,
        "--sample": NOTHING,
    },
    "convert_checkpoints.py": {
        **SHARED_FLAGS,
        "paths": CHECKPOINT,
        "--meta": FILE,
        "--bpe_file": FILE,
        "--check_text": FILE,
        "--match_original": CHECKPOINT,
        "--metadata_from": CHECKPOINT,
        "--checkpoint_dir": CHECKPOINT,
        "--model_path": CHECKPOINT,
        "--output_path": WRITTEN,
    },
    "data/prepare.py": {
        "--config_file": FILE,
        "input": FOLDER,
        "--output_dir": WRITTEN,
        "--tokenization": FILE,
        "--bpe_file": FILE,
    },
    "examples/finetune_classification.py": {
        **SHARED_FLAGS,
        "--dataset": FOLDER,
        "--pretrained_ckpt_path": CHECKPOINT,
        "--tokenizer_name": FILE,
        "--bpe_file": FILE,
        "--text_columns": NOTHING,
        "--label_column": NOTHING,
        "--device": NOTHING,
    },
}
