"""The rules of a run as a caller sets them: which older steps are kept, and which keep their optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..console.words import size_text
from .retention import ROOM, RULES, Retention, numbers_of
from .training_state import TrainingState


class StepRules:
    """The rules as attributes, which may be changed between saves. The step that was resumed from stays besides.

    Raises: InputError for a rule that is impossible.
    """

    say: Callable[[str], None]

    def __init__(
        self,
        keep: int,
        keep_every: int | None,
        keep_best: int,
        best_by: str,
        keep_steps: Iterable[int] | str,
        keep_optimizer: int | None,
        keep_within: int,
    ) -> None:
        self.keep = keep
        """How many of the newest older steps are kept."""
        self.keep_every = keep_every
        """Every older step that this number divides is kept; None for none."""
        self.keep_best = keep_best
        """How many of the best steps are kept."""
        self.best_by = best_by
        """The metric by which a step is the best: "val_loss", or another with ":min" or ":max" behind it."""
        self.keep_steps = numbers_of(keep_steps)
        """Steps that are kept by their numbers, which the loop has to save (`wants`); "log" for 1, 2, 4, 8, ..."""
        self.keep_optimizer = keep_optimizer
        """How many of the newest kept steps have their optimizer state; older ones hold weights only. None for all."""
        self.keep_within = keep_within
        """Bytes: older steps at growing distances stay while all steps together take less; 0 for none."""
        self.resumed = TrainingState()
        """The training state, also a mapping, of the step that training continues from; empty for a new run."""
        _ = self.rules

    @property
    def rules(self) -> Retention:
        """The rules by which older steps are kept, and their optimizer states.

        Raises: InputError for one that is impossible.
        """
        rules = {name: getattr(self, name) for name in RULES}
        return Retention(**rules, resumed_from=self.resumed.step)

    def keep_as(
        self, state: Mapping[str, Any], keep: int | None = None, keep_every: int | None = None, **rules: Any
    ) -> None:
        """Keep older steps by the rules of the run that wrote a training state, with those that are given.

        Where neither says how many, those at growing distances stay within 1 GB, which is reported.
        """
        before = TrainingState.from_dict(state)
        found = Retention.of(before).given(keep=keep, keep_every=keep_every, **rules)
        recorded = before.retention if isinstance(before.retention, dict) else {}
        if keep is None and rules.get("keep_within") is None and recorded.get("keep") is None:
            found = found.given(keep_within=ROOM)
            self.say(
                f"kept: the newest two steps, the best one, and older ones at growing distances while all take less "
                f"than {size_text(ROOM)} (--keep N keeps the N newest older steps and the best instead)"
            )
        for name in RULES:
            setattr(self, name, getattr(found, name))

    def wants(self, step: int) -> bool:
        """Whether `keep_steps` names a step, so that a loop has to save it."""
        return self.rules.names(step)
