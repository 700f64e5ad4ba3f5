"""What saving and loading cost at sizes that no machine here has: a model on paper, and a simulation of failures.

    python benchmarks/scale_model.py [--json FILE]

Rates are parameters, the defaults measured by our own benchmarks or assumed, as docs/scaling.md says of each. The
simulation draws failures and replays save, work, loss of work and restart; it is there to check the formula.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

GIGA = 1e9
RANKS = (1, 8, 64, 1024)
MODELS = {"124M": (124e6, 12), "7B": (6.7e9, 32), "70B": (70e9, 80), "405B": (405e9, 126)}
"""Parameters and layers."""

TENSORS_PER_LAYER, OTHER_TENSORS = 12, 7
BYTES_PER_PARAMETER = 12
"""Weights and two moments in float32."""

BYTES_PER_BLOCK = 410
"""Of .metadata, measured."""


@dataclass(frozen=True)
class Rates:
    """What the paper reckons with, in bytes and seconds."""

    copy: float = 4.0 * GIGA  # a rank copies its state, per second
    disk: float = 1.0 * GIGA  # one rank writes or reads, durably, per second
    storage: float = 100.0 * GIGA  # all ranks together, on a shared file system
    item_write: float = 35e-6  # one block in .metadata, on rank 0
    item_read: float = 70e-6  # one block, .metadata and the head of its zip, on every rank
    commit: float = 0.05  # renames and fsyncs of a commit
    file: float = 0.5e-3  # making one file on a shared file system
    restart: float = 120.0  # start of all processes, besides loading
    hours_between_failures: float = 50_000.0  # of one rank
    pass_seconds: float = 1.0  # a forward and backward pass, beside which the copy runs


@dataclass(frozen=True)
class Cost:
    """What one model on some ranks costs."""

    model: str
    ranks: int
    rank_bytes: float
    staging_bytes: float
    blocked: float
    save: float
    load: float
    reshard: float
    files: int
    metadata_bytes: float
    mtbf: float
    interval: float
    goodput: float


def blocks_of(layers: int, ranks: int) -> int:
    """Blocks in .metadata: each tensor and its two moments, cut into one for each rank; counts are whole."""
    tensors = layers * TENSORS_PER_LAYER + OTHER_TENSORS
    return tensors * 3 * ranks + tensors


def cost(model: str, ranks: int, rates: Rates) -> Cost:
    """Reckon what a model costs on some ranks."""
    parameters, layers = MODELS[model]
    total = parameters * BYTES_PER_PARAMETER
    mine, blocks = total / ranks, blocks_of(layers, ranks)
    speed = min(rates.disk * ranks, rates.storage)
    copy = mine / rates.copy
    blocked = max(0.0, copy - rates.pass_seconds)
    save = max(copy, total / speed) + blocks * rates.item_write + rates.commit + 2 * ranks * rates.file
    load = total / speed + blocks * rates.item_read
    # On another number of ranks each one's rows come from two or three files, and none reads more bytes than it keeps.
    reshard = load + 2 * (ranks + 1) * rates.file
    mtbf = rates.hours_between_failures * 3600 / ranks
    interval = best_interval(blocked, save, mtbf)
    return Cost(
        model,
        ranks,
        mine,
        mine,
        blocked,
        save,
        load,
        reshard,
        2 * (ranks + 1) + 3,
        blocks * BYTES_PER_BLOCK,
        mtbf,
        interval,
        goodput(interval, blocked, save, rates.restart + load, mtbf),
    )


def best_interval(blocked: float, save: float, mtbf: float) -> float:
    """Seconds between saves that lose least: Young's root of twice cost times time between failures (1974).

    A save that runs beside training costs what it blocks, but no less than a tenth of a second; and the next cannot
    begin before it is durable.
    """
    return max(math.sqrt(2 * max(blocked, 0.1) * mtbf), save)


def goodput(interval: float, blocked: float, save: float, restart: float, mtbf: float) -> float:
    """Share of the time that becomes progress, to first order (Daly 2006): less saving, lost work and restarts.

    A failure loses half an interval on the mean, and what was done while the newest save was not yet durable.
    """
    saving = blocked / (interval + blocked)
    lost = (interval / 2 + save + restart) / mtbf
    return max(0.0, (1 - saving) * (1 - lost))


def simulate(interval: float, blocked: float, save: float, restart: float, mtbf: float, seed: int = 1) -> float:
    """Draw failures for as long as five thousand of them take, and return the share of time that became progress."""
    draw, clock, progress = random.Random(seed), 0.0, 0.0
    for _ in range(5000):
        alive = draw.expovariate(1 / mtbf)
        clock += alive + restart
        if alive <= 0:
            continue
        # What was begun to be saved at the end of a round is durable `save` seconds later.
        round_length = interval + blocked
        progress += max(0, math.floor((alive - interval - save) / round_length) + 1) * interval
    return progress / clock


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Rates()).items():
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    rates = Rates(**{name: getattr(args, name) for name in asdict(Rates())})
    costs = [cost(model, ranks, rates) for model in MODELS for ranks in RANKS]
    print(
        "| model | ranks | state of a rank | blocked | save | load | other ranks | files | .metadata | failure every |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for c in costs:
        print(
            f"| {c.model} | {c.ranks:,} | {c.rank_bytes / GIGA:.2f} GB | {c.blocked:.2f} s | {c.save:.1f} s | "
            f"{c.load:.1f} s | {c.reshard:.1f} s | {c.files:,} | {c.metadata_bytes / 1e6:.1f} MB | "
            f"{c.mtbf / 3600:,.0f} h |"
        )
    print("\n| model | ranks | save every | goodput | simulated | if each save blocked |")
    print("|---|--:|--:|--:|--:|--:|")
    for c in costs:
        restart = rates.restart + c.load
        seen = simulate(c.interval, c.blocked, c.save, restart, c.mtbf)
        stopped = best_interval(c.save, 0.0, c.mtbf)
        waits = goodput(stopped, c.save, 0.0, restart, c.mtbf)
        print(
            f"| {c.model} | {c.ranks:,} | {c.interval / 60:.1f} min | {c.goodput:.3%} | {seen:.3%} | "
            f"{waits:.3%}, every {stopped / 60:.0f} min |"
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(c) for c in costs], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
