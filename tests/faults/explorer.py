"""Run real commit code on a disk in memory, crash it everywhere, and read beside it.

A run of one action (a save, a rewind) is stopped before every system call, by a kill or by a power loss with every
outcome that `memory_disk` allows. From every disk that this leaves, recovery runs, and is itself stopped in the same
ways, until no new disk turns up. On each of them a reader must find one of the allowed steps, whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

from core.bundle import commit, owner, removal, training_state
from core.bundle import folder as names_of_folders
from core.bundle.commit import CONFIG, MODEL, ModelFolder, OpenStep
from core.bundle.training_state import STATE, seal, unseal
from core.errors import CheckpointDamaged
from tests.faults.memory_disk import ROOT, Disk, MemoryStorage

Files = dict[str, bytes]
Identity = bytes | None
"""Which step a set of files is: its training state, or the model of a bundle without one; None for no step."""

NOTHING: Identity = None
DAMAGED: Identity = b"damaged"
"""What a reader reports of a top that lacks a listed file: allowed only while a damaged top is put aside."""

KILLS = 1
"""Kills in a row without a power loss; each leaves more that is not durable, so that no end would come."""

INTERNAL = (".committed", ".hist", ".stage-", ".trash-")


class Fault(AssertionError):
    """The protocol broke a promise."""


@dataclasses.dataclass
class Run:
    """One action while it runs: it notes what it is about to commit and when it has said "saved"."""

    folder: ModelFolder
    steps: dict[Identity, Files]
    new: Identity = NOTHING
    acked: bool = False
    doomed: frozenset[Identity] = frozenset()
    allowed: frozenset[Identity] | None = None

    def stage(self, path: Path) -> None:
        """Note the step that a staged folder holds."""
        files = folder_files(self.folder.storage, path)
        self.new = files[STATE]
        self.steps[self.new] = files


Action = Callable[[Run], None]


def folder_files(storage: Any, path: Path) -> Files:
    """The files in a folder, and in the folders of a sharded step."""
    files = {}
    for name in storage.names(path):
        if not storage.is_folder(path / name):
            files[name] = storage.read(path / name)
        elif name.endswith("_sharded"):
            files |= {f"{name}/{part}": storage.read(path / name / part) for part in storage.names(path / name)}
    return {name: unmarked(data) if name == STATE else data for name, data in files.items()}


def unmarked(data: bytes) -> bytes:
    """A training state as its save wrote it, without what going back to it added."""
    if b'"went_back"' not in data:
        return data
    return seal({name: value for name, value in unseal(data, STATE).items() if name != "went_back"})


def identity(files: Files) -> Identity:
    """Say which step some files claim to be."""
    return files.get(STATE, files.get(MODEL))


def recover(run: Run) -> None:
    """What every writer does first."""
    run.folder.recover()


@dataclasses.dataclass
class Point:
    """The disk before one call of a run, and what a reader may find if the run ends there."""

    disk: Disk
    allowed: frozenset[Identity]
    doomed: frozenset[Identity]
    kills: int = 0
    depth: int = 0


class Explorer:
    """Crash one chain of actions everywhere; `counts` says how much was looked at."""

    def __init__(
        self,
        links: bool = True,
        limit: int = 16,
        share: int = 1,
        folder_type: type[ModelFolder] = ModelFolder,
        storage_type: type[MemoryStorage] = MemoryStorage,
    ) -> None:
        """Crash every `share`-th recovery; a power loss has at most `limit` outcomes."""
        self.share, self.depth = share, 1000
        self.links, self.limit = links, limit
        self.folder_type, self.storage_type = folder_type, storage_type
        self.recovery: Action = recover
        self.also: frozenset[Identity] = frozenset()
        self.unsure: frozenset[Identity] = frozenset()
        self.steps: dict[Identity, Files] = {}
        self.user: Files = {}
        self.config: bytes | None = None
        self.counts: Counter[str] = Counter()

    def storage(self, disk: Disk, watch: Callable[[], None] = lambda: None) -> MemoryStorage:
        """A storage on this disk, with or without links."""
        return self.storage_type(disk, self.links, watch)

    # Running

    def trace(self, start: Disk, act: Action, allowed: frozenset[Identity]) -> tuple[list[Point], Run]:
        """Run an action whole, and return the disk before each of its calls and at its end."""
        disk, points = start.copy(), []

        def note() -> None:
            may = frozenset({run.new}) if run.acked else allowed | {run.new} if run.new else allowed
            points.append(Point(disk.copy().tidy(), may, run.doomed))

        run = Run(self.folder_type(ROOT, self.storage(disk, note)), self.steps)
        names = (re.search(r"[-_]([0-9a-f]{4})$", name) for name in disk.seen[0])
        number = max((int(m[1], 16) for m in names if m), default=0)

        def new_id() -> str:
            nonlocal number
            number += 1
            return f"{number:04x}"

        with contextlib.ExitStack() as patches:
            for module in (commit, names_of_folders, removal, training_state):
                patches.enter_context(mock.patch.object(module, "new_id", new_id))
            for module in (commit, owner):
                patches.enter_context(mock.patch.object(module, "new_stage_name", lambda: f".stage-{new_id()}"))
            act(run)
        note()
        return points, run

    def run(self, starts: Iterable[Disk], act: Action, name: str) -> list[Disk]:
        """Crash an action on each of some disks; return the disks that its ends and the recoveries lead to."""
        ends: dict[int, Disk] = {}
        for start in starts:
            self.visited: set[int] = set()
            old = self.look(start)
            self.config = self._edited_config(start)
            committed = self.whole_steps(start)
            points, run = self.trace(start, act, frozenset({old}) | self.also)
            new_config = self.steps[run.new].get(CONFIG) if run.new else None
            if self.config and new_config and not same(self.config, new_config):
                self.config = None  # a new architecture replaces config.json
            try:
                self._crash(points, committed, ends)
            except Fault as fault:
                raise Fault(f"{name}: {fault}") from fault
            self.counts["readers"] += self.read_between(
                [p.disk for p in points], points[0].allowed | points[-1].allowed
            )
        self.counts["actions"] += 1
        return list(ends.values())

    def _crash(self, points: list[Point], committed: set[Identity], ends: dict[int, Disk]) -> None:
        self._expand(points, todo := deque())
        last_disks = [points[-1].disk]
        while todo:
            point = todo.popleft()
            found = self.check(point)
            try:
                recovery, _ = self.trace(point.disk, self.recovery, point.allowed)
            except (OSError, CheckpointDamaged) as error:
                raise self._fault(point.disk, f"recovery failed: {error!r}") from error
            last = recovery[-1]
            seen = self.check(last)
            if found != seen and found not in self.unsure:
                raise self._fault(last.disk, f"recovery changed the newest step from {found!r} to {seen!r}")
            last.allowed = frozenset({seen})
            if left := [name for name in last.disk.seen[0] if name.startswith(INTERNAL)]:
                raise self._fault(last.disk, f"recovery left {left}")
            if lost := committed - self.whole_steps(last.disk) - point.doomed - self.unsure:
                raise self._fault(last.disk, f"lost {sorted(map(label, lost))}")
            for earlier in recovery:
                earlier.doomed, earlier.kills, earlier.depth = point.doomed, point.kills, point.depth + 1
            last_disks.append(last.disk)
            self.counts["recoveries"] += 1
            if self.counts["recoveries"] % self.share == 0 and point.depth < self.depth:
                self._expand(recovery, todo)
        for disk in last_disks:
            self._end(disk, ends)

    def _end(self, disk: Disk, ends: dict[int, Disk]) -> None:
        """Add a disk as the start of the next action; all that may still be undone is the removal of leftovers."""
        last = {slot: (inode, unsynced) for changes, unsynced in disk.operations for slot, inode in changes}
        for (folder, name), (inode, unsynced) in last.items():
            if unsynced and folder == 0 and not name.startswith((".stage-", ".trash-")):
                raise self._fault(disk, f"after the end a power loss may undo {name} := {inode}")
        durable = disk.copy().sync_all()
        ends.setdefault(durable.key(), durable)

    def _expand(self, points: list[Point], todo: deque[Point]) -> None:
        """Add what a kill and every power loss leave at each point, unless it was seen."""
        for point in points:
            key = hash((point.disk.key(), point.allowed, point.doomed, "before"))
            if key in self.visited:
                continue
            self.visited.add(key)
            self.counts["crash points"] += 1
            ways = [(disk, 0) for disk in point.disk.power_loss(self.limit)]
            if point.kills < KILLS:
                ways.append((point.disk, point.kills + 1))
            for disk, kills in ways:
                self.counts["outcomes"] += 1
                key = hash((disk.key(), point.allowed, point.doomed))
                if key not in self.visited:
                    self.visited.add(key)
                    self.counts["disk states"] += 1
                    todo.append(Point(disk, point.allowed, point.doomed, kills, point.depth))

    # Checking

    def check(self, point: Point) -> Identity:
        """Find one of the allowed steps, and nothing of the user's gone; return the step."""
        disk = point.disk
        found = self.look(disk)
        if found not in point.allowed:
            raise self._fault(disk, f"a reader finds {label(found)}, allowed: {sorted(map(label, point.allowed))}")
        for name, data in self.user.items():
            if disk.text(ROOT / name) != data:
                raise self._fault(disk, f"{name}, a user's file, is {disk.text(ROOT / name)!r}")
        if self.config and (there := disk.text(ROOT / CONFIG)) != self.config:
            raise self._fault(disk, f"config.json at the top is {there!r}, a person had made it {self.config!r}")
        storage = self.storage(disk)
        for step, path in ModelFolder(ROOT, storage).kept_steps().items():
            files = folder_files(storage, path)
            which = self.identify(files, disk)
            if which is None or f'"step": {step}'.encode() not in (which if STATE in files else b'"step": 0'):
                raise self._fault(disk, f"{path.name} holds {label(which)}")
        return found

    def look(self, disk: Disk) -> Identity:
        """Read the newest step as a program of ours does."""
        return self.meet(self.folder_type(ROOT, self.storage(disk)), disk)

    def meet(self, folder: ModelFolder, disk: Disk) -> Identity:
        """Read the newest step of a folder, and say which it is."""
        states: list[bytes | None] = []
        real = folder._state_bytes
        with mock.patch.object(folder, "_state_bytes", lambda: states.append(real()) or states[-1]):
            try:
                opened: OpenStep = folder.open_newest()
            except CheckpointDamaged:
                return DAMAGED
        files = {name: file.read() for name, file in opened.files.items()}
        if states[-1] is not None:
            files[STATE] = unmarked(states[-1])
        elif MODEL not in files:
            return NOTHING
        return self.identify(files, disk)

    def identify(self, files: Files, disk: Disk) -> Identity:
        """Say which step some files are, all of them.

        Raises: Fault when they are a mixture, or not all of one step.
        """
        which = identity(files)
        step = self.steps.get(which)
        if step is None:
            raise self._fault(disk, f"no step is {files}")
        wrong = [n for n in files.keys() | step.keys() if n != CONFIG and files.get(n) != step.get(n)]
        if wrong:
            raise self._fault(disk, f"{ {n: files.get(n) for n in wrong} } do not belong to {label(which)}")
        if CONFIG in step and (CONFIG not in files or not same(files[CONFIG], step[CONFIG])):
            raise self._fault(disk, f"config.json is {files.get(CONFIG)!r} at {label(which)}")
        return which

    def whole_steps(self, disk: Disk) -> set[Identity]:
        """Every step that is whole at the top, kept or aside."""
        storage, found = self.storage(disk), set()
        for path in (ROOT, *(ROOT / name for name in disk.seen[0] if name.startswith(("step_", "aside_")))):
            files = folder_files(storage, path)
            step = self.steps.get(identity(files), {})
            if step and all(files.get(name) == data for name, data in step.items() if name != CONFIG):
                found.add(identity(files))
        return found

    def _edited_config(self, disk: Disk) -> bytes | None:
        """The config.json at the top: from here on a person's, which no save of this architecture may touch."""
        return disk.text(ROOT / CONFIG)

    def _fault(self, disk: Disk, what: str) -> Fault:
        return Fault(f"{what}\n{disk.tree()}")

    # A reader beside a writer

    def read_between(self, disks: list[Disk], allowed: frozenset[Identity]) -> int:
        """Run a reader through a run of a writer, its calls spread over the writer's in every way that differs.

        At each call the reader may find what is there now or after any number of writer's calls. Of those that
        answer alike the earliest stands for all: whatever follows a later one can also follow it.
        """
        todo, count = [()], 0
        while todo:
            times = todo.pop()
            storage = _Between(disks, self.links, times)
            try:
                found = self.meet(self.folder_type(ROOT, storage), disks[storage.time])
            except _NextCall as call:
                todo += [(*times, i) for i in call.times]
                continue
            count += 1
            if found not in allowed:
                raise self._fault(disks[storage.time], f"a reader beside the writer, at {times}, finds {found!r}")
        return count


