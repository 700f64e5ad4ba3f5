"""The pairs (x, y) of a torch DataLoader, as the loop asks for them: by step and micro-step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader as TorchLoader

from ..console.commands import typed
from ..data.dataloader import ALL_ROWS, DataLoader
from ..data.resumable_loader import ResumableLoader
from ..errors import InputError
from ..model import GPT, GPTFlexAttention
from ..networks.distributed import Share, World
from .settings import Settings

Pair = tuple[torch.Tensor, torch.Tensor]

NOT_REPLAYED = typed(
    "data_loader: the batches of this torch DataLoader are not a function of the step. A resume is exact in everything "
    "else, and takes its batches from the beginning; those of core.data.resumable are exact from any step."
)


class PairLoader:
    """A torch DataLoader in the place of ours. Step s takes batches s*A to s*A + A - 1 of it, A micro-steps a step.

    Where it is one of `core.data.resumable`, a batch is a function of its number; any other is gone through in its own
    order, again and again, from its beginning in each call of `fit`.
    """

    block_size = None

    def __init__(
        self, pairs: TorchLoader[Any], validation: TorchLoader[Any] | None, accumulation: int, packed: bool = False
    ) -> None:
        self._loader, self._validation = pairs, validation
        self._accumulation, self._packed = accumulation, packed
        order = pairs.order if isinstance(pairs, ResumableLoader) else None
        self.seed = order.seed if order else Settings().seed
        self.batch_size: int | None = order.batch_size if order else pairs.batch_size
        self.replays = order is not None
        """Whether a batch is a function of its number."""
        self.validates = validation is not None
        self._pairs: Iterator[Any] | None = None
        self._next = 0
        self._fetched: dict[int, Pair] = {}  # a certificate looks at the batches of the next step
        self._val_pairs: Iterator[Any] = iter(())
        self._last_val = math.inf

    def batch(self, step: int, micro: int = 0, rows: slice = ALL_ROWS) -> Pair:
        """Inputs and targets of one micro-step of this rank, int64 [B, T] each; its rows are all its own.

        Raises: InputError for what is no pair of ids.
        """
        number = step * self._accumulation + micro
        self._fetched = {n: pair for n, pair in self._fetched.items() if n >= number}
        if number not in self._fetched:
            if self._pairs is None or (self.replays and number != self._next):
                self._pairs, self._next = _endless(self._loader, "data_loader", number), number
            self._fetched[number] = self._pair(next(self._pairs), "data_loader")
            self._next += 1
        return self._fetched[number]

    def val_batch(self, i: int) -> Pair:
        """Inputs and targets of validation batch i; an evaluation asks for them in their order, from the beginning."""
        assert self._validation is not None
        if i <= self._last_val:
            self._val_pairs = _endless(self._validation, "val_loader")
        self._last_val = i
        return self._pair(next(self._val_pairs), "val_loader")

    def share(self, world: World) -> Share:
        """The part of a rank: each has a loader with batches of its own.

        Raises: InputError for a resumable loader that was made for another number of ranks.
        """
        if isinstance(self._loader, ResumableLoader) and self._loader.order.world != world.size:
            raise InputError(
                f"data_loader: made for {self._loader.order.world} ranks, this run has {world.size}. Make it with "
                "their rank and world_size."
            )
        return Share(range(self._accumulation), ALL_ROWS)

    def close(self, step: int) -> None:
        """End the workers, and leave a resumable loader where the batches of `step` steps end."""
        self._pairs = None
        if isinstance(self._loader, ResumableLoader):
            self._loader.start_at(step * self._accumulation)

    def _pair(self, batch: Any, name: str) -> Pair:
        ids = [t for t in batch if isinstance(t, torch.Tensor)] if isinstance(batch, (tuple, list)) else []
        if self._packed:
            ids = [t.squeeze(0) if t.dim() == 2 else t for t in ids]
        shapes = [tuple(t.shape) for t in ids]
        expected, dims = ("[T]", 1) if self._packed else ("[B, T]", 2)
        if len(ids) != 2 or len(batch) != 2 or shapes[0] != shapes[1] or len(shapes[0]) != dims:
            found = f"{type(batch).__name__} {shapes}" if shapes else type(batch).__name__
            raise InputError(f"{name}: a batch is a {found}, expected a pair (x, y) of ids {expected} each.")
        if any(t.is_floating_point() for t in ids):
            raise InputError(
                f"{name}: a batch has {[str(t.dtype) for t in ids]}, expected ids, which are whole numbers."
            )
        x, y = (t.long().contiguous() for t in ids)
        return x, y


def _endless(loader: TorchLoader[Any], name: str, start: int = 0) -> Iterator[Any]:
    """The batches of a loader from a number on, or where it has none, from its beginning, again and again."""
    if isinstance(loader, ResumableLoader):
        yield from (batch for _, batch in loader.steps(start))
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise InputError(f"{name}: a torch DataLoader without a batch, expected at least one.")


def batches_of(
    data_loader: Any, val_loader: TorchLoader[Any] | None, accumulation: int, model: GPT | GPTFlexAttention
) -> DataLoader | PairLoader:
    """Give the loop its batches: ours as they are, those of a torch DataLoader as pairs.

    Raises: InputError for a val_loader beside a loader of ours, which has its own.
    """
    if isinstance(data_loader, TorchLoader):
        return PairLoader(data_loader, val_loader, accumulation, isinstance(model, GPTFlexAttention))
    if val_loader is not None:
        raise InputError("val_loader: found one beside a data_loader that has batches to validate with. Leave it out.")
    ours: DataLoader = data_loader
    return ours
