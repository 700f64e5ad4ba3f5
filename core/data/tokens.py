"""Token ids of a text, and windows of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError


class Tokens:
    """Token ids in one or several arrays, mapped or in memory."""

    def __init__(self, arrays: Sequence[np.ndarray], *, vocab_size: int, where: str) -> None:
        self.arrays = [array for array in arrays if len(array)]
        self.vocab_size = vocab_size
        self.where = where

    def __len__(self) -> int:
        return sum(map(len, self.arrays))


class Windows:
    """Every run of `length` consecutive tokens, numbered from 0 array by array; no run crosses into another array.

    Raises: InputError with both numbers when no array is that long.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        self._tokens = tokens
        self._views = [
            np.lib.stride_tricks.sliding_window_view(array, length) for array in tokens.arrays if len(array) >= length
        ]
        self._ends = np.cumsum([len(view) for view in self._views], dtype=np.int64)
        if not self._views:
            longest = max(map(len, tokens.arrays), default=0)
            advice = f" or set --block_size to at most {longest - 1}" if longest > 1 else ""
            raise InputError(
                f"{tokens.where}: {longest:,} tokens, but block_size {length - 1:,} needs at least {length:,}. "
                f"Use a longer text{advice}."
            )
        self.count = int(self._ends[-1])

    def gather(self, numbers: np.ndarray) -> np.ndarray:
        """Copy the windows with these numbers, [B] to [B, length].

        Ids are checked against the vocabulary here, batch by batch: a check in advance would read the whole dataset.

        Raises: InputError for an id the vocabulary lacks.
        """
        if len(self._views) == 1:
            windows = self._views[0][numbers]
        else:
            shard = np.searchsorted(self._ends, numbers, side="right")
            windows = np.stack(
                [self._views[s][n - self._ends[s]] for s, n in zip(shard.tolist(), numbers.tolist(), strict=True)]
            )
        if windows.max() >= self._tokens.vocab_size:
            raise InputError(
                f"{self._tokens.where}: holds token id {windows.max():,}, but the vocabulary has "
                f"{self._tokens.vocab_size:,} ids. "
                "These tokens were made with another tokenizer; name it with --tokenization."
            )
        return windows
