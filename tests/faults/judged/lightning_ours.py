"""The run of lightning_trainer.py, with dropout, saved through ours: python lightning_ours.py FOLDER"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import TensorDataset

from core.adapters.lightning import lightning_checkpoints
from core.data import resumable
from tests.faults.judged.lightning_trainer import Small


def main(folder: Path) -> None:
    """Train three epochs of two steps, saving after each; go on from the newest step."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(1, verbose=False)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    saving = lightning_checkpoints("toy", folder, keep=9)
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", devices=1, callbacks=[saving], logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    loader = resumable(TensorDataset(inputs), 4, seed=1)
    trainer.fit(Small(dropout=0.2), loader, ckpt_path=saving.ckpt_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
