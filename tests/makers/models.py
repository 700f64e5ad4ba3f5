"""Small models and texts that several tests train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from core.checkpoint import CheckpointManager
from core.config.gpt import GPTConfig
from core.data.tokenizer import make_char

TEXT = "In the middle of the journey of our life I came to myself within a dark wood.\n"
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "dropout": 0.1, "device": "cpu"}


def tokenizer():
    return make_char([TEXT])


def manager(root: Path, name: str = "dante", **settings) -> CheckpointManager:
    return CheckpointManager(name, root, say=lambda line: None, **settings)


def started(root: Path, name: str = "dante", config=SMALL, **settings):
    """A manager that holds its lock, with its model and optimizer."""
    made = manager(root, name, **settings)
    model, optimizer, _ = made.initialize_for_training(dict(config), tokenizer(), None, 1e-3)
    return made, model, optimizer


def update(model, optimizer) -> None:
    """One optimizer step, a function of the model's step alone."""
    ids = torch.arange(8).reshape(1, 8) + model.step % 3
    torch.manual_seed(model.step)  # the dropout of this step
    model(ids, ids)[1].backward()
    optimizer.step()
    optimizer.zero_grad()
    model.step += 1


def train_and_save(made, model, optimizer, steps: int, **metrics) -> None:
    for _ in range(steps):
        update(model, optimizer)
        save_durably(made, model, optimizer, step=model.step, metrics={k: v(model.step) for k, v in metrics.items()})


def save_steps(root: Path, steps: int, name: str = "dante", config=SMALL, *, val_loss=None, **settings):
    """Train a model, save after each of so many steps, and close; returns the model and its optimizer."""
    made, model, optimizer = started(root, name, config, **settings)
    with made:
        train_and_save(made, model, optimizer, steps, **({"val_loss": val_loss} if val_loss else {}))
    return model, optimizer


def save_durably(made: CheckpointManager, *what, **values) -> None:
    """Save a step, and wait until it is on disk."""
    made.save(*what, **values)
    made.wait()


def flip(path: Path, byte: int, bit: int = 0) -> None:
    """Flip one bit of a file; the file gets an inode of its own, as damage on a disk would not reach its links."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    part = path.with_suffix(".flipped")
    part.write_bytes(data)
    part.replace(path)


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def config(**fields) -> GPTConfig:
    return GPTConfig.from_dict({**SMALL, "vocab_size": tokenizer().vocab_size, **fields})


def state_of(folder: Path) -> dict:
    return json.loads((folder / "training_state.json").read_text())


def kept(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step_*"))
