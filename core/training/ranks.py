"""The ranks of a run and one model's folder: the first commits and chooses what all resume from."""

from __future__ import annotations

import contextlib
from typing import Any

from ..bundle.bundle import ALL_PARTS, Bundle, open_bundle
from ..bundle.choice import choose
from ..bundle.commit import ModelFolder
from ..bundle.legacy import open_legacy
from ..bundle.parts import files_of
from ..bundle.verify import verify
from ..errors import CheckpointError, CheckpointMismatch
from ..networks.distributed import World
from ..saving.background import BackgroundSaver
from ..saving.ranks import Ranks, Reopen, Say
from ..saving.sharded_step import ShardedStepSave
from ..saving.step import StepContent, StepSave


class WorldRanks(Ranks):
    """The strategy of a manager on each rank of a world: the first holds the lock, the others read what it chose.

    Where each rank has a shard of the model, each writes its own, and a step is committed when all are durable: no rank
    waits for another before that.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._beside = world.beside() if world.is_sharded else world

    @classmethod
    def joined(cls, parallel: str = "ddp") -> WorldRanks:
        """The strategy for a program that has called `torch.distributed.init_process_group` itself, on every rank.

        Every rank then makes a manager, saves and loads; the first one writes. Without a group it is one process.
        """
        return cls(World.joined(parallel))

    def newest_intact(self, place: ModelFolder, reopen: Reopen, check: bool) -> Bundle | None:
        """Open the newest intact step on every rank: the first chooses it, the others check that they see the same.

        Raises: CheckpointDamaged as for one process, CheckpointMismatch when a rank finds something else.
        """
        damage = self._verify_together(place) if check else None
        if self.world.is_first:
            bundle = reopen(check and damage != "", damage)  # the ranks have compared checksums already
            self.world.from_first(_identity(bundle))
            return bundle
        chosen = self.world.from_first()
        return None if chosen is None else _open_chosen(place, chosen)

    def _verify_together(self, place: ModelFolder) -> str | None:
        """Verify the shards of the newest step, some files on each rank; return what is damaged, "" for nothing.

        None where there are no shards, or they cannot be opened: then the first rank checks alone.
        """
        said = None
        if self.world.is_first:
            with contextlib.suppress(CheckpointError, OSError):
                candidates = choose(place.path).candidates
                if candidates and candidates[0].single is None:
                    with open_bundle(place.path) as bundle:
                        said = _identity(bundle) if bundle.is_sharded else None
        said = self.world.from_first(said)
        if said is None:
            return None
        faults = [fault for fault in self.world.to_first(self._verify_own(place, said)) if fault]
        return " ".join(faults)

    def _verify_own(self, place: ModelFolder, chosen: dict[str, Any]) -> str:
        try:
            with _open_chosen(place, chosen) as bundle:
                files = sorted(name for part in ALL_PARTS for name in files_of(part, bundle.files))
                verify(bundle, tuple(files[self.world.rank :: self.world.size]))
        except (CheckpointError, OSError) as error:
            return f"rank {self.world.rank}: {error}"
        return ""

    def may_begin(self, saver: BackgroundSaver, skips: bool, step: int, say: Say) -> bool:
        """As for one process, with the same answer on all ranks: one that knows of a failure does not begin alone.

        Raises: SaveFailed, on all ranks that have not raised it, when the save before this one was not committed.
        """
        if not self.world.is_sharded:
            return not self.world.is_first or super().may_begin(saver, skips, step, say)
        if skips and self.world.any(saver.busy):
            say(f"step {step} is not saved: the save before it is still being written")
            return False
        saver.join()
        if self.world.any(saver.failed):
            saver.raise_failure()
            say(f"step {step} is not saved: the save before it failed")
            return False
        return True

    def step_save(self, place: ModelFolder, content: StepContent) -> StepSave | None:
        """Capture this rank's shards, or, on the first rank, a whole step."""
        if self.world.is_sharded:
            return ShardedStepSave(self._beside, place, content)
        return super().step_save(place, content) if self.world.is_first else None


def _open_chosen(place: ModelFolder, chosen: dict[str, Any]) -> Bundle:
    single = chosen["single"]
    bundle = open_bundle(place.path) if single is None else open_legacy(place.path / single)
    found = _identity(bundle)
    if found != chosen:
        bundle.close()
        names = [name for name in chosen if found and found[name] != chosen[name]]
        here, there = ({name: values[name] for name in names} for values in (found or {}, chosen))
        raise CheckpointMismatch(
            f"{place.path}: found {here}, expected {there} as on rank 0. All ranks need the same folder "
            "of checkpoints, on a file system that they share."
        )
    return bundle


def _identity(bundle: Bundle | None) -> dict[str, Any] | None:
    """What must be equal when two ranks open the same checkpoint."""
    if bundle is None:
        return None
    return {
        "single": bundle.single,
        "step": bundle.step,
        "commit_id": bundle.state.commit_id,
        "config": bundle.config_values,
        "sizes": bundle.sizes,
    }
