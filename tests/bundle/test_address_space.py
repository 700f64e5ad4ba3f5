"""What does not fit is said before anything is allocated: under a limit far below the size of the model."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.config.gpt import GPTConfig
from core.families import gpt
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS limits mappings on Linux alone"),
]

GB = 1 << 30
LIMIT = 5 * GB // 2
WIDTH = 8192
CONFIG = {
    "n_layer": 2, "n_head": 8, "n_embd": WIDTH, "block_size": 64, "vocab_size": 4, "batch_size": 2, "dropout": 0.0,
    "bias": False, "device": "cpu",
}  # fmt: skip
TOKENIZER = {"token_kind": "char", "chars": list("abcd")}
CHILD = """
import resource, sys
import torch
from core.checkpoint import CheckpointManager
from core.errors import CheckpointError
from core.model import GPT
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[3]), int(sys.argv[3])))
root, door = sys.argv[1], sys.argv[2]
quiet = lambda line: None
try:
    if door == "generate":
        CheckpointManager.load_for_inference("dante", root)
    elif door == "train":
        CheckpointManager("dante", root, say=quiet).initialize_for_training({}, "char", None, 1e-3)
    else:
        GPT.load_legacy(root + "/dante/latest.pt")
    print("loaded")
except CheckpointError as error:
    print(type(error).__name__, error)
