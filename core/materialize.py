"""From an open bundle to a live model: map the file, check what it holds, assign."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch

from core.bundle import OPTIMIZER, Bundle, check_fit
from core.commit import MODEL
from core.device import resolve_device
from core.errors import CheckpointDamaged, CheckpointMismatch
from core.model import GPT
from core.tokenizer import tokenizer_from_state

DESCRIPTORS = Path("/proc/self/fd")
"""Where Linux names open files by number: how an open file, rather than its name, is mapped."""


def read_torch_file(file: BinaryIO, where: Path) -> Any:
    """Load a torch file that is already open, mapped where the system can; nothing in it is executed.

    Mapped tensors are private: writing to them copies the page, never the file.

    Raises: CheckpointDamaged when the file cannot be read, or names something that is no tensor or plain value.
    """
    name = DESCRIPTORS / str(file.fileno())
    try:
        if name.exists():
            return torch.load(name, map_location="cpu", weights_only=True, mmap=True)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise CheckpointDamaged(f"{where}: holds something that is no tensor or plain value ({reason}).") from error
    except (RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointDamaged(f"{where}: no torch file that can be read ({error}).") from error


def load_model(
    bundle: Bundle,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    writable: bool = False,
    bpe_file: Path | None = None,
) -> GPT:
    """Build the model of a bundle, its tokenizer and step set, in eval mode.

    The model is built without memory and the mapped tensors take the place of its own. `writable` copies them out
    of the file, as training needs.

    Raises: CheckpointMismatch when config, tokenizer and tensors contradict each other, before anything is allocated.
    """
    if bundle.config is None:
        raise CheckpointMismatch(
            f"{bundle.path('config.json')}: model_class is {bundle.config_values['model_class']!r}, expected GPT. "
            "Build that model yourself and fill it with CheckpointManager.load(model)."
        )
    check_fit(bundle)
    target = resolve_device(device or bundle.config.device, str(bundle.path("config.json")))
    tensors = read_torch_file(bundle.files[MODEL], bundle.path(MODEL))
    if writable and target.type == "cpu" and dtype is None:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.device("meta"):
        model = GPT(bundle.config)
    if bundle.config.tied_head:
        tensors.setdefault("lm_head.weight", tensors["token_embedding_table.weight"])
    model.load_state_dict(tensors, assign=True)
    model.retie()
    model.to(device=target, dtype=dtype)
    model.requires_grad_(True)
    model.step = bundle.step
    if bundle.tokenizer is not None:
        model.tokenizer = tokenizer_from_state(bundle.tokenizer, bpe_file)
    return model.eval()


def load_optimizer(bundle: Bundle) -> dict[str, Any] | None:
    """Load the optimizer state of a bundle, mapped; None where the step has none."""
    if not bundle.has_optimizer:
        return None
    return read_torch_file(bundle.files[OPTIMIZER], bundle.path(OPTIMIZER))
