"""Flip bits of a bundle, cut its files, exchange them between steps: nothing of it is used in silence.

python -m tests.faults damage
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from core.bundle.commit import MODEL
from core.bundle.storage import DISK
from core.bundle.training_state import STATE
from core.checkpoint import CheckpointManager
from core.errors import CheckpointDamaged
from core.loading.inference import load_chosen
from tests.faults.kill_points import Killer
from tests.faults.scenarios import NAME, three_saves
from tests.faults.tally import Tally
from tests.makers.models import flip

FLIPS, CUTS, EXCHANGES = 500, 100, 100
SEED = 7
FILES = ("model.pt", "optimizer.pt", "tokenizer.json", STATE, "config.json")
USED_FOR_INFERENCE = ("model.pt", "tokenizer.json", STATE)
SAID = "It is used as it is."


def damage(base: Path, trial: Path, name: str, change: Callable[[Path], object], tally: Tally, where: str) -> None:
    """Damage one file of the newest step, then load it to write text, and to train on."""
    shutil.copytree(base, trial, copy_function=os.link)
    folder, lines = trial / NAME, []
    change(folder)
    if name in USED_FOR_INFERENCE:
        try:
            load_chosen(folder, say=lines.append)
        except CheckpointDamaged as error:
            tally.check(str(folder / name) in str(error), f"{where}: the error names another file: {error}")
        else:
            tally.check(any(SAID in line for line in lines), f"{where}: loaded in silence")
    lines = []
    with CheckpointManager(NAME, trial, say=lines.append) as made, made.newest_intact() as bundle:
        if any(f"Continuing from step {bundle.step}, the newest intact one" in line for line in lines):
            kept = base / NAME / f"step_{bundle.step:08d}" / MODEL
            tally.check((folder / MODEL).read_bytes() == kept.read_bytes(), f"{where}: walked back to something else")
            tally.counts["walked back from"] += 1
        else:
            tally.check(any(SAID in line for line in lines), f"{where}: trained on in silence")
            tally.counts["said, and used as they are"] += 1
    shutil.rmtree(trial)


def cut(path: Path, size: int) -> None:
    """Truncate a file, which gets an inode of its own."""
    data = path.read_bytes()[:size]
    path.unlink()
    path.write_bytes(data)


def exchange(a: Path, b: Path) -> None:
    """Let two files change places."""
    part = a.with_suffix(".part")
    a.rename(part)
    b.rename(a)
    part.rename(b)


def run(folder: Path, seed: int = SEED) -> Tally:
    """Make every damage, each to a fresh copy."""
    torch.set_num_threads(1)
    DISK.change = Killer()  # no fsync
    try:
        return _run(folder, random.Random(seed))
    finally:
        del DISK.change


def _run(folder: Path, chance: random.Random) -> Tally:
    base, tally = folder / "base", Tally()
    base.mkdir()
    three_saves(base)
    sizes = {name: (base / NAME / name).stat().st_size for name in FILES}
    for number in range(FLIPS):
        name = FILES[number % len(FILES)]
        byte, bit = chance.randrange(sizes[name]), chance.randrange(8)
        where = f"bit {bit} of byte {byte} of {name} flipped"
        change = lambda top, name=name, byte=byte, bit=bit: flip(top / name, byte, bit)  # noqa: E731
        damage(base, folder / "trial", name, change, tally, where)
        tally.counts["flips"] += 1
    for number in range(CUTS):
        name = FILES[number % len(FILES)]
        size = chance.randrange(sizes[name] - 1)
        change = lambda top, name=name, size=size: cut(top / name, size)  # noqa: E731
        damage(base, folder / "trial", name, change, tally, f"{name} cut to {size} of {sizes[name]} bytes")
        tally.counts["cuts"] += 1
    for number in range(EXCHANGES):
        name, other = ("model.pt", "optimizer.pt", STATE)[number % 3], f"step_0000000{chance.randrange(1, 3)}"
        change = lambda top, name=name, other=other: exchange(top / name, top / other / name)  # noqa: E731
        damage(base, folder / "trial", name, change, tally, f"{name} exchanged with that of {other}")
        tally.counts["exchanges"] += 1
    return tally
