"""Several writers on one folder, on a disk in memory: their storage calls in every order, or in random ones.

python -m tests.faults.two_writers [--schedules N] [--minutes M] [--seed S]

Each writer runs in a thread that stops before every storage call until the schedule lets it go on. Writers take the
lock as threads and processes do: one waits while another has it, and a dead one has none.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from unittest import mock

from core.bundle import commit, owner, removal, training_state
from core.bundle import folder as names_of_folders
from tests.faults.crash_model import MODES, built, save
from tests.faults.explorer import Action, Explorer, Fault, Identity, Run, label, recover
from tests.faults.memory_disk import ROOT, Disk

KILL, POWER = 0.01, 0.004
"""How likely, at each call of a random schedule, its writer is killed, and the power is lost."""


class Killed(BaseException):
    """Raised in a writer at the call before which it is killed."""


class Writer:
    """One save, in a thread that makes one storage call each time it is let go."""

    def __init__(self, name: str, act: Action, explorer: Explorer, disk: Disk) -> None:
        self.name, self.calls, self.ended, self.has_lock, self.dead = name, 0, False, False, False
        self.error: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.run = Run(explorer.folder_type(ROOT, explorer.storage(disk, self._pause)), explorer.steps)
        threading.Thread(target=self._work, args=(act,), daemon=True).start()

    def _work(self, act: Action) -> None:
        self._go.acquire()
        try:
            act(self.run)
        except (Killed, Exception) as error:
            self.error = error
        self.ended = True
        self._stopped.release()

    def _pause(self) -> None:
        if not self.dead:
            self._stopped.release()
            self._go.acquire()
        if self.dead:  # what it would still tidy up, a dead process does not
            raise Killed
        self.calls += 1

    def go_on(self) -> None:
        """Make the call it waits at, and stop before the next one, or at the end."""
        self._go.release()
        self._stopped.acquire()

    def kill(self) -> None:
        """End it before the call it waits at."""
        self.dead = True
        self.go_on()


@dataclasses.dataclass
class World:
    """A disk and the writers on it; `newest` are the steps that a reader may find."""

    explorer: Explorer
    disk: Disk
    newest: frozenset[Identity]
    writers: list[Writer] = dataclasses.field(default_factory=list)
    saved: set[Identity] = dataclasses.field(default_factory=set)
    doomed: set[Identity] = dataclasses.field(default_factory=set)

    def copy(self) -> World:
        """The same folder, without writers."""
        return dataclasses.replace(self, disk=self.disk.copy(), writers=[], saved=set(self.saved), doomed=set())

    def add(self, name: str, act: Action) -> Writer:
        """Start a writer; it has made no call yet."""
        self.writers.append(writer := Writer(name, act, self.explorer, self.disk))
        return writer

    def runnable(self) -> list[Writer]:
        """The writers that can make a call: the one that has the lock, or all when nobody has it."""
        alive = [writer for writer in self.writers if not writer.ended]
        return [writer for writer in alive if writer.has_lock] or alive

    def step(self, writer: Writer) -> None:
        """Let a writer take the lock and make a call; note what it has committed."""
        writer.has_lock = True
        writer.go_on()
        self._note(writer)

    def kill(self, writer: Writer) -> None:
        """Kill a writer, which may have committed or not."""
        writer.kill()
        self._note(writer)

    def _note(self, writer: Writer) -> None:
        run = writer.run
        self.doomed |= run.doomed
        if run.acked:
            self.newest = frozenset({run.new})
            self.saved.add(run.new)
        elif (run.new is not None and not writer.ended) or (writer.dead and run.new is not None):
            self.newest |= {run.new}
        if writer.ended:
            writer.has_lock = False
            if writer.error is not None and not isinstance(writer.error, Killed):
                raise Fault(f"{writer.name} ended in {writer.error!r} after {writer.calls} calls\n{self.disk.tree()}")

    def look(self) -> Identity:
        """Read as a program beside the writers does, and check that it finds a step that it may find."""
        found = self.explorer.look(self.disk)
        if found not in self.newest:
            raise Fault(
                f"a reader finds {label(found)}, allowed: {sorted(map(label, self.newest))}\n{self.disk.tree()}"
            )
        return found

    def lose_power(self, choose: random.Random) -> None:
        """Kill all, and go on with one of the disks that this leaves."""
        for writer in self.writers:
            if not writer.ended:
                self.kill(writer)
        self.disk = choose.choice(list(self.disk.power_loss(6)))

    def close(self) -> None:
        """Recover when all have ended, and look for what was saved."""
        run = Run(self.explorer.folder_type(ROOT, self.explorer.storage(self.disk)), self.explorer.steps)
        recover(run)
        self.look()
        lost = self.saved - self.explorer.whole_steps(self.disk) - self.doomed
        if lost:
            raise Fault(f"lost {sorted(map(label, lost))}\n{self.disk.tree()}")


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Number what is named at random, as names of this process."""
    number = 0

    def new_id() -> str:
        nonlocal number
        number += 1
        return f"{number:04x}"

    prefix = owner.new_stage_name().rpartition("-")[0]
    with contextlib.ExitStack() as patches:
        for module in (commit, names_of_folders, removal, training_state):
            patches.enter_context(mock.patch.object(module, "new_id", new_id))
        for module in (commit, owner):
            patches.enter_context(mock.patch.object(module, "new_stage_name", lambda: f"{prefix}-{new_id()}"))
        yield


