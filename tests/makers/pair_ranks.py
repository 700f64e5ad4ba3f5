"""Train on a resumable loader on several ranks: forked.py RANKS tests.makers.pair_ranks ROOT END BATCH_SIZE.

BATCH_SIZE is that of one rank. In a process that knows nothing of ranks, it trains alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from core.checkpoint import CheckpointManager
from core.data import resumable
from core.model import GPT
from core.networks.distributed import open_world
from core.training.fit import fit
from core.training.ranks import WorldRanks
from tests.makers.models import config


def main(words: list[str]) -> int:
    root, end, batch_size = Path(words[0]), int(words[1]), int(words[2])
    ids = torch.arange(40 * 17).reshape(40, 17) * 7919 % 20
    data = TensorDataset(ids[:, :-1], ids[:, 1:])
    with open_world("ddp" if "RANK" in os.environ else None) as world:
        torch.manual_seed(0)
        model = GPT(config(dropout=0.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with CheckpointManager("dante", root, ranks=WorldRanks(world)) as manager:
            model.step = manager.load(model, optimizer)
            fit(
                model,
                data_loader=resumable(data, batch_size, seed=3),
                val_loader=resumable(data, batch_size, seed=5),
                optimizer=optimizer,
                manager=manager,
                max_iters=end,
                eval_interval=4,
                eval_iters=3,
                lose_at_most=1e-3,  # below the time of a save: one after the other, on all ranks at the same steps
                world=world,
                progress=False,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
