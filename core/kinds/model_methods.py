"""The methods of GPT that touch files: load, load_legacy, save, save_checkpoint_bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..bundle.bundle import ALL_PARTS, Bundle, open_bundle
from ..bundle.choice import holds_bundle
from ..bundle.commit import MODEL, ModelFolder
from ..bundle.intact import open_chosen, say_on_stderr
from ..bundle.storage import DISK
from ..bundle.writing import explained, writing
from ..data.tokenizer import Tokenizer
from ..errors import SaveFailed
from ..loading.tensors import load_model, load_optimizer
from ..model import GPT
from ..networks.device import resolve_dtype
from ..networks.state_dict import export_state_dict
from ..saving.block_memory import Memory
from ..saving.step import StepContent, StepSave
from ..saving.torch_file import write_torch_zip


def load(
    checkpoint_dir: str | Path,
    map_location: str | torch.device | None = None,
    load_dtype: str | torch.dtype | None = None,
) -> tuple[GPT, dict[str, Any] | None, int, dict[str, Any] | None]:
    """Load the newest step of a folder, bundle or single file: model, tokenizer state, step, optimizer state.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointMismatch.
    """
    with open_chosen(Path(checkpoint_dir), used=ALL_PARTS) as bundle:
        return _loaded(bundle, map_location, load_dtype)


def load_legacy(
    path: str | Path, map_location: str | torch.device | None = None
) -> tuple[GPT, dict[str, Any] | None, int, dict[str, Any] | None]:
    """Load a single-file checkpoint of any generation: model, tokenizer state, step, optimizer state.

    The optimizer state is that of the model's own parameters, in their order and with their names, under the
    hyper-parameters of the file.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointMismatch.
    """
    path = Path(path)
    with open_chosen(path.parent, single=path.name, used=ALL_PARTS) as bundle:
        return _loaded(bundle, map_location, None)


def _loaded(
    bundle: Bundle, map_location: str | torch.device | None, load_dtype: str | torch.dtype | None
) -> tuple[GPT, dict[str, Any] | None, int, dict[str, Any] | None]:
    model = load_model(bundle, device=map_location, dtype=resolve_dtype(load_dtype), writable=True)
    return model, bundle.tokenizer, bundle.step, load_optimizer(bundle)


def save(model: GPT, checkpoint_dir: str | Path) -> None:
    """Write the weights as `model.pt`, durable when this returns and never partly visible.

    Inside an existing bundle this commits a new one, with the same config and tokenizer and no optimizer.

    Raises: SaveFailed, CheckpointLocked.
    """
    place = ModelFolder(Path(checkpoint_dir))
    if holds_bundle(place):
        save_checkpoint_bundle(model, checkpoint_dir)
        return
    path = place.path / MODEL
    with writing(place):
        try:
            with DISK.published(path) as part, DISK.create(part) as output:
                write_torch_zip(output, export_state_dict(model))
        except OSError as error:
            raise SaveFailed(f"{path}: {error.strerror}. A file that was there before is unchanged.") from error


def save_checkpoint_bundle(
    model: GPT,
    checkpoint_dir: str | Path,
    step: int | None = None,
    optimizer_state: dict[str, Any] | None = None,
) -> None:
    """Commit the model as the newest step of a folder, durably; `step` is the model's own unless given.

    Raises: SaveFailed, CheckpointLocked, InputError.
    """
    place = ModelFolder(Path(checkpoint_dir))
    tokenizer: Tokenizer | dict[str, Any] | None = model.tokenizer
    if tokenizer is None and holds_bundle(place):
        with open_bundle(place.path) as bundle:
            tokenizer = bundle.tokenizer
    content = StepContent(model, optimizer_state, model.step if step is None else step, tokenizer)
    with writing(place), explained(place.path):
        StepSave(place, content).write(Memory(None), say_on_stderr)
