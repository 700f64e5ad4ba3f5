"""Models of the speedrun tests: random checkpoints, loaded as a user loads a file, and ids in documents."""

from __future__ import annotations

import functools

import numpy as np
import torch

from core.model import GPTBatched, GPTFlexAttention
from tests.makers.modded_reference import HEAD, LAYERS, Weights, random_state, weights_of

VARIANTS = tuple(LAYERS)
VOCAB = 61
END = 3  # begins a document in the random texts

HIDDEN, LOGITS = 2e-5, 1e-4  # fp32 against float64, largest difference


def flex_of(state, variant, vocab=VOCAB, heads=1, end=END, room=2048, **settings):
    model = GPTFlexAttention(vocab, LAYERS[variant], heads, heads * HEAD, room, variant=variant, eos_token_id=end)
    model.load_state_dict(state, **settings)
    return model.eval()


@functools.cache
def random_checkpoint(variant, heads=1) -> tuple[dict[str, torch.Tensor], Weights]:
    state = random_state(variant, heads, VOCAB, seed=heads)
    return state, weights_of(state, variant)


def random_flex(variant, heads=1) -> GPTFlexAttention:
    return flex_of(random_checkpoint(variant, heads)[0], variant, heads=heads)


def random_batched(variant, heads=1, window="exact") -> GPTBatched:
    return GPTBatched.from_pretrained_gpt(random_flex(variant, heads), window=window).eval()


def packed(length, starts=(0,), seed=0) -> torch.Tensor:
    """Ids [T] with a document beginning at each of `starts`, and nowhere else."""
    ids = np.random.default_rng(seed).integers(0, VOCAB - 1, length)
    ids[ids >= END] += 1
    ids[list(starts)] = END
    return torch.from_numpy(ids)


def apart(a, b) -> float:
    """The largest difference of two arrays or tensors."""
    a, b = (np.asarray(x.detach().float() if isinstance(x, torch.Tensor) else x, np.float64) for x in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max())
