"""What a part of the suite looked at, in numbers, and what it found lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts by what was counted; `losses` has a sentence for each broken promise, and must stay empty."""

    counts: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)

    def check(self, holds: object, sentence: str) -> None:
        """Note a loss unless the promise holds."""
        if not holds:
            self.losses.append(sentence)

    def add(self, other: Tally) -> None:
        """Add what another part has looked at."""
        self.counts += other.counts
        self.losses += other.losses

    def lines(self) -> str:
        """The tally as text, for another process to `parse`."""
        counts = [f"{what}: {number}" for what, number in self.counts.items()]
        return "\n".join(counts + [f"loss: {sentence}" for sentence in self.losses])

    @classmethod
    def parse(cls, text: str) -> Tally:
        """Read what `lines` wrote."""
        tally = cls()
        for line in text.splitlines():
            kind, _, said = line.partition(": ")
            if kind == "loss":
                tally.losses.append(said)
            else:
                tally.counts[kind] += int(said)
        return tally

    def __str__(self) -> str:
        return ", ".join(f"{number:,} {what}" for what, number in self.counts.items()) + f"; {len(self.losses)} losses"
