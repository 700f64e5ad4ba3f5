"""What docs/compare.md says of other ways to save, done to the versions that are installed."""

from __future__ import annotations

import importlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from core.checkpoint import CheckpointManager
from core.errors import CheckpointDamaged
from tests.conftest import ROOT

# DCP warns that it saves and loads in one process.
pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = torch.arange(4096, dtype=torch.float32)


class Ours:
    """CheckpointManager, whose newest step is a folder."""

    def save(self, path: Path, weights: torch.Tensor) -> None:
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(weights)
        with CheckpointManager.of_folder(path, say=lambda line: None) as manager:
            manager.save(model, step=int(weights[0]) + 1)

    def load(self, path: Path) -> torch.Tensor:
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(torch.zeros(4096))
        with CheckpointManager.of_folder(path, say=lambda line: None) as manager:
            manager.load(model)
        return model.w.data


class Torch:
    """torch.save onto one file."""

    def save(self, path: Path, weights: torch.Tensor) -> None:
        torch.save({"w": weights}, path)

    def load(self, path: Path) -> torch.Tensor:
        return torch.load(path)["w"]


class Dcp:
    """torch.distributed.checkpoint, always into the same folder."""

    def save(self, path: Path, weights: torch.Tensor) -> None:
        dcp.save({"w": weights}, checkpoint_id=str(path), no_dist=True)

    def load(self, path: Path) -> torch.Tensor:
        state = {"w": torch.zeros(4096)}
        dcp.load(state, checkpoint_id=str(path), no_dist=True)
        return state["w"]


class Safetensors:
    """safetensors, one file."""

    def __init__(self) -> None:
        self.torch = importlib.import_module("safetensors.torch")

    def save(self, path: Path, weights: torch.Tensor) -> None:
        self.torch.save_file({"w": weights}, path)

    def load(self, path: Path) -> torch.Tensor:
        return self.torch.load_file(path)["w"]


class Lightning:
    """The functions with which Lightning's trainer writes and reads its checkpoints."""

    def __init__(self) -> None:
        self.io = importlib.import_module("lightning.fabric.utilities.cloud_io")

    def save(self, path: Path, weights: torch.Tensor) -> None:
        self.io._atomic_save({"w": weights}, path)

    def load(self, path: Path) -> torch.Tensor:
        return self.io._load(path)["w"]


class Transformers:
    """The weights in a step's folder of the Trainer of transformers."""

    def __init__(self) -> None:
        self.transformers = importlib.import_module("transformers")

    def save(self, path: Path, weights: torch.Tensor) -> None:
        sizes = {"n_layer": 1, "n_head": 1, "n_embd": 64, "n_positions": 64, "vocab_size": 8}
        model = self.transformers.GPT2LMHeadModel(self.transformers.GPT2Config(**sizes))
        model.transformer.wpe.weight.data.copy_(weights.view(64, 64))
        model.save_pretrained(path)

    def load(self, path: Path) -> torch.Tensor:
        return self.transformers.GPT2LMHeadModel.from_pretrained(path).transformer.wpe.weight.data.flatten()


WAYS = {way.__name__: way for way in (Ours, Torch, Dcp, Safetensors, Lightning, Transformers)}
OTHERS = ("Lightning", "Transformers")  # programs that requirements-full.txt brings


def named(*names: str) -> list:
    """The names of ways as parameters, each of the tier that has its program."""
    return [pytest.param(name, marks=pytest.mark.full if name in OTHERS else ()) for name in names]


def flip(path: Path) -> None:
    """Flip one bit of a weight in the file that holds it."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    (file,) = (file for file in files if WEIGHTS[100:110].numpy().tobytes() in file.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(WEIGHTS[100:110].numpy().tobytes())] ^= 64
    file.write_bytes(data)


@pytest.mark.parametrize("name", named(*WAYS))
def test_a_flipped_bit_is_loaded_by_others_and_refused_here(tmp_path, name):
    way, path = WAYS[name](), tmp_path / "saved"
    way.save(path, WEIGHTS)
    assert torch.equal(way.load(path), WEIGHTS)
    flip(path)
    if name == "Ours":
        with pytest.raises(CheckpointDamaged, match="w is damaged"):
            way.load(path)
    else:
        assert (way.load(path) != WEIGHTS).sum() == 1


def fails_half_way(name: str, path: Path) -> str:
    """Save again, in a process that may write 8 KB to a file; what that process says."""
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from tests.scripts import test_compare as compare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "way = compare.WAYS[sys.argv[1]]()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "way.save(Path(sys.argv[2]), compare.WEIGHTS + 1)\n"
    )
    words = [sys.executable, "-c", script, name, str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize("name", named("Ours", "Safetensors", "Lightning"))
def test_a_save_that_fails_keeps_the_last_step_here_in_safetensors_and_in_lightning(tmp_path, name):
    way, path = WAYS[name](), tmp_path / "saved"
    way.save(path, WEIGHTS)
    assert re.search("File too large|os error 27|Errno 27", fails_half_way(name, path))
    assert torch.equal(way.load(path), WEIGHTS)


@pytest.mark.parametrize("name", ["Torch", "Dcp"])
def test_a_save_that_fails_costs_others_the_last_step(tmp_path, name):
    way, path = WAYS[name](), tmp_path / "saved"
    way.save(path, WEIGHTS)
    fails_half_way(name, path)
    with pytest.raises((OSError, RuntimeError, dcp.api.CheckpointException)):  # CheckpointException is no Exception
        way.load(path)


@pytest.mark.full
def test_the_trainer_of_transformers_takes_an_empty_folder_for_the_newest_step(tmp_path):
    utils = importlib.import_module("transformers.trainer_utils")
    for name in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-10/model.safetensors").write_bytes(b"whole")
    assert Path(utils.get_last_checkpoint(str(tmp_path))).name == "checkpoint-20"


class Calls:
    """What a pickle may ask for: to make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_torch_refuses_a_pickle_that_calls_something_and_dcp_runs_it(tmp_path, capfd):
    torch.save({"w": Calls(tmp_path / "ran")}, tmp_path / "calls.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "calls.pt")
    assert not (tmp_path / "ran").exists()
    Dcp().save(tmp_path / "dcp", WEIGHTS)
    (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(Calls(tmp_path / "ran")))
    with pytest.raises(dcp.api.CheckpointException):
        Dcp().load(tmp_path / "dcp")
    assert (tmp_path / "ran").exists()
