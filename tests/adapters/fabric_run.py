"""A loop with Lightning's Fabric that saves through CheckpointManager: started again, it goes on.

`python -m tests.adapters.fabric_run FOLDER steps=N [keep=N]` writes FOLDER/result.pt when it is done.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.utils.data import TensorDataset

from core.checkpoint import CheckpointManager
from core.data import resumable
from core.training.ranks import WorldRanks


def run(folder: Path, steps: int, **settings: int) -> dict[str, Any]:
    """Train to the end and return what two runs must have in common."""
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=torch.distributed.is_torchelastic_launched() + 1)
    fabric.launch()
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 10), torch.randn(40, 1))
    model = torch.nn.Sequential(torch.nn.Linear(10, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    torch.manual_seed(fabric.global_rank)  # noise of its own on each rank
    model, optimizer = fabric.setup(model, optimizer)
    loader, losses = resumable(data, batch_size=4, seed=1), []
    also = {"scheduler": scheduler, "rng": "all", "losses": losses}
    with CheckpointManager("small", folder / "checkpoints", ranks=WorldRanks.joined(), **settings) as manager:
        begin = manager.load(model, optimizer, also=also)
        print(f"resumed at step {begin}", flush=True)
        for step, (x, y) in loader.steps(begin, steps):
            loss = (model(x) - y).square().mean()
            fabric.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if (step + 1) % 2 == 0:
                manager.save(model, optimizer, step=step + 1, also=also)
    made = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    if fabric.global_rank == 0:
        torch.save({**made, "noise": torch.get_rng_state()}, folder / "result.pt")
    return made


if __name__ == "__main__":
    run(Path(sys.argv[1]), **{key: int(value) for key, _, value in (word.partition("=") for word in sys.argv[2:])})
