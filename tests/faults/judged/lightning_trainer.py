"""What people write with Lightning's Trainer and its own saving: python lightning_trainer.py FOLDER"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset


class Small(LightningModule):
    """Two layers, without dropout here: Lightning's checkpoints hold no states of random generators."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1)
        )

    def training_step(self, batch, _):
        """The mean square error of the sum of the inputs."""
        return torch.nn.functional.mse_loss(self.layers(batch[0]), batch[0].sum(1, keepdim=True))

    def configure_optimizers(self):
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class SayWhere(Callback):
    """Prints the step that training begins at; where nothing is left to do, only its end says so."""

    said = False

    def on_train_start(self, trainer, pl_module):
        """Print it."""
        self.said = True
        print(f"resumed at step {trainer.global_step}", flush=True)


def main(folder: Path) -> None:
    """Train three epochs of two steps, saving after each; go on from the last checkpoint."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(1, verbose=False)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    saving = ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1, save_last=True)
    where = SayWhere()
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", devices=1, callbacks=[where, saving], logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Small(), DataLoader(TensorDataset(inputs), batch_size=4), ckpt_path="last")
    if not where.said:
        print(f"resumed at step {trainer.global_step}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
