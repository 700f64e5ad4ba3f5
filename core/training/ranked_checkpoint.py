"""The checkpoints of a model that several ranks train: the first one commits, and chooses what all resume from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bundle import intact
from ..bundle.bundle import ALL_PARTS, Bundle, open_bundle
from ..bundle.choice import choose
from ..bundle.legacy import open_legacy
from ..bundle.parts import files_of
from ..bundle.verify import verify as verify_files
from ..checkpoint import CheckpointManager
from ..console.words import size_text
from ..data.tokenizer import Tokenizer
from ..errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, SaveFailed
from ..kinds import gpt as start
from ..loading.fsdp import averages, build_spread, fill_moments, optimizer_state
from ..model import GPT
from ..networks.distributed import World
from ..saving.consolidate import consolidate
from ..saving.sharded_step import ShardSave


class RankedManager(CheckpointManager):
    """A CheckpointManager on every rank. The first one holds the lock and commits; the others read what it chose.

    Where each rank has a shard of the model, each writes its own, and a step is committed when all are durable.
    """

    def __init__(self, model_name: str, base_dir: str | Path, *, world: World, **settings: Any) -> None:
        super().__init__(model_name, base_dir, **settings)
        self.world = world
        self._beside = world.beside() if world.is_sharded else world
        self._averages: dict[str, torch.Tensor] | None = None

    def acquire(self) -> None:
        """Become the only writer of this model; on the first rank."""
        if self.world.is_first:
            super().acquire()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer while the block runs; on the first rank."""
        with super().writing() if self.world.is_first else contextlib.nullcontext():
            yield

    # Resume

    def go_back(self, step: int) -> None:
        """Make a kept step the newest one again; on the first rank, whose choice of what to resume follows."""
        if self.world.is_first:
            super().go_back(step)

    def newest_intact(self) -> Bundle | None:
        """Open the newest intact step on every rank: the first one chooses it, the others check that they see the same.

        Raises: CheckpointDamaged as for one process, CheckpointMismatch when a rank finds something else.
        """
        fault = self._verify_together() if self.verify else None
        if self.world.is_first:
            if fault and not self.allow_fresh:
                with self.writing(), self._explained():
                    bundle: Bundle | None = intact.walk_back(self._folder, CheckpointDamaged(fault), self.say)
            else:
                asked = self.verify
                self.verify = asked and fault != ""  # what all ranks have compared is not compared again
                try:
                    bundle = super().newest_intact()
                finally:
                    self.verify = asked
            self.world.from_first(_identity(bundle))
            return bundle
        chosen = self.world.from_first()
        return None if chosen is None else self._open_chosen(chosen)

    def _verify_together(self) -> str | None:
        """Verify the shards of the newest step, each rank some files: what is damaged, "" for nothing.

        None where there are no shards, or they cannot be opened: then the first rank looks by itself.
        """
        said = None
        if self.world.is_first:
            with self.writing(), contextlib.suppress(CheckpointError, OSError):
                candidates = choose(self.checkpoint_dir).candidates
                if candidates and candidates[0].single is None:
                    with open_bundle(self.checkpoint_dir) as bundle:
                        said = _identity(bundle) if bundle.is_sharded else None
        said = self.world.from_first(said)
        if said is None:
            return None
        faults = [fault for fault in self.world.to_first(self._verify_own(said)) if fault]
        return " ".join(faults)

    def _verify_own(self, chosen: dict[str, Any]) -> str:
        try:
            with self._open_chosen(chosen) as bundle:
                files = sorted(name for part in ALL_PARTS for name in files_of(part, bundle.files))
                verify_files(bundle, tuple(files[self.world.rank :: self.world.size]))
        except (CheckpointError, OSError) as error:
            return f"rank {self.world.rank}: {error}"
        return ""

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

    def _resume(
        self, bundle: Bundle, given: dict[str, Any], tokenization: str | Tokenizer
    ) -> tuple[GPT, dict[str, Any] | None]:
        if not self.world.is_sharded:
            return super()._resume(bundle, given, tokenization)
        start.prepare(bundle, given, tokenization)
        return build_spread(bundle, self.world), optimizer_state(bundle)

    def _fill(self, bundle: Bundle, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        if self.world.is_sharded:
            fill_moments(bundle, model, optimizer, self.world)
            self._averages = averages(bundle, model, self.world)

    def went_on_from(self, bundle: Bundle) -> None:
        """Remember the step that training goes on from, and this rank's part of the average of its weights."""
        if not self.world.is_sharded:
            super().went_on_from(bundle)
            return
        self.resumed, self.averages = bundle.state, self._averages

    def _spread(self, model: GPT) -> None:
        if self.world.is_sharded:
            self.world.spread(model, next(model.parameters()).device.type)

    def consolidate(self) -> None:
        """Make plain files of the newest step, which lies in shards; on the first rank, after the last save."""
        if not self.world.is_first:
            return
        with self.writing(), self._explained():
            made = consolidate(self._folder)
        if made is not None:
            with made:
                self.say(f"step {made.step} is in plain files now ({size_text(sum(made.sizes.values()))})")

    # Save: each rank copies and writes its shards, and none waits for another before the step is committed

    def _may_begin(self, step: int) -> bool:
        """As for one process, and the same on all ranks: one that knows of a failure does not begin without the others.

        Raises: SaveFailed, on all ranks that have not heard of it, when the save before this one was not committed.
        """
        if not self.world.is_sharded:
            return not self.world.is_first or super()._may_begin(step)
        if self.save_policy == "skip" and self.world.any(self._saver.busy):
            self.say(f"step {step} is not saved: the save before it is still being written")
            return False
        self._saver.join()
        if self.world.any(self._saver.failed):
            self.raise_failed()
            self.say(f"step {step} is not saved: the save before it failed")
            return False
        return True

    def _begin(self, model: nn.Module, optimizer: Any, **what: Any) -> None:
        if not self.world.is_sharded:
            if self.world.is_first:
                super()._begin(model, optimizer, **what)
            return
        assert isinstance(optimizer, torch.optim.Optimizer)
        save = ShardSave(self._beside, self._folder, model, optimizer, **what)
        try:
            self._start(save, optimizer, contextlib.ExitStack())
        except SaveFailed as error:  # the other ranks have begun: this one cannot go on without them
            raise CheckpointError(str(error)) from error

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
