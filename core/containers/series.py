"""Numbered files of one folder: which belong together, and which of several series is the model.

model-00001-of-00002.safetensors                 one of two files, as transformers counts them; also .bin
shard-00003-model-00001-of-00002.safetensors     what rank 3 has of the first of two, as torch's
                                                 HuggingFaceStorageWriter counts them; no name has the number of ranks
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..console.words import listed_names
from ..errors import CheckpointNotFound
from .pickles.inert import as_name, names_text

_NUMBERED = re.compile(r"(?:shard-(\d{5})-)?(.*)-(\d{5})-of-(\d{5})\.(safetensors|bin)", re.DOTALL)


@dataclass(eq=False, repr=False)
class Series:
    """The files of one model that count each other."""

    stem: str
    total: int  # as the names say it
    suffix: str
    ranked: bool  # torch's shards: each file has a part of each of its tensors
    names: list[str] = field(default_factory=list)  # those in the folder, in order
    numbers: set[int] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)

    @property
    def label(self) -> str:
        """A pattern of its names: `model-*-of-00003.safetensors`."""
        return f"{'shard-*-' * self.ranked}{self.stem}-*-of-{self.total:05}.{self.suffix}"

    @property
    def missing(self) -> list[str]:
        """The names that are not in the folder, up to the total; of torch's shards also up to the highest rank."""
        before = "shard-*-" if self.ranked else ""
        absent = [i for i in range(1, self.total + 1) if i not in self.numbers]
        gone = [rank for rank in range(1, max(self.ranks, default=0)) if rank not in self.ranks]
        return [f"{before}{self.stem}-{i:05}-of-{self.total:05}.{self.suffix}" for i in absent] + [
            f"shard-{rank:05}-{self.stem}-*.{self.suffix}" for rank in gone
        ]


def series_of(names: Iterable[str]) -> list[Series]:
    """The series of a folder's files, sorted by their labels."""
    found: dict[tuple[object, ...], Series] = {}
    for name in sorted(names):
        if match := _NUMBERED.fullmatch(name):
            rank, stem, number, total, suffix = match.groups()
            key = (stem, total, suffix, rank is not None)
            one = found.setdefault(key, Series(stem, int(total), suffix, rank is not None))
            one.names.append(name)
            one.numbers.add(int(number))
            one.ranks |= {int(rank)} if rank else set()
    return sorted(found.values(), key=lambda one: one.label)


def choose_series(names: Iterable[str], where: str) -> tuple[Series | None, str]:
    """Choose the series that is the model, without an index; the sentence says why, where there are several.

    Raises: CheckpointNotFound when several are complete, or none of several is.
    """
    found = series_of(names)
    if len(found) < 2:
        return (found[0] if found else None), ""
    complete = [one for one in found if not one.missing]
    if len(complete) == 1:
        lacking = [f"{as_name(one.label)} lacks {names_text(one.missing)}" for one in found if one.missing]
        count = len(complete[0].names)
        return complete[0], (
            f"{where}: holds {len(found)} series of numbered files; {as_name(complete[0].label)} ({count} "
            f"file{'s' * (count != 1)}) is taken, the only complete one: {listed_names(lacking, 3)}"
        )
    sets = [f"{as_name(one.label)} ({_state(one)})" for one in found]
    raise CheckpointNotFound(
        f"{where}: holds {len(found)} series of numbered files, and no index says which is the model: "
        f"{listed_names(sets, 5)}. Move the files of all but one to another folder, or name the index of one "
        "(*.index.json)."
    )


def _state(one: Series) -> str:
    return f"lacks {names_text(one.missing)}" if one.missing else f"complete, {len(one.names)} files"
