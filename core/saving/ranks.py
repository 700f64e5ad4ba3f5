"""Ranks: what saving and resuming need to know about the other processes that train the same model."""

from __future__ import annotations

from collections.abc import Callable

from ..bundle.bundle import Bundle
from ..bundle.commit import ModelFolder
from ..networks.distributed import ALONE, World
from .background import BackgroundSaver
from .step import StepContent, StepSave

Say = Callable[[str], None]
Reopen = Callable[[bool, str | None], Bundle | None]
"""Opens the newest intact step as the only writer: whether to compare checksums, and what is known to be damaged."""


class Ranks:
    """One process, which does everything; `training/ranks.py` has the ranks of a run that share one model's folder."""

    world: World = ALONE
    """The ranks, including this one; the first holds the lock and commits."""

    def newest_intact(self, place: ModelFolder, reopen: Reopen, check: bool) -> Bundle | None:
        """Open the newest intact step, the same on every rank."""
        return reopen(check, None)

    def may_begin(self, saver: BackgroundSaver, skips: bool, step: int, say: Say) -> bool:
        """Wait for the save before this one, or report that this one is skipped; the answer is the same on every rank.

        Raises: SaveFailed when the save before this one was not committed.
        """
        if saver.busy and skips:
            say(f"step {step} is not saved: the save before it is still being written")
            return False
        saver.join()
        saver.raise_failure()
        return True

    def step_save(self, place: ModelFolder, content: StepContent) -> StepSave | None:
        """Capture the part of a step that this rank writes, here all of it; None where it writes nothing."""
        return StepSave(place, content)