"""


class Hole:
    """A float32 tensor in a pickle whose bytes are a hole in the file."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.numel, self.key = shape, torch.Size(shape).numel(), ""

    def __reduce__(self):
        strides = tuple(torch.Size(self.shape[i + 1 :]).numel() for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (Bytes(self), 0, self.shape, strides, False, {})


class Bytes:
    """The storage of a hole."""

    def __init__(self, hole: Hole) -> None:
        self.hole = hole


class Pickler(pickle.Pickler):
    """Pickles holes as torch.save does tensors."""

    def __init__(self, output: io.BytesIO) -> None:
        super().__init__(output, protocol=2)
        self.holes: list[Hole] = []

    def persistent_id(self, value):
        if not isinstance(value, Bytes):
            return None
        value.hole.key = str(len(self.holes))
        self.holes.append(value.hole)
        return ("storage", torch.FloatStorage, value.hole.key, "cpu", value.hole.numel)


def write_sparse(path: Path, content: dict) -> None:
    """A torch file by hand: data.pkl, and a hole for each tensor, whose CRC32 of 0 says "not recorded"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pickler = Pickler(buffer)
    pickler.dump(content)
    directory, data = b"", buffer.getvalue()
    with path.open("wb") as file:
        records = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
        sizes_of = {name: len(content) for name, content in records.items()}
        sizes_of |= {f"data/{hole.key}": 4 * hole.numel for hole in pickler.holes}
        for name, size in sizes_of.items():
            full, offset = f"archive/{name}".encode(), file.tell()
            wide = struct.pack("<HHQQ", 1, 16, size, size)
            padding = -(offset + 30 + len(full) + len(wide) + 4) % 64
            extra = wide + struct.pack("<HH", 0xD935, padding) + bytes(padding)
            sizes = (0xFFFFFFFF, 0xFFFFFFFF, len(full))
            file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0x21, 0, *sizes, len(extra)) + full + extra)
            file.write(records.get(name, b""))
            file.seek(offset + 30 + len(full) + len(extra) + size)
            wide = struct.pack("<HHQQQ", 1, 24, size, size, offset)
            ends = (len(wide), 0, 0, 0, 0, 0xFFFFFFFF)
            directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0x21, 0, *sizes, *ends) + full + wide
        start, count = file.tell(), len(sizes_of)
        file.write(directory)
        end = file.tell()
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def contents(config: dict, tokenizer: dict, other_moments: dict[str, tuple[int, ...]]) -> dict:
    """What a single file holds: the weights of CONFIG, moments of its vectors, and a config and a tokenizer."""
    shapes = gpt.shapes(GPTConfig.from_dict(CONFIG))
    moments = {
        i: {"step": 3.0, "exp_avg": Hole(other_moments.get(name, shape)), "exp_avg_sq": Hole(shape)}
        for i, (name, shape) in enumerate(shapes.items())
        if len(shape) == 1
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False}
    return {
        "model_state_dict": {name: Hole(shape) for name, shape in shapes.items()},
        "optimizer_state_dict": {"state": moments, "param_groups": [{**group, "params": list(range(len(shapes)))}]},
        "config": config,
        "tokenizer": tokenizer,
        "step": 3,
    }


def write_single(root: Path, *parts: dict) -> Path:
    path = root / "dante" / "latest.pt"
    write_sparse(path, contents(*parts))
    return path


def write_bundle(root: Path, *parts: dict) -> Path:
    folder, content = root / "dante", contents(*parts)
    write_sparse(folder / "model.pt", content["model_state_dict"])
    write_sparse(folder / "optimizer.pt", content["optimizer_state_dict"])
    state = {"step": 3, "optimizer_file": "optimizer.pt"}
    for name, values in {
        "config": content["config"],
        "tokenizer": content["tokenizer"],
        "training_state": state,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def run_child(root: Path, door: str, limit: int = LIMIT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(root), door, str(limit)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


OTHER_CONFIG = {**CONFIG, "n_layer": 5, "block_size": 128, "vocab_size": 9, "bias": True, "head_bias": False}
OTHER_TOKENIZER = {"token_kind": "char", "chars": list("abcdefghijkl")}
OTHER_MOMENTS = {"ln_f.weight": (WIDTH // 2,)}
WOULD_FIT = [
    "vocab_size is 9, but token_embedding_table.weight has 4 rows. Set vocab_size to 4",
    "block_size is 128, but position_embedding_table.weight has 64 rows. Set block_size to 64",
    "n_layer is 5, but the tensors have 2 layers. Set n_layer to 2",
    "bias is true, but blocks.0.sa.qkv.bias is not there. Set bias to false",
    "head_bias is false, but lm_head.bias is there. Set head_bias to true",
    "12 characters, but vocab_size is 9",
    "ln_f.weight: exp_avg is (4096,), expected (8192,)",
]
DOORS = [("bundle", "generate"), ("bundle", "train"), ("single", "generate"), ("single", "train"), ("single", "legacy")]
WRITERS = {"bundle": write_bundle, "single": write_single}


@pytest.mark.parametrize(("form", "door"), DOORS)
def test_every_mismatch_is_listed_where_the_model_could_not_even_be_mapped(tmp_path, form, door):
    WRITERS[form](tmp_path, OTHER_CONFIG, OTHER_TOKENIZER, OTHER_MOMENTS)
    sizes = [path.stat().st_size for path in (tmp_path / "dante").glob("*.pt")]
    assert max(sizes) > 2 * LIMIT
    done = run_child(tmp_path, door)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"CheckpointMismatch {tmp_path / 'dante'}")
    assert [sentence for sentence in WOULD_FIT if sentence not in done.stdout] == []


@pytest.mark.parametrize(("form", "door"), DOORS)
def test_model_that_fits_but_cannot_be_mapped_is_no_damage_and_no_traceback(tmp_path, form, door):
    path = WRITERS[form](tmp_path, CONFIG, TOKENIZER, {})
    model = path / "model.pt" if form == "bundle" else path
    done = run_child(tmp_path, door)
    size = model.stat().st_size
    assert done.stdout == (
        f"CheckpointError {model}: its {size} bytes cannot be mapped (Cannot allocate memory). The file is as it was; "
        "raise the limit of the process (ulimit -v), or use a machine with more memory.\n"
    )
    assert "Traceback" not in done.stderr and done.returncode == 0


def test_model_that_can_be_mapped_but_not_copied_says_how_much_is_needed(tmp_path):
    path = write_single(tmp_path, CONFIG, TOKENIZER, {})
    done = run_child(tmp_path, "legacy", path.stat().st_size + 2 * GB)
    weights = sum(4 * torch.Size(shape).numel() for shape in gpt.shapes(GPTConfig.from_dict(CONFIG)).values())
    assert done.stdout.startswith(f"CheckpointError {path}: no memory for its {weights} bytes of weights.")
