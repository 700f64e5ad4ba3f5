"""Which older steps are kept, and by which rule; the manager removes the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointNotFound
from .bundle import KeptStep, history
from .commit import ModelFolder
from .folder import FolderReader, top_state
from .training_state import TrainingState


@dataclass(frozen=True)
class Retention:
    """The rules of a run; `resumed_from` is the step it continued from, which is kept for as long as it runs."""

    keep: int = 1
    keep_every: int | None = None
    resumed_from: int | None = None

    @classmethod
    def of(cls, state: TrainingState) -> Retention:
        """The rules in force when a training state was written; defaults for those that it does not record."""
        known = state.retention if isinstance(state.retention, dict) else {}
        least = {"keep": 0, "keep_every": 1, "resumed_from": 0}
        return cls(**{n: known[n] for n, low in least.items() if isinstance(known.get(n), int) and known[n] >= low})

    def given(self, keep: int | None, keep_every: int | None) -> Retention:
        """The same rules, with the numbers that are given in place of the old ones."""
        return replace(
            self,
            keep=self.keep if keep is None else keep,
            keep_every=self.keep_every if keep_every is None else keep_every,
        )

    def rules(self, newest: TrainingState, kept: Sequence[KeptStep]) -> list[list[str]]:
        """Name the rules that keep each older step; a step without any is removed after the next save.

        `newest` is the training state at the top, and `kept` are the steps beside it, oldest first. A step that was
        not committed before the top (the folder went back to it) is not an older one, and needs no rule.
        """
        older = [step for step in kept if step.order < newest.order]
        last = older[-self.keep :] if self.keep else []
        best = best_of(newest, kept)
        found = []
        for step in kept:
            tests = {
                "newest": step not in older,
                f"newest {self.keep}": step in last,
                "best": best is not None and step.step == best["step"],
                f"every {self.keep_every}": self.keep_every is not None and step.step % self.keep_every == 0,
                "resumed from": step.step == self.resumed_from,
                # The file that it was made from may be gone: only a person removes the step.
                "migrated": step.state.migrated_from is not None,
            }
            found.append([rule for rule, holds in tests.items() if holds])
        return found

    def rules_of_newest(self, newest: TrainingState, kept: Sequence[KeptStep]) -> list[str]:
        """Name the rules that hold for the step at the top, including those that will keep it as an older step."""
        best, step = best_of(newest, kept), newest.step or 0
        every = self.keep_every is not None and step % self.keep_every == 0
        tests = {"newest": True, "best": best is not None and step == best["step"], f"every {self.keep_every}": every}
        return [rule for rule, holds in tests.items() if holds]

    def going(self, newest: TrainingState, kept: Sequence[KeptStep]) -> list[KeptStep]:
        """The kept steps that no rule keeps."""
        return [step for step, rules in zip(kept, self.rules(newest, kept), strict=True) if not rules]


def tidy_up(place: ModelFolder, rules: Retention, newest: TrainingState, say: Callable[[str], None]) -> None:
    """Remove the older steps that no rule keeps, and all but the newest of what a step of the same number displaced.

    What cannot be removed is reported once, and stays for the next time. The caller holds the lock.
    """
    place.prune([older.step for older in rules.going(newest, history(place.path))])
    for path in place.removal.remove(surplus(place, rules.keep)):
        say(f"removed {path}: a newer step of that number was set aside as well")
    place.removal.report(say)


def surplus(place: FolderReader, keep: int) -> list[Path]:
    """The folders of displaced steps that are not among the newest `keep` of their number; at least one is."""
    displaced: dict[str, list[tuple[int, Path]]] = {}
    for path in place.asides():
        found = re.fullmatch(r"aside_(\d{8,})_displaced_[0-9a-f]+", path.name)
        state = top_state(FolderReader(path, place.storage)) if found else TrainingState()
        if found and state.commit_id is not None:  # another folder holds what a person put there
            displaced.setdefault(found[1], []).append((state.order, path))
    return [path for steps in displaced.values() for _, path in sorted(steps)[: -max(keep, 1)]]


def best_of(newest: TrainingState, kept: Sequence[KeptStep]) -> dict[str, Any] | None:
    """The step with the lowest validation loss: the recorded one while it is here, else the best of those that are.

    When a folder has gone back to an older step, the best that this one recorded may have been removed since.
    """
    here = [newest, *(step.state for step in kept)]
    recorded = newest.best
    if recorded and any(state.step == recorded["step"] for state in here):
        return dict(recorded)
    losses = [(state.val_loss, state.step) for state in here if isinstance(state.val_loss, (int, float))]
    return {"step": min(losses)[1], "val_loss": min(losses)[0]} if losses else None


def best_step(folder: Path) -> int:
    """The number of the best step of a model.

    Raises: CheckpointNotFound when none has a validation loss.
    """
    best = best_of(top_state(FolderReader(folder)), history(folder))
    if not best:
        raise CheckpointNotFound(f"{folder}: no step has a validation loss, so none is the best.")
    return int(best["step"])


def better(best: dict[str, Any] | None, step: int, loss: float | None) -> dict[str, Any] | None:
    """The better one of the best step so far and another, if that has a loss."""
    if loss is not None and (best is None or loss < best["val_loss"]):
        return {"step": step, "val_loss": loss}
    return best
