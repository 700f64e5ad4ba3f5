"""Training runs in this process: their data, one call of `fit`, and what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from core.checkpoint import CheckpointManager
from core.data.dataloader import DataLoader
from core.data.tokens import Tokens
from core.training.fit import FitResult, fit
from tests.makers.models import TEXT, equal, tokenizer


def loader(text: str = TEXT * 50, seed: int = 1, batch_size: int = 4) -> DataLoader:
    """Batches of a text, which validates too."""
    tokens = Tokens([tokenizer().encode(text)], vocab_size=tokenizer().vocab_size, where="test text")
    return DataLoader(tokens, tokens, block_size=16, batch_size=batch_size, seed=seed)


def fitted(run: tuple[CheckpointManager, torch.nn.Module, torch.optim.Optimizer], end: int, **settings) -> FitResult:
    """Train what `started` gave up to a step, with few evaluations unless told otherwise, and close its manager."""
    made, model, optimizer = run
    how = {"data_loader": loader(), "eval_interval": 100, "eval_iters": 1, "progress": False, **settings}
    with made:
        return fit(model, optimizer=optimizer, manager=made, max_iters=end, **how)


def bits(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All tensors of a checkpoint: weights, and the optimizer's state."""
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
    return torch.load(folder / "model.pt", weights_only=True), moments


def same(a: tuple, b: tuple) -> bool:
    return equal(a[0], b[0]) and equal(a[1], b[1])


def logged(folder: Path, key: str = "loss") -> dict[int, float]:
    """A number of the log by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def losses(root: Path, name: str = "dante") -> dict[int, float]:
    """The losses by step, each step of which has one line."""
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    found = logged(root / name)
    assert list(found) == list(range(1, len(found) + 1)), "gaps"
    assert sum("loss" in json.loads(line) for line in lines) == len(found), "duplicates"
    return found


def best(root: Path) -> dict:
    return json.loads((root / "killed/training_state.json").read_text())["best"]
