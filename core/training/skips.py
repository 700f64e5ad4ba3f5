"""The batches that a run leaves out, after a loss spike for example: its steps go on with those after them."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from ..errors import CheckpointMismatch


@dataclass(frozen=True)
class Skips:
    """Ranges of batches, both ends included, sorted and apart.

    Batches are numbered from 1 as in a run that leaves nothing out, where step n trains on batch n.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> Skips:
        """Read "A:B,C:D"; None is no batch.

        Raises: ValueError for what is no such text.
        """
        found: list[tuple[int, int]] = []
        for word in text.split(",") if text is not None else []:
            match = re.fullmatch(r"\s*(\d{1,18}):(\d{1,18})\s*", word)
            if not match or not 1 <= int(match[1]) <= int(match[2]):
                raise ValueError(f"found {word!r}, expected A:B with A from 1 to B, such as 120:125")
            found.append((int(match[1]), int(match[2])))
        return cls()._with(found)

    def _with(self, more: list[tuple[int, int]]) -> Skips:
        merged: list[tuple[int, int]] = []
        for first, last in sorted([*self.ranges, *more]):
            if merged and first <= merged[-1][1] + 1:
                before = merged.pop()
                first, last = before[0], max(last, before[1])
            merged.append((first, last))
        return Skips(tuple(merged))

    def __str__(self) -> str:
        return ",".join(f"{first}:{last}" for first, last in self.ranges)

    def batch_of(self, step: int) -> int:
        """The number of the batch that a step trains on; both count from 1."""
        batch = step
        for first, last in self.ranges:
            if batch >= first:
                batch += last - first + 1
        return batch

    def adding(self, more: Skips, trained: int) -> Skips:
        """These and more, in a run that has made `trained` steps with these.

        Raises: CheckpointMismatch for a batch that it has trained on.
        """
        reached = self.batch_of(trained) if trained else 0
        for first, last in more.ranges:
            left_out = any(a <= first and min(last, reached) <= b for a, b in self.ranges)
            if first <= reached and not left_out:
                raise CheckpointMismatch(
                    f"--skip_steps {first}:{last}: this run is at step {trained} and has trained on the batches up to "
                    f"{reached}, expected steps from {reached + 1} on. Go back before step {first} with --resume_from."
                )
        return self._with(list(more.ranges))


def step_ranges(word: str) -> str:
    """Parse ranges of steps A:B, as a flag's type: the same ranges, sorted and merged."""
    try:
        return str(Skips.parse(word))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
