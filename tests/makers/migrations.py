"""Folders of single-file checkpoints to migrate, and what is in them before and after."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from core.conversion.migration.migrate import migrate
from core.conversion.migration.plan import find
from core.model import GPT
from tests.makers.generations import SIZES, TOKENIZER, LectureGPT, trained, write_single_file
from tests.makers.models import save_durably
from tests.makers.old_runs import manager


def lecture(seed: int = 0, steps: int = 2, **settings):
    model = LectureGPT(**SIZES, seed=seed, **settings)
    return model, trained(model, steps)


def write(folder: Path, name: str, step: int | None, *, seed: int | None = None, optimizer: bool = True, **settings):
    """A single file of a model that is another one for every seed, which is the step unless given."""
    model, moments = lecture(step if seed is None else seed)
    write_single_file(folder / name, model, moments if optimizer else None, step=step, **settings)
    return model


def edit(path: Path, change) -> Path:
    """Rewrite a torch file with its content changed."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def migrated(folder: Path, **of) -> dict:
    """Migrate what is in a folder; outcomes by file name."""
    found = find([folder])
    assert set(found.folders) <= {folder}
    return {o.path.name: o for paths in found.folders.values() for o in migrate(folder, paths, **of)}


def bits(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """The weights of a step, as plain torch reads them."""
    place = folder if step is None else folder / f"step_{step:08d}"
    return torch.load(place / "model.pt", weights_only=True)


def listing(folder: Path) -> dict[str, tuple]:
    """Every file below a folder: its bytes, its time and its inode; all but the lock."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), *_stamps(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def _stamps(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_ino


def plain(model) -> dict[str, torch.Tensor]:
    """The weights of a model of old, without its masks."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("tril")}


def bundle_at(folder: Path, step: int, seed: int = 0, **extra) -> dict[str, torch.Tensor]:
    """A bundle of ours at a step; its weights."""
    with manager(folder.parent) as made:
        model = fused(seed)
        save_durably(made, model, step=step, tokenizer=TOKENIZER, **extra)
    return {name: t.clone() for name, t in model.state_dict().items()}


def fused(seed: int) -> GPT:
    from core.config.gpt import GPTConfig

    torch.manual_seed(seed)
    return GPT(GPTConfig.from_dict({**SIZES, "activation": "relu", "proj_bias": True, "device": "cpu"}))


def fresh(folder: Path) -> None:
    write(folder, "latest.pt", 30)
    write(folder, "final.pt", 20)
