"""Files as modded-nanogpt saves them, made of random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from core.networks.flex import GPTFlexAttention
from tests.makers.modded_models import VOCAB, flex_of
from tests.makers.modded_reference import random_state


def flex_model(variant: str = "small", vocab: int = VOCAB) -> GPTFlexAttention:
    """A model of upstream's depth and one head; no weight is where it starts."""
    return flex_of(random_state(variant, vocab=vocab), variant, vocab)


def upstream_state(variant: str = "small", vocab: int = VOCAB, prefix: str = "_orig_mod.") -> dict[str, torch.Tensor]:
    """Its tensors as the program saves them, embeddings and (medium) matrices in bf16."""
    return {prefix + name: tensor for name, tensor in random_state(variant, vocab=vocab).items()}


def upstream_file(path: Path, variant: str = "small", vocab: int = VOCAB, step: int = 1770, **changes) -> Path:
    """Save a model as the program does; `changes` are tensors to put in, or None to leave out."""
    state = upstream_state(variant, vocab)
    for name, tensor in changes.items():
        if tensor is None:
            del state[f"_orig_mod.{name}"]
        else:
            state[f"_orig_mod.{name}"] = tensor
    torch.save({"step": step, "code": "", "model": state, "optimizers": []}, path)
    return path
