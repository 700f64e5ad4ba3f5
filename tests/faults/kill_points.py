"""Kill what changes a model's folder at every storage call, and look what a reader and the next run find.

    python -m tests.faults.kill_points FOLDER [NAME ...]   every kill point of every scenario
    python -m tests.faults.kill_points FOLDER --traced     each scenario once, between two marks, for strace

A process that has imported torch forks a child for each point, which is killed with SIGKILL by its own hand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from core.bundle.output import SECTOR
from core.bundle.storage import DISK
from tests.faults.scenarios import SCENARIOS, Expected, Scenario, in_child, reset_disk, same
from tests.faults.tally import Tally
from tests.makers.models import copy

Lay = Callable[[Path, Path], AbstractContextManager[Path]]
"""Lends a copy of a folder, under a path that is free, for one trial."""


@contextlib.contextmanager
def copied(base: Path, trial: Path) -> Iterator[Path]:
    """Lend a plain copy."""
    yield copy(base, trial)
    shutil.rmtree(trial)


class Killer:
    """Counts storage calls, and kills the process before call `at`, or when half of that call's bytes are written.

    Where a process is killed, what was written stays: fsync is counted and not made.
    """

    def __init__(self, at: int | None = None, midway: bool = False) -> None:
        self.calls: list[str] = []
        self.at, self.midway = at, midway

    @property
    def count(self) -> int:
        """Calls so far."""
        return len(self.calls)

    def __call__(self, call, *args):
        if self.count == self.at:
            if self.midway:
                call(args[0], half(args[1]), *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls.append(call.__name__)
        return None if call is os.fsync else call(*args)


def half(data):
    """The first half of what is written, in whole sectors where there are some."""
    return data[: len(data) // 2 // SECTOR * SECTOR or len(data) // 2]


def expected(scenario: Scenario, base: Path, whole: Path) -> tuple[Expected, list[str]]:
    """Run a scenario on a copy of a folder; say what it leads to, and name its storage calls."""
    copy(base, whole)
    scenario.set_disk()
    act = scenario.prepare(whole)
    DISK.change = killer = Killer()
    act()
    DISK.change = Killer()
    return Expected.of(scenario, base, whole), killer.calls


def kill_everywhere(name: str, folder: Path, every: int, lay: Lay = copied) -> Tally:
    """Kill one scenario before its first storage call, after each, and in the middle of each write, or at some.

    Each trial is made by `lay`, and `expected` on a plain copy says what it must come to.
    """
    scenario, tally = SCENARIOS[name], Tally()
    base = folder / "base"
    base.mkdir()
    scenario.before(base)
    try:
        what, calls = expected(scenario, base, folder / "whole")
        points = [(at, False) for at in range(len(calls) + 1)]
        points += [(at, True) for at, call in enumerate(calls) if "write" in call]
        committed = False
        for at, midway in sorted(points)[len(name) % every :: every]:
            where = f"{name}, killed {'in the middle of' if midway else 'before'} call {at} of {len(calls)}"
            with lay(base, folder / "trial") as trial:
                _kill(scenario, trial, Killer(at, midway), tally, where)
                found = what.check_interrupted(trial, tally, where)
                if not same(what.old, what.new):
                    tally.check(not committed or same(found, what.new), f"{where}: the commit was undone")
                    committed = committed or same(found, what.new)
                what.check_finished(trial, found, tally, where)
            tally.counts["kill points"] += 1
        tally.counts["storage calls"] += len(calls)
    finally:
        reset_disk()
    return tally


def _kill(scenario: Scenario, root: Path, killer: Killer, tally: Tally, where: str) -> None:
    def work() -> None:
        act = scenario.prepare(root)
        DISK.change = killer
        act()
        os.kill(os.getpid(), signal.SIGKILL)  # after the last call

    scenario.set_disk()
    status = in_child(work)
    tally.check(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{where}: it was not killed")


def run(folder: Path, names: Any = SCENARIOS, every: int = 1, lay: Lay = copied) -> Tally:
    """Kill every scenario everywhere, or at one of every so many points."""
    torch.set_num_threads(1)
    tally = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: torch has some that sleep
        for name in names:
            place = folder / name.replace(" ", "_")
            place.mkdir(parents=True)
            tally.add(kill_everywhere(name, place, every, lay))
            shutil.rmtree(place)
    return tally


def traced(folder: Path) -> dict[str, int]:
    """Run each scenario between two marks that strace sees; return how many calls we counted."""
    counts = {}
    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        base = folder / f"traced{number}"
        base.mkdir(parents=True)
        scenario.before(base)
        scenario.set_disk()
        act = scenario.prepare(base)
        counted = []
        DISK.change = lambda call, *args, counted=counted: (counted.append(call), call(*args))[1]
        (folder / f"begin{number}").mkdir()
        act()
        (folder / f"end{number}").mkdir()
        reset_disk()
        counts[name] = len(counted)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--traced", action="store_true")
    args = parser.parse_args()
    if args.traced:
        print(json.dumps(traced(args.folder)))
    else:
        found = run(args.folder, args.names)
        print("\n".join([str(found), *found.losses]))
        sys.exit(bool(found.losses))
