"""Record what real saves, migrations and walk backs do to a real folder, and build every folder a power loss leaves.

    python -m tests.faults.power_loss FOLDER [NAME ...] [--limit N] [--share N]

The calls are recorded with their bytes. At every call the disk of memory_disk.py says what may be durable by then;
each of those states is built out of real files, read by the real reader, and trained on or migrated by the next run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from core.bundle.folder import COMMITTED
from core.bundle.storage import DISK
from tests.faults.kill_points import Killer
from tests.faults.memory_disk import ROOT, Disk, MemoryStorage
from tests.faults.scenarios import NAME, SCENARIOS, Expected, reset_disk, same
from tests.faults.tally import Tally
from tests.makers.models import copy

LIMIT, SHARE = 6, 3
"""Outcomes of each power loss, and of how many disk states one is built: what takes half a minute."""

CHOSEN = [
    "first save", "next save", "next save without hard links", "another state of the same step",
    "migration of two files", "migration to a kept step", "recovery of a commit", "back to an older step", "walk back",
]  # fmt: skip


class Recorder:
    """Makes each call on the real disk and on one in memory, which knows what of it is durable."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk = folder, Disk()
        self.model = MemoryStorage(self.disk)
        self.points: list[Disk] = []
        self.durable_from: int | None = None
        self._is_committed = False
        for path in sorted(folder.rglob("*")):
            if path.is_dir():
                self.model.make_folder(self._place(path))
            elif path.name != ".lock":
                self.model.write(self._place(path), path.read_bytes())
        self.disk.sync_all()

    def _place(self, path: Path) -> Path:
        return ROOT / path.relative_to(self.folder)

    def __call__(self, call, *args):
        self.points.append(self.disk.copy().tidy())
        result = call(*args)
        if call is os.open:
            self.model.opened(result, self._place(args[0]))
        elif call in (os.write, os.pwrite):
            self.model.change(call, args[0], bytes(args[1][:result]), *args[2:])
        elif call is os.fsync and stat.S_ISDIR(os.fstat(args[0]).st_mode):
            self.model.sync_folder(self._place(Path(os.readlink(f"/proc/self/fd/{args[0]}"))))  # noqa: PTH115
            self._note_durable()
        else:
            self.model.change(call, *(self._place(a) if isinstance(a, Path) else a for a in args))
            self._is_committed |= call is os.replace and args[1].name == COMMITTED
        return result

    def _note_durable(self) -> None:
        if self._is_committed and self.durable_from is None:
            self.durable_from = len(self.points)

    def end(self) -> None:
        """Note the disk after the last call: what was done is durable now, whether or not it committed a step."""
        self.points.append(self.disk.copy().tidy())
        self.durable_from = min(len(self.points) - 1, self.durable_from or len(self.points))


class Builder:
    """Builds disk states out of real files; most contents are there from the state before, and get another name."""

    def __init__(self, pool: Path, base: Path) -> None:
        self.pool = pool
        pool.mkdir()
        for path in base.rglob("*"):  # with its time, which a migration records
            if path.is_file():
                shutil.copy2(path, self._pooled(path.read_bytes()))

    def _pooled(self, content: bytes) -> Path:
        return self.pool / hashlib.sha256(content).hexdigest()

    def build(self, disk: Disk, target: Path) -> None:
        """Make a folder of what a power loss left: files of one inode are one, others are not."""
        made: dict[int, Path] = {}
        used: set[Path] = set()
        todo = [(0, target)]
        while todo:
            inode, folder = todo.pop()
            folder.mkdir(parents=True)
            for name, number in disk.seen[inode].items():
                if number in disk.seen:
                    todo.append((number, folder / name))
                elif number in made:
                    os.link(made[number], folder / name)
                else:
                    made[number] = folder / name
                    source = self._pooled(disk.files[number][0])
                    if not source.exists():
                        source.write_bytes(disk.files[number][0])
                    (shutil.copy2 if source in used else os.link)(source, folder / name)
                    used.add(source)


def lose_power_everywhere(name: str, folder: Path, limit: int, share: int) -> Tally:
    """Cut the power at every call of one scenario."""
    scenario, tally = SCENARIOS[name], Tally()
    base = folder / "base"
    base.mkdir()
    scenario.before(base)
    whole = copy(base, folder / "whole")
    scenario.set_disk()
    try:
        act = scenario.prepare(whole)
        DISK.change = recorder = Recorder(whole / NAME)
        act()
        recorder.end()
        DISK.change = Killer()
        expected = Expected.of(scenario, base, whole)
        builder, seen = Builder(folder / "pool", base), set()
        for at, point in enumerate(recorder.points):
            tally.counts["crash points"] += 1
            for disk in point.power_loss(limit):
                tally.counts["outcomes"] += 1
                is_durable = at >= recorder.durable_from
                if (key := (disk.key(), is_durable)) in seen:
                    continue
                seen.add(key)
                tally.counts["disk states"] += 1
                if tally.counts["disk states"] % share:
                    continue
                trial = folder / "trial"
                builder.build(disk, trial / NAME)
                where = (
                    f"{name}, power lost before call {at} of {len(recorder.points) - 1}, leaving {sorted(disk.seen[0])}"
                )
                found = expected.check_interrupted(trial, tally, where)
                tally.check(not is_durable or same(found, expected.new), f"{where}: what was durable is undone")
                expected.check_finished(trial, found, tally, where)
                tally.counts["disk states built and opened"] += 1
                shutil.rmtree(trial)
    finally:
        reset_disk()
    return tally


def run(folder: Path, names: Iterable[str] = CHOSEN, limit: int = LIMIT, share: int = SHARE) -> Tally:
    """Cut the power at every call of some scenarios."""
    torch.set_num_threads(1)
    tally = Tally()
    for name in names:
        place = folder / name.replace(" ", "_")
        place.mkdir(parents=True)
        tally.add(lose_power_everywhere(name, place, limit, share))
        shutil.rmtree(place)
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--limit", type=int, default=2**30)
    parser.add_argument("--share", type=int, default=1)
    args = parser.parse_args()
    found = run(args.folder, args.names, args.limit, args.share)
    print("\n".join([str(found), *found.losses]))
    sys.exit(bool(found.losses))
