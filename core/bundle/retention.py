"""Which older steps are kept, and by which rule, and which keep their optimizer; the manager removes the rest."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..console.words import size_text
from ..errors import CheckpointNotFound, InputError
from .bundle import OPTIMIZER, KeptStep, history
from .commit import ModelFolder
from .folder import FolderReader, top_state
from .parts import folder_of
from .training_state import TrainingState

LOG_SPACED = "log"
"""The value of `keep_steps` that stands for the powers of 2."""

RULES = ("keep", "keep_every", "keep_best", "best_by", "keep_steps", "keep_optimizer", "keep_within")
"""The rules that a caller chooses, by name."""

ROOM = 10**9
"""The value of `keep_within` of a run of train.py for which nobody has chosen `keep`."""

_OLDEST = ("keep", "keep_every", "resumed_from")
"""Rules that every training state records; of the later ones it records those that are not the default."""

_WHOLE = {"newest", "resumed from", "migrated"}
"""Steps with such a rule keep their optimizer state: one trains on from them, or only a person removes them."""


@dataclass(frozen=True)
class Retention:
    """The rules of a run; `resumed_from` is the step it continued from, which is kept for as long as it runs.

    Raises: InputError for a rule that keeps nothing that can be known.
    """

    keep: int = 1  # of the newest older steps
    keep_every: int | None = None  # each step that it divides
    resumed_from: int | None = None
    keep_best: int = 1  # of the best steps by the metric
    best_by: str = "val_loss"  # lower is better; another metric ends in ":min" or ":max"
    keep_steps: tuple[int, ...] | str = ()  # their numbers; "log" for 1, 2, 4, 8, ...
    keep_optimizer: int | None = None  # of the newest kept steps; those before them hold weights only
    keep_within: int = 0  # bytes: older steps at growing distances, while all steps together take less

    def __post_init__(self) -> None:
        if self.keep < 0 or (self.keep_every is not None and self.keep_every < 1):
            raise InputError(f"keep is {self.keep} and keep_every {self.keep_every}: expected at least 0 and 1.")
        if self.keep_within < 0:
            raise InputError(f"keep_within is {self.keep_within}: expected a number of bytes of at least 0.")
        if self.keep_best < 0 or (self.keep_optimizer or 0) < 0:
            counts = f"keep_best is {self.keep_best} and keep_optimizer {self.keep_optimizer}"
            raise InputError(f"{counts}: expected at least 0.")
        if self.best_by != "val_loss" and not re.fullmatch(r".+:(min|max)", self.best_by):
            raise InputError(
                f"best_by is {self.best_by!r}: expected a metric and which of its values is the best, such as "
                '"accuracy:max" or "val_loss:min".'
            )
        text = isinstance(self.keep_steps, str)
        if (text and self.keep_steps != LOG_SPACED) or (not text and any(int(n) < 0 for n in self.keep_steps)):
            raise InputError(f'keep_steps is {self.keep_steps!r}: expected numbers of steps of at least 0, or "log".')

    @classmethod
    def of(cls, state: TrainingState) -> Retention:
        """The rules in force when a training state was written; defaults for those that it does not record."""
        known = state.retention if isinstance(state.retention, dict) else {}
        least = {"keep": 0, "keep_every": 1, "resumed_from": 0, "keep_best": 0, "keep_optimizer": 0, "keep_within": 0}
        found = {n: known[n] for n, low in least.items() if isinstance(known.get(n), int) and known[n] >= low}
        found |= {name: known[name] for name in ("best_by", "keep_steps") if known.get(name) is not None}
        return cls().given(**found)

    def given(self, **rules: Any) -> Retention:
        """The same rules, with those that are given, and are not None, in place of the old ones.

        A number of steps to keep replaces the room for older ones.
        """
        found = {name: value for name, value in rules.items() if value is not None}
        if "keep_steps" in found:
            found["keep_steps"] = numbers_of(found["keep_steps"])
        if "keep" in found:
            found.setdefault("keep_within", 0)
        return replace(self, **found)

    def recorded(self) -> dict[str, Any]:
        """The rules for a training state."""
        default = asdict(Retention())
        said = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {n: v for n, v in said.items() if n in _OLDEST or getattr(self, n) != default[n]}

    def names(self, step: int) -> bool:
        """Whether `keep_steps` names a step."""
        if isinstance(self.keep_steps, str):
            return step.bit_count() == 1
        return step in self.keep_steps

    @property
    def metric(self) -> tuple[str, int]:
        """The metric by which a step is the best, and the sign with which its lowest value is."""
        name, _, best = self.best_by.rpartition(":") if ":" in self.best_by else (self.best_by, "", "min")
        return name, -1 if best == "max" else 1

    def rules(self, newest: TrainingState, kept: Sequence[KeptStep]) -> list[list[str]]:
        """Name the rules that keep each older step; a step without any is removed after the next save.

        `newest` is the training state at the top, and `kept` are the steps beside it, oldest first. A step that was
        not committed before the top (the folder went back to it) is not an older one, and needs no rule.
        """
        older = [step for step in kept if step.order < newest.order]
        last = older[-self.keep :] if self.keep else []
        best = self._best_steps(newest, kept)
        found = []
        for step in kept:
            tests = {
                "newest": step not in older,
                f"newest {self.keep}": step in last,
                **self._by_number(step.step, best),
                "resumed from": step.step == self.resumed_from,
                # The file that it was made from may be gone: only a person removes the step.
                "migrated": step.state.migrated_from is not None,
            }
            found.append([rule for rule, holds in tests.items() if holds])
        self._add_spaced(newest, kept, found)
        return found

    def _add_spaced(self, newest: TrainingState, kept: Sequence[KeptStep], rules: list[list[str]]) -> None:
        """Name the rule `keep_within` for the steps that it keeps beside those with a rule, the newest first.

        They lie at growing distances: the n-th commit stays for twice as many commits as the highest power of 2 that
        divides n. Which ones do so depends on nothing else, so that each save removes few.
        """
        room = self.keep_within - newest.size - sum(s.size for s, why in zip(kept, rules, strict=True) if why)
        for step, why in reversed(list(zip(kept, rules, strict=True))):
            if why or newest.order - step.order > 2 * (step.order & -step.order):
                continue
            if (room := room - step.size) <= 0:
                return
            why.append(f"within {size_text(self.keep_within)}")

    def rules_of_newest(self, newest: TrainingState, kept: Sequence[KeptStep]) -> list[str]:
        """Name the rules that hold for the step at the top, including those that will keep it as an older step."""
        tests = {"newest": True, **self._by_number(newest.step or 0, self._best_steps(newest, kept))}
        return [rule for rule, holds in tests.items() if holds]

    def _by_number(self, step: int, best: Sequence[int]) -> dict[str, bool]:
        return {
            "best" if self.keep_best == 1 else f"best {self.keep_best}": step in best,
            f"every {self.keep_every}": self.keep_every is not None and step % self.keep_every == 0,
            "log" if self.keep_steps == LOG_SPACED else "named": self.names(step),
        }

    def going(self, newest: TrainingState, kept: Sequence[KeptStep]) -> list[KeptStep]:
        """The kept steps that no rule keeps."""
        return [step for step, rules in zip(kept, self.rules(newest, kept), strict=True) if not rules]

    def thinned(self, newest: TrainingState, kept: Sequence[KeptStep]) -> list[KeptStep]:
        """The kept steps that stay, and whose optimizer state goes.

        That of the newest step stays, and where it has none that of the newest one that has. A step without recorded
        checksums, of format version 1, stays as it is.
        """
        if self.keep_optimizer is None:
            return []
        ruled = zip(kept, self.rules(newest, kept), strict=True)
        having = [(s, rules) for s, rules in ruled if rules and "newest" not in rules and s.state.optimizer_file]
        least = 0 if newest.has_optimizer else 1
        thin = having[: max(0, len(having) - max(self.keep_optimizer, least))]
        return [step for step, rules in thin if not _WHOLE & set(rules) and step.state.integrity is not None]

    def best_of(self, newest: TrainingState, kept: Sequence[KeptStep]) -> dict[str, Any] | None:
        """The best step: the recorded one while it is here, else the best of those that are; None without one.

        When a folder has gone back to an older step, the best that this one recorded may have been removed since.
        """
        metric, _ = self.metric
        recorded = newest.best or {}
        here = [newest, *(step.state for step in kept)]
        if _is_number(recorded.get(metric)) and any(state.step == recorded["step"] for state in here):
            return dict(recorded)
        values = self._measured(newest, kept)
        return next(({"step": step, metric: values[step]} for step in values), None)

    def _best_steps(self, newest: TrainingState, kept: Sequence[KeptStep]) -> list[int]:
        best = self.best_of(newest, kept)
        first = [best["step"]] if best else []
        return [*first, *(step for step in self._measured(newest, kept) if step not in first)][: self.keep_best]

    def _measured(self, newest: TrainingState, kept: Sequence[KeptStep]) -> dict[int, float]:
        """The metric of each step that has one, the best first; of equal ones the lower step."""
        metric, sign = self.metric
        states = [*(step.state for step in kept), newest]
        found = {s.step: s.others[metric] for s in states if s.step is not None and _is_number(s.others.get(metric))}
        return {step: found[step] for step in sorted(found, key=lambda step: (sign * found[step], step))}

    def better(self, best: dict[str, Any] | None, step: int, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        """The better one of the best step so far and another, if that has the metric."""
        metric, sign = self.metric
        value: Any = metrics.get(metric)
        if _is_number(value) and (best is None or sign * value < sign * best[metric]):
            return {"step": step, metric: value}
        return best


def numbers_of(steps: Iterable[int] | str) -> tuple[int, ...] | str:
    """The steps of a `keep_steps`, NumPy's numbers as Python's.

    Raises: InputError for anything but whole numbers and a text.
    """
    try:
        return steps if isinstance(steps, str) else tuple(sorted({operator.index(step) for step in steps}))
    except TypeError as error:
        raise InputError(f'keep_steps is {steps!r}: expected numbers of steps of at least 0, or "log".') from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def tidy_up(place: ModelFolder, rules: Retention, newest: TrainingState, say: Callable[[str], None]) -> None:
    """Remove the older steps that no rule keeps, the optimizer states that none keeps, and displaced steps.

    Of the steps of one number that were displaced, the newest ones stay. What cannot be removed is reported once, and
    stays for the next time. The caller holds the lock.
    """
    kept = history(place.path)
    going, thinned = rules.going(newest, kept), rules.thinned(newest, kept)
    place.prune([older.step for older in going])
    for older in kept:
        if older in thinned:
            drop_optimizer(place, older, rules)
        elif older not in going and older.state.optimizer_removed and optimizer_paths(older):
            drop_optimizer(place, older, rules)  # a writer was killed before the file was gone
    for path in place.removal.remove(surplus(place, rules.keep)):
        say(f"removed {path}: a newer step of that number was set aside as well")
    place.removal.report(say)


def optimizer_paths(older: KeptStep) -> list[Path]:
    """The file or folder of the optimizer state in the folder of a kept step, listed or not."""
    return [path for name in (OPTIMIZER, folder_of(OPTIMIZER)) if (path := older.path / name).exists()]


def drop_optimizer(place: ModelFolder, older: KeptStep, rules: Retention) -> bool:
    """Make a kept step one of weights only, durably; False where that is not possible now. The caller holds the lock.

    Its training state says which rule did it, so that nobody takes it for a step that never had an optimizer.
    """
    state = older.state
    if state.optimizer_removed is None:
        gone = (OPTIMIZER, folder_of(OPTIMIZER))
        files = {name: entry for name, entry in state.files.items() if name.partition("/")[0] not in gone}
        rule = f"keep_optimizer {rules.keep_optimizer}"
        state = state.having(optimizer_file=None, optimizer_removed=rule, integrity={"files": files})
    return place.removal.remove_from_step(older.path, state, optimizer_paths(older))


def surplus(place: FolderReader, keep: int) -> list[Path]:
    """The folders of displaced steps that are not among the newest `keep` of their number; at least one is."""
    displaced: dict[str, list[tuple[int, Path]]] = {}
    for path in place.asides():
        found = re.fullmatch(r"aside_(\d{8,})_displaced_[0-9a-f]+", path.name)
        state = top_state(FolderReader(path, place.storage)) if found else TrainingState()
        if found and state.commit_id is not None:  # another folder holds what a person put there
            displaced.setdefault(found[1], []).append((state.order, path))
    return [path for steps in displaced.values() for _, path in sorted(steps)[: -max(keep, 1)]]


def best_step(folder: Path) -> int:
    """The number of the best step of a model, by the metric of its run.

    Raises: CheckpointNotFound when none has it.
    """
    newest = top_state(FolderReader(folder))
    rules = Retention.of(newest)
    best = rules.best_of(newest, history(folder))
    if not best:
        metric, _ = rules.metric
        what = "validation loss" if metric == "val_loss" else f"metric {metric}"
        raise CheckpointNotFound(f"{folder}: no step has a {what}, so none is the best.")
    return int(best["step"])
