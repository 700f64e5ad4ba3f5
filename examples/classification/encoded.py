"""Encoded texts: labelled rows as token ids, and the rows that each step of a training run sees.

Shapes: B rows of a batch, T positions of the longest of them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.data.randomness import draws, mix
from core.data.tokenizer import Tokenizer
from core.errors import InputError
from examples.classification.labelled import LabelledTexts

ORDER = 0x6F72
"""Mixed into the seed, so that the order of rows has a random stream of its own."""

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """Rows as token ids, and the number of their class."""

    ids: list[np.ndarray]
    labels: np.ndarray  # int64 [N]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, numbers: Sequence[int] | np.ndarray, device: torch.device) -> Batch:
        """Tokens [B, T], mask [B, T] and labels [B] of the rows with these numbers, padded on the right."""
        rows = [self.ids[i] for i in numbers]
        tokens = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        mask = np.zeros(tokens.shape, dtype=bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        on_device = [torch.from_numpy(array).to(device) for array in (tokens, mask, self.labels[numbers])]
        return on_device[0], on_device[1], on_device[2]

    def step(self, seed: int, step: int, batch_size: int, device: torch.device) -> Batch:
        """The batch of a training step: a function of (seed, step), every row once in each epoch.

        The last batch of an epoch may be smaller.
        """
        epoch, number = divmod(step, -(-len(self) // batch_size))
        order = _order(seed, epoch, len(self))
        return self.batch(order[number * batch_size : (number + 1) * batch_size], device)

    def fingerprint(self) -> str:
        """SHA-256 of all ids and labels, by which a resume checks whether the data is the same."""
        digest = hashlib.sha256(self.labels.astype("<i8").tobytes())
        for row in self.ids:
            digest.update(len(row).to_bytes(8, "little") + row.astype("<i8").tobytes())
        return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.argsort(draws(mix(seed, ORDER), epoch, 0, rows), kind="stable")


def encode(
    rows: LabelledTexts, classes: Sequence[str], tokenizer: Tokenizer, max_length: int, unknown: str = "error"
) -> EncodedTexts:
    """Turn rows into ids: the end-of-text token, which begins documents, then the texts, separated by it.

    If a vocabulary lacks that token, a line break (or a space) separates the texts and nothing comes first. In a row
    with more than `max_length` ids, the ends of the longest texts are dropped.

    Raises: InputError naming the row whose class or character is unknown, or that has no tokens.
    """
    end = getattr(tokenizer, "end_of_text", None)
    start = np.array([] if end is None else [end], dtype=np.int64)
    between = start if end is not None else _mark(tokenizer)
    room = max_length - len(start) - len(between) * (len(rows.columns) - 1)
    if room < len(rows.columns):
        raise InputError(f"--max_length: found {max_length}, which leaves no room for {len(rows.columns)} texts.")
    labels = rows.class_numbers(classes)
    encoded = []
    for texts, line in zip(rows.texts, rows.lines, strict=True):
        where = f"{rows.path}, line {line}"
        parts = [tokenizer.encode(text, unknown, where) for text in texts]
        if not any(map(len, parts)):
            raise InputError(f"{where}: no tokens in {', '.join(rows.columns)}, expected a text. Remove the row.")
        kept = [part[:share] for part, share in zip(parts, shares([len(part) for part in parts], room), strict=True)]
        pieces = [start, kept[0]]
        for part in kept[1:]:
            pieces += [between, part]
        encoded.append(np.concatenate(pieces).astype(np.int64))
    return EncodedTexts(encoded, labels)


def shares(lengths: Sequence[int], room: int) -> list[int]:
    """Divide room among texts: short ones stay whole, long ones are cut to the same length, give or take 1."""
    kept = [0] * len(lengths)
    for done, i in enumerate(sorted(range(len(lengths)), key=lambda i: lengths[i])):
        kept[i] = min(lengths[i], room // (len(lengths) - done))
        room -= kept[i]
    return kept


def _mark(tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a line break, of a space where the vocabulary lacks that, or none."""
    for mark in "\n ":
        if len(ids := tokenizer.encode(mark, unknown="skip")):
            return ids.astype(np.int64)
    return np.array([], dtype=np.int64)
