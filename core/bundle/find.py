"""Which folders are models of ours, by the names of the files in them."""

from __future__ import annotations

from pathlib import Path

MODEL_FILES = ("config.json", "model.pt", "latest.pt", "final.pt", ".committed")
"""A folder with one of these is a model."""

_STEP = "step_"
"""How the names of kept steps begin."""


def is_model(folder: Path) -> bool:
    """Whether a folder may be a model of ours; of one that cannot be listed, whoever opens it says so."""
    try:
        return any(path.name in MODEL_FILES or path.name.startswith(_STEP) for path in folder.iterdir())
    except OSError:
        return True


def model_names(root: Path) -> list[str]:
    """List the models below a checkpoint root, by name."""
    try:
        folders = sorted(p for p in root.iterdir() if p.is_dir())
    except OSError:
        return []
    return [p.name for p in folders if is_model(p)]