class _NextCall(Exception):
    """The reader makes a call whose time is open: these times have different answers."""

    def __init__(self, times: list[int]) -> None:
        super().__init__()
        self.times = times


class _Between(MemoryStorage):
    """Answers the reader's n-th call from the disk at the n-th of `times`."""

    def __init__(self, disks: list[Disk], links: bool, times: tuple[int, ...]) -> None:
        super().__init__(disks[0], links)
        self.disks, self.times, self.calls, self.time = disks, times, 0, 0

    def read(self, path: Path) -> bytes:
        return self._answer(path)

    def open(self, path: Path) -> BinaryIO:
        return io.BytesIO(self._answer(path))

    def _answer(self, path: Path) -> bytes:
        if self.calls == len(self.times):
            answers: dict[bytes | None, int] = {}
            for i in range(self.time, len(self.disks)):
                answers.setdefault(self.disks[i].text(path), i)
            raise _NextCall(list(answers.values()))
        self.time = self.times[self.calls]
        self.calls += 1
        data = self.disks[self.time].text(path)
        if data is None:
            raise FileNotFoundError(path)
        return data


def label(which: Identity) -> str:
    """Name a step in messages."""
    found = re.search(rb'"commit_id": "(\w+)"', which or b"")
    return found[1].decode() if found else repr(which)


def same(a: bytes, b: bytes) -> bool:
    """Whether two config.json are of one width."""
    width = re.compile(rb'"n_embd": (\d+)')
    return width.findall(a) == width.findall(b)
