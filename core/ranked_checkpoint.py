"""The checkpoints of a model that several ranks train: the first one writes, and chooses what all resume from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.bundle import Bundle, open_bundle
from core.checkpoint import CheckpointManager
from core.distributed import World
from core.errors import CheckpointMismatch
from core.legacy import open_legacy
from core.tokenizer import Tokenizer


class RankedManager(CheckpointManager):
    """A CheckpointManager on every rank. The first one holds the lock and writes; the others read what it chose."""

    def __init__(self, model_name: str, base_dir: str | Path, *, world: World, **settings: Any) -> None:
        super().__init__(model_name, base_dir, **settings)
        self.world = world

    def acquire(self) -> None:
        """Become the only writer of this model; on the first rank."""
        if self.world.is_first:
            super().acquire()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer while the block runs; on the first rank."""
        with super().writing() if self.world.is_first else contextlib.nullcontext():
            yield

    def go_back(self, step: int) -> None:
        """Make a kept step the newest one again; on the first rank, whose choice of what to resume follows."""
        if self.world.is_first:
            super().go_back(step)

    def newest_intact(self) -> Bundle | None:
        """Open the newest intact step on every rank: the first one chooses it, the others check that they see the same.

        Raises: CheckpointDamaged as for one process, CheckpointMismatch when a rank finds something else.
        """
        if self.world.is_first:
            bundle = super().newest_intact()
            self.world.from_first(_identity(bundle))
            return bundle
        chosen = self.world.from_first()
        return None if chosen is None else self._open_chosen(chosen)

    def _open_chosen(self, chosen: dict[str, Any]) -> Bundle:
        single = chosen["single"]
        bundle = open_bundle(self.checkpoint_dir) if single is None else open_legacy(self.get_path(single))
        found = _identity(bundle)
        if found != chosen:
            bundle.close()
            names = [name for name in chosen if found and found[name] != chosen[name]]
            here, there = ({name: values[name] for name in names} for values in (found or {}, chosen))
            raise CheckpointMismatch(
                f"{self.checkpoint_dir}: found {here}, expected {there} as on rank 0. All ranks need the same folder "
                "of checkpoints, on a file system that they share."
            )
        return bundle

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Mapping[str, Any] | None = None,
        *,
        step: int,
        tokenizer: Tokenizer | Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
        ema: Mapping[str, torch.Tensor] | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> bool:
        """Begin to commit a step, which the first rank has whole; the others go on at once."""
        if not self.world.is_first:
            return True
        return super().save(
            model,
            optimizer,
            step=step,
            tokenizer=tokenizer,
            metrics=metrics,
            extra=extra,
            ema=ema,
            before_commit=before_commit,
        )

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record what was measured of the newest step after it was saved; on the first rank."""
        if self.world.is_first:
            super().add_metrics(step, metrics)


def _identity(bundle: Bundle | None) -> dict[str, Any] | None:
    """What makes two openings of a checkpoint the same one."""
    if bundle is None:
        return None
    return {
        "single": bundle.single,
        "step": bundle.step,
        "commit_id": bundle.state.get("commit_id"),
        "config": bundle.config_values,
        "sizes": bundle.sizes,
    }
