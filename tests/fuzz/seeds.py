"""Small sound checkpoints of every container, from which mutations start: `python -m tests.fuzz.seeds FOLDER`.

They are made in a process of their own: the one that mutates and opens them never imports torch.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from tests.makers.containers import plain_tensors, write_hf, write_safetensors, write_torch
from tests.makers.dcp_folders import Writer
from tests.makers.models import save_durably

LARGEST_FIXTURE = 300_000  # bytes


def dcp_folder(folder: Path) -> None:
    writer = Writer(folder)
    writer.tensor("model.w", torch.randn(4, 6), [((0, 0), (2, 6)), ((2, 0), (2, 6))])
    writer.tensor("model.cut", torch.randn(2, 4), [((0, 0), (2, 2)), ((0, 2), (2, 2))])
    writer.tensor("optim.exp_avg", torch.randn(4, 6).bfloat16())
    writer.tensor("optim.step", torch.tensor(3.0))
    writer.value("step", {"step": 7, "rng": torch.arange(5, dtype=torch.uint8)})
    writer.metadata.planner_data |= {"model.w": ("model", "w"), "model.cut": ("model", "cut")}
    writer.close()


def _dtensor(rank: int, whole: torch.Tensor, ranks: int) -> DTensor:
    """A rank's part of a tensor, cut along its rows, without a process group."""
    mesh = DeviceMesh("cpu", torch.arange(ranks), _init_backend=False, _rank=rank)
    meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
    local = torch.chunk(whole, ranks)[rank].clone()
    return DTensor(local, DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)


def rank_files(folder: Path) -> None:
    torch.manual_seed(1)
    whole = torch.randn(4, 3)
    for rank in (0, 1):
        state = {"w": _dtensor(rank, whole, 2), "plain": torch.ones(2), "step": 3}
        torch.save(state, folder / f"model_rank{rank:05}.pt")


def step_folder(folder: Path) -> None:
    for name in ("model_sharded", "ema_sharded"):
        writer = Writer(folder / name, files=1)
        writer.tensor("w", torch.randn(4, 6))
        writer.close()
    torch.save({"state": {0: torch.ones(2)}}, folder / "optimizer_rank00000.pt")
    (folder / "metadata.json").write_text(json.dumps({"train_steps": 2, "world_size": 1, "has_ema": True}))


def megatron_dist(folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    inner = folder / "iter_0000005"
    dcp_folder(inner)
    torch.save({"args": argparse.Namespace(num_layers=2), "iteration": 5}, inner / "common.pt")
    (inner / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


def megatron_classic(folder: Path) -> None:
    rank = folder / "iter_0000005" / "mp_rank_00"
    rank.mkdir(parents=True)
    extra = io.BytesIO(b"x")
    state = {
        "args": argparse.Namespace(num_layers=2),
        "model": {**plain_tensors(), "_extra_state": extra},
        "iteration": 5,
    }
    torch.save(state, rank / "model_optim_rng.pt")


def bundle(folder: Path) -> None:
    """Our own folder, as a training run leaves it."""
    from core.checkpoint import CheckpointManager
    from core.config.gpt import GPTConfig
    from core.model import GPT

    config = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "vocab_size": 3, "dropout": 0.0, "bias": False}
    manager = CheckpointManager("run", str(folder), say=lambda line: None)
    values = {**config, "batch_size": 2, "device": "cpu"}
    model, optimizer, _ = manager.initialize_for_training(values, "char", "abc" * 9, 1e-3)
    assert isinstance(model, GPT) and isinstance(model.config, GPTConfig)
    for step in (1, 2):
        save_durably(manager, model, optimizer, step=step)
    for path in (folder / "run").iterdir():
        shutil.move(path, folder / path.name)
    (folder / "run").rmdir()


def nested(folder: Path) -> None:
    """A zip whose pickle has every protocol's ways of writing things."""
    values = {p: pickle.dumps({"a": [1.5, None, 2**70, b"x", {1}, (1, 2, 3)], "k": {"n": [[]]}}, p) for p in range(6)}
    value = {"raw": values, "odd": {1, 2}, "bytes": bytearray(b"x"), "complex": complex(1, 2)}
    torch.save({"value": value, "w": torch.nn.Parameter(torch.ones(2)), "dtype": torch.bfloat16}, folder / "x.pth")


MAKERS = {
    "torch_zip": write_torch(True), "torch_zip_values": nested, "torch_stream": write_torch(False),
    "safetensors": write_safetensors, "hf_folder": write_hf("safetensors", 1), "hf_shards": write_hf("safetensors", 2),
    "hf_bins": write_hf("bin", 2), "dcp": dcp_folder, "rank_files": rank_files, "step_folder": step_folder,
    "megatron_dist": megatron_dist, "megatron_classic": megatron_classic, "bundle": bundle,
}  # fmt: skip
"""One small checkpoint of every container by name."""


def fixtures(shared: Path, folder: Path) -> None:
    """Copy the small ones of those that the upstream programs wrote."""
    for path in sorted((shared / "fixtures").glob("megatron_*/exported_model.pt")):
        if path.stat().st_size <= LARGEST_FIXTURE:
            (folder / f"fixture_{path.parent.name}").mkdir()
            shutil.copyfile(path, folder / f"fixture_{path.parent.name}" / path.name)
    ranks = shared / "fixtures/dcp_fsdp2_4ranks/0000002"
    if ranks.is_dir():
        shutil.copytree(ranks, folder / "fixture_step_folder")
        (folder / "fixture_step_folder").chmod(0o755)


def write_seeds(folder: Path, shared: Path | None = None) -> None:
    """Write each example into a folder of its own; with `shared`, the upstream fixtures too."""
    torch.manual_seed(0)
    for name, make in MAKERS.items():
        (folder / name).mkdir(parents=True)
        make(folder / name)
    if shared:
        fixtures(shared, folder)


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
