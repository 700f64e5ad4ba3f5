"""Save and load random generators on several ranks: forked.py RANKS tests.makers.also_ranks ROOT ddp|fsdp.

Each rank writes what it draws after the save and after the load, what it loaded and was told, to ROOT/<rank>.json.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from torch import distributed, nn

from core.checkpoint import CheckpointManager
from core.errors import InputError
from core.networks.distributed import whole
from core.training.ranks import WorldRanks


def main(words: list[str]) -> int:
    root, parallel = words
    distributed.init_process_group("gloo")
    rank, lines = distributed.get_rank(), []
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4))
    if parallel == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters())
    random.seed(rank)
    torch.manual_seed(rank)
    with CheckpointManager("net", root, ranks=WorldRanks.joined(parallel), say=lines.append) as manager:
        states = {"same": {"epoch": 3}, "own": [rank, torch.full((2,), rank, dtype=torch.uint32)]}
        manager.save(net, optimizer, step=1, also={"rng": "all", **states})
        manager.wait()
        saved = [random.random(), torch.rand(1).item()]
        refuse_unlike(manager, net, rank, lines)
        weights = {name: whole(value).clone() for name, value in net.state_dict().items()}
        nn.init.zeros_(net[0].weight)
        same, own = {}, [None, torch.zeros(2, dtype=torch.uint32)]
        assert manager.load(net, optimizer, also={"rng": "all", "same": same, "own": own}) == 1
        assert all(torch.equal(whole(value), weights[name]) for name, value in net.state_dict().items())
        loaded = [random.random(), torch.rand(1).item()]
    told = {"saved": saved, "loaded": loaded, "same": same, "own": [own[0], own[1].tolist()], "lines": lines}
    Path(root, f"{rank}.json").write_text(json.dumps(told))
    distributed.barrier()
    distributed.destroy_process_group()
    return 0


def refuse_unlike(manager: CheckpointManager, net: nn.Module, rank: int, lines: list[str]) -> None:
    """Save what differs between ranks in its names, and what only one rank cannot save."""
    for also in ({f"of{rank}": {}}, {"x": print if rank else {}}):
        try:
            manager.save(net, step=2, also=also)
        except InputError as error:
            lines.append(str(error))
    try:
        CheckpointManager("alone", manager.checkpoint_dir.parent).save(net, step=2, also={"rng": "all"})
    except InputError as error:
        lines.append(str(error))
