"""Batches by counter: the tokens of step s are a function of the seed and s, so no state has to be saved."""

from __future__ import annotations

import numpy as np
import torch

from .randomness import draws, mix
from .tokens import Tokens, Windows

VALIDATION = 0x76616C
"""Mixed into the seed, so that validation batches are a stream of their own."""

ALL_ROWS = slice(None)


class DataLoader:
    """Random windows of the training and validation tokens, T = block_size, B = batch_size.

    Raises: InputError when the text is shorter than one block.
    """

    replays = validates = True

    def __init__(self, train: Tokens, val: Tokens, *, block_size: int, batch_size: int, seed: int) -> None:
        self.train, self.val = train, val
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self._train = Windows(train, block_size + 1)
        self._val = Windows(val, block_size + 1)

    def batch(self, step: int, micro: int = 0, rows: slice = ALL_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of one micro-step, int64 [B, T] each: a function of (seed, step, micro) alone.

        The global batch of a step is one sequence of draws; micro-step m takes numbers m*B to m*B + B - 1 of it, of
        which a rank takes its `rows`.
        """
        first, stop, _ = rows.indices(self.batch_size)
        return self._pair(self._train, self.seed, step, micro * self.batch_size + first, stop - first)

    def val_batch(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of validation batch i, int64 [B, T] each: a function of (seed, i) alone."""
        return self._pair(self._val, mix(self.seed, VALIDATION), i, 0, self.batch_size)

    def _pair(
        self, windows: Windows, seed: int, step: int, start: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = draws(seed, step, start, count) % np.uint64(windows.count)
        tokens = windows.gather(numbers.astype(np.int64))
        pair = np.empty((2, count, self.block_size), dtype=np.int64)
        pair[0], pair[1] = tokens[:, :-1], tokens[:, 1:]
        inputs, targets = torch.from_numpy(pair)
        return inputs, targets


class PackedLoader(DataLoader):
    """One packed sequence a batch, int64 [T]: documents as they stand in the data, the first cut anywhere."""

    def __init__(self, train: Tokens, val: Tokens, *, block_size: int, seed: int) -> None:
        super().__init__(train, val, block_size=block_size, batch_size=1, seed=seed)

    def _pair(
        self, windows: Windows, seed: int, step: int, start: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = super()._pair(windows, seed, step, start, count)
        return inputs[0], targets[0]
