"""A training run with accelerate that saves through AcceleratorCheckpoints: started again, it goes on.

`python -m tests.adapters.accelerate_run FOLDER [key=value ...]` trains a small model with dropout, of shuffled batches,
and writes FOLDER/result.pt when it is done. Keys: epochs, accumulation, every, seedable, workers, batch, and
rules of the manager. Under torchrun it runs on several processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from core.adapters.accelerate import AcceleratorCheckpoints


def run(folder: Path, stop: int | None = None, **keys: Any) -> dict[str, Any] | None:
    """Train to the end and return what two runs must have in common, or None where it stops at a step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loading = DataLoaderConfiguration(use_seedable_sampler=bool(keys.pop("seedable", False)))
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=keys.pop("accumulation", 2), dataloader_config=loading
    )
    data = torch.utils.data.TensorDataset(torch.randn(36, 10), torch.randn(36, 1))
    model = torch.nn.Sequential(torch.nn.Linear(10, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    loader = torch.utils.data.DataLoader(data, keys.pop("batch", 4), shuffle=True, num_workers=keys.pop("workers", 0))
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    losses: list[float] = []
    epochs, every = keys.pop("epochs", 3), keys.pop("every", 2)
    with AcceleratorCheckpoints(accelerator, "small", folder / "checkpoints", loader, **keys) as checkpoints:
        step = checkpoints.load(also={"losses": losses})
        for _ in checkpoints.epochs(epochs):
            for x, y in checkpoints.batches():
                with accelerator.accumulate(model):
                    loss = (model(x) - y).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
                if not accelerator.sync_gradients:
                    continue
                step += 1
                if step % every == 0:
                    checkpoints.save(step, also={"losses": losses})
                if step == stop:
                    return None
            torch.rand(1)  # like an evaluation between two epochs
    state = {"model": accelerator.unwrap_model(model).state_dict(), "optimizer": optimizer.state_dict()}
    return {**state, "scheduler": scheduler.state_dict(), "losses": losses, "noise": torch.get_rng_state()}


if __name__ == "__main__":
    arguments = {key: json.loads(value) for key, value in (word.split("=", 1) for word in sys.argv[2:])}
    made = run(Path(sys.argv[1]), **arguments)
    if int(torch.distributed.is_initialized() and torch.distributed.get_rank()) == 0:
        torch.save(made, Path(sys.argv[1]) / "result.pt")
