"""A training run of Lightning's Trainer that saves through LightningCheckpoints: started again, it goes on.

`python -m tests.adapters.lightning_run FOLDER [key=value ...]` trains a small model with dropout, of shuffled batches,
and writes FOLDER/result.pt when it is done. Keys: epochs, every, loader (resumable, stateful, plain), workers,
scheduler (step, epoch, plateau), val (none, epoch, middle), accumulation, limit (of an epoch), stop (at a step), and
rules of the manager.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from core.adapters.lightning import lightning_checkpoints
from core.data import resumable

for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Stopped(Exception):
    """In the place of a kill, within a process."""


class Net(LightningModule):
    """A small model; its loss draws from Python's generator as well."""

    def __init__(self, scheduler: str, stop: int | None, losses: list[float]) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(10, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        self.kind, self.stop, self.losses = scheduler, stop, losses

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        if self.trainer.global_step == self.stop:
            raise Stopped
        loss = (self.net(batch[0]) - batch[1]).square().mean() + random.random() * self.net[0].weight.sum()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean() + torch.rand(()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["losses"] = list(self.losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.losses[:] = checkpoint["losses"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        made = torch.optim.lr_scheduler
        if self.kind == "plateau":
            slow = made.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": slow, "monitor": "val_loss"}}
        interval = {"scheduler": made.CosineAnnealingLR(optimizer, 40), "interval": self.kind}
        return {"optimizer": optimizer, "lr_scheduler": interval}


def made_loader(kind: str, data: Any, workers: int) -> Any:
    if kind == "resumable":
        return resumable(data, 4, seed=3, num_workers=workers)
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(data, 4, shuffle=True, num_workers=workers)
    return DataLoader(data, 4, shuffle=True, num_workers=workers)


def run(folder: Path, stop: int | None = None, seed: int = 0, **keys: Any) -> dict[str, Any] | None:
    """Train to the end and return what two runs must have in common, or None where it stops at a step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data = TensorDataset(torch.randn(20, 10, generator=torch.Generator().manual_seed(5)), torch.ones(20, 1))
    random.seed(seed)
    torch.manual_seed(seed)
    losses: list[float] = []
    net = Net(keys.pop("scheduler", "step"), stop, losses)
    loader = made_loader(keys.pop("loader", "resumable"), data, keys.pop("workers", 0))
    val = {"none": {"limit_val_batches": 0}, "epoch": {}, "middle": {"val_check_interval": 2}}[keys.pop("val", "none")]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    epochs, accumulation, limit = keys.pop("epochs", 3), keys.pop("accumulation", 1), keys.pop("limit", None)
    checkpoints = lightning_checkpoints("small", folder / "checkpoints", every=keys.pop("every", 1), **keys)
    trainer = Trainer(
        callbacks=checkpoints,
        max_epochs=epochs,
        accumulate_grad_batches=accumulation,
        limit_train_batches=limit,
        devices=1 + torch.distributed.is_torchelastic_launched(),
        strategy="ddp" if torch.distributed.is_torchelastic_launched() else "auto",
        **val,
        **quiet,
    )
    try:
        validation = None if "limit_val_batches" in val else DataLoader(data, 10)
        trainer.fit(net, loader, validation, ckpt_path=checkpoints.ckpt_path)
    except Stopped:
        return None
    (optimizer,), (scheduler,) = trainer.optimizers, trainer.lr_scheduler_configs
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    return {**state, "scheduler": scheduler.scheduler.state_dict(), "noise": torch.get_rng_state()}


if __name__ == "__main__":

    def read(value: str) -> Any:
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value

    arguments = {key: read(value) for key, value in (word.split("=", 1) for word in sys.argv[2:])}
    made = run(Path(sys.argv[1]), **arguments)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(made, Path(sys.argv[1]) / "result.pt")
