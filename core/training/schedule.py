"""The learning rate of each step: a function of the step alone, so that a resumed run follows the same schedule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import InputError

KINDS = ("constant", "cosine")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a constant rate, or a cosine down to `min_learning_rate` at step `decay_iters`.

    The length of the run does not matter: N steps and then M more follow the schedule of N + M.
    """

    kind: str = "constant"
    learning_rate: float = 1e-3
    warmup_iters: int = 0
    decay_iters: int | None = None  # cosine only
    min_learning_rate: float | None = None  # cosine only; None is a tenth of learning_rate

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"lr_schedule: found {self.kind!r}, expected {' or '.join(KINDS)}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate: found {self.learning_rate}, expected a number above 0.")
        if self.warmup_iters < 0:
            raise InputError(f"warmup_iters: found {self.warmup_iters}, expected a number of at least 0.")
        if self.kind != "cosine":
            return
        if self.decay_iters is None:
            raise InputError("--lr_schedule cosine needs --lr_decay_iters, the step at which the rate is lowest.")
        if self.decay_iters <= self.warmup_iters:
            raise InputError(
                f"lr_decay_iters: found {self.decay_iters}, expected more than warmup_iters {self.warmup_iters}."
            )
        if not 0 <= self.lowest <= self.learning_rate:
            raise InputError(
                f"min_learning_rate (--min_lr): found {self.lowest}, expected 0 to learning_rate {self.learning_rate}."
            )

    @property
    def lowest(self) -> float:
        """The rate at which a cosine ends."""
        return self.learning_rate / 10 if self.min_learning_rate is None else self.min_learning_rate

    def at(self, step: int) -> float:
        """The rate of the update that follows `step` updates."""
        if step < self.warmup_iters:
            return self.learning_rate * (step + 1) / (self.warmup_iters + 1)
        if self.kind == "constant" or self.decay_iters is None:
            return self.learning_rate
        progress = min(1.0, (step - self.warmup_iters) / (self.decay_iters - self.warmup_iters))
        return self.lowest + (self.learning_rate - self.lowest) * (1 + math.cos(math.pi * progress)) / 2

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain values for training_state.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Schedule:
        """Read what to_dict wrote; fields of a later program are ignored.

        Raises: InputError when a value is impossible.
        """
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