def world(mode: str) -> World:
    """A folder with two steps."""
    links, storage_type = MODES[mode]
    explorer = Explorer(links, storage_type=storage_type)
    disk = built(explorer, save(1, "A"), save(2, "B"))
    found = explorer.look(disk)
    return World(explorer, disk, frozenset({found}), saved=set(explorer.whole_steps(disk)))


def second_at_every_call(mode: str) -> int:
    """Two writers of whom each waits for the lock; the second begins at every call of the first, a reader at each call.

    Returns how many orders there were.
    """
    base = world(mode)
    for at in itertools.count():
        now = base.copy()
        with named():
            first = now.add("the first", save(3, "C"))
            ended = not _steps(now, first, at)
            now.add("the second", save(4, "D", prune=[1]))
            while ready := now.runnable():
                now.step(ready[-1])
                now.look()
            now.close()
        if ended:
            return at
    raise AssertionError("unreachable")


def both_killed_at_every_call(mode: str) -> int:
    """Two writers, the first killed at every call, then the second at every call of its own; returns how many pairs."""
    base, pairs = world(mode), 0
    for at in itertools.count():
        for later in itertools.count():
            now = base.copy()
            with named():
                first = now.add("the first", save(3, "C"))
                ended = not _steps(now, first, at)
                if not ended:
                    now.kill(first)
                now.look()
                second = now.add("the second", save(4, "D", prune=[1]))
                done = not _steps(now, second, later)
                if not done:
                    now.kill(second)
                now.close()
            pairs += 1
            if done:
                break
        if ended:
            return pairs
    raise AssertionError("unreachable")


def _steps(now: World, writer: Writer, number: int) -> bool:
    """Let a writer make so many calls; False when it ended before."""
    for _ in range(number):
        if writer.ended:
            return False
        now.step(writer)
    return not writer.ended


def at_random(seed: int, mode: str, base: World) -> Counter[str]:
    """Three writers in a random order, killed and without power at random calls; a reader now and then."""
    choose, counts = random.Random(seed), Counter[str]()
    now = base.copy()
    waiting = [
        save(n, "CDE"[n - 3], prune=[n - 2] if n > 3 else (), optimizer=choose.random() < 0.8) for n in (3, 4, 5)
    ]
    with named():
        while waiting or now.runnable():
            if waiting and (not now.runnable() or choose.random() < 0.05):
                now.add(f"writer {4 - len(waiting)}", waiting.pop(0))
                counts["writers"] += 1
            writer, chance = choose.choice(now.runnable()), choose.random()
            if chance < POWER:
                now.lose_power(choose)
                counts["power losses"] += 1
            elif chance < POWER + KILL:
                now.kill(writer)
                counts["kills"] += 1
            else:
                now.step(writer)
            if chance > 0.9:
                now.look()
                counts["readers"] += 1
        now.close()
    counts["schedules"] += 1
    return counts


def random_schedules(number: int, seed: int, until: float = float("inf")) -> Counter[str]:
    """Run so many random schedules, or as many as fit, over all kinds of file systems.

    Raises: Fault naming the seed of the schedule that broke a promise.
    """
    bases, counts = {mode: world(mode) for mode in MODES}, Counter[str]()
    for n in range(number):
        mode = list(MODES)[n % len(MODES)]
        try:
            counts += at_random(seed + n, mode, bases[mode])
        except Fault as fault:
            raise Fault(f"schedule {seed + n} on {mode}: {fault}") from fault
        if time.monotonic() > until:
            break
    return counts


def main(argv: Sequence[str]) -> int:
    """Run both, and print what was looked at."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.two_writers")
    parser.add_argument("--schedules", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    args = parser.parse_args(argv)
    until = time.monotonic() + 60 * args.minutes
    for mode in MODES:
        orders, pairs = second_at_every_call(mode), both_killed_at_every_call(mode)
        print(f"{mode}: two saves in {orders} orders, killed in {pairs:,} pairs of calls", flush=True)
    print(f"random schedules from seed {args.seed}: ", end="", flush=True)
    workers = os.cpu_count() or 1
    share = -(-args.schedules // workers)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.starmap(random_schedules, [(share, args.seed + n * share, until) for n in range(workers)])
    print(", ".join(f"{number:,} {what}" for what, number in sum(parts, Counter()).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
