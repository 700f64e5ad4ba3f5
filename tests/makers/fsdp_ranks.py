"""What two ranks of real FSDP write, on gloo: one file for each rank, and DCP folders."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import LocalStateDictConfig, ShardedStateDictConfig, StateDictType, fully_shard


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def net() -> nn.Module:
    """The same small network on every rank; its last layer has fewer rows than there may be ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))


def write_with_fsdp(rank: int, out: Path, port: int) -> None:
    """On one of two ranks: fsdp2/ (verl's names), fsdp1/ (ShardedTensors), local/ (dinov2's) and nocoll/ (DCP)."""
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    if rank == 0:
        for name in ("fsdp2", "fsdp1", "local"):
            (out / name).mkdir()
        torch.save(net().state_dict(), out / "whole.pt")
    dist.barrier()
    state = fully_shard(net(), mesh=init_device_mesh("cpu", (2,))).state_dict()
    torch.save(state, out / f"fsdp2/model_world_size_2_rank_{rank}.pt")
    dcp.save({"model": state, "step": 7}, checkpoint_id=out / "nocoll", use_collectives=False)
    one = FSDP(net(), device_id=torch.device("cpu"), use_orig_params=True)
    with FSDP.state_dict_type(one, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)):
        torch.save(one.state_dict(), out / f"fsdp1/model_rank{rank:05}.pt")
    with FSDP.state_dict_type(one, StateDictType.LOCAL_STATE_DICT, LocalStateDictConfig()):
        torch.save({"model": one.state_dict()}, out / f"local/model_final.rank_{rank}.pth")
    dist.destroy_process_group()
