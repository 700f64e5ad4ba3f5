"""Let every storage call fail, once or from then on, and look what is said, what a reader finds and what comes next."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from core.bundle.folder import FolderReader
from core.bundle.storage import DISK
from core.errors import CheckpointError
from tests.faults.kill_points import Killer, expected, half
from tests.faults.scenarios import NAME, SCENARIOS, Act, Expected, Found, reset_disk, same
from tests.faults.tally import Tally
from tests.makers.models import copy

TAKES_ROOM = [os.open, os.mkdir, os.write, os.pwrite, os.link, getattr(os, "posix_fallocate", None)]
LASTING = {
    errno.ENOSPC: lambda call: call in TAKES_ROOM,
    errno.EMFILE: lambda call: call is os.open,
    errno.EACCES: lambda call: call not in (os.write, os.pwrite, os.fsync),
    errno.EIO: lambda call: True,
}
"""What can go wrong, and which calls go on failing when it stays so."""

CHOSEN = [name for name in SCENARIOS if name not in ("migration of two files", "save beside training")]
"""Not those that would rightly end otherwise: the second file becomes the bundle, training has gone on."""

LASTING_IN = ["next save", "migration of a file", "walk back"]


class Failing(Killer):
    """Fails call `at`, and with `lasting` those after it that this error concerns; half of a write is made before."""

    def __init__(self, at: int, number: int, lasting: bool) -> None:
        super().__init__()
        self.fails_at, self.number, self.lasting = at, number, lasting

    def __call__(self, call, *args):
        at = self.count
        if at == self.fails_at and call in (os.write, os.pwrite) and len(args[1]) > 1:
            self.fails_at += 1
            return super().__call__(call, args[0], half(args[1]), *args[2:])
        if at == self.fails_at or (self.lasting and at > self.fails_at and LASTING[self.number](call)):
            self.calls.append(call.__name__)
            raise OSError(self.number, os.strerror(self.number))
        return super().__call__(call, *args)


class Short(Killer):
    """Writes at most so many bytes a call, as the kernel may."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest

    def __call__(self, call, *args):
        if call in (os.write, os.pwrite):
            args = (args[0], args[1][: self.longest], *args[2:])
        return super().__call__(call, *args)


def fail_everywhere(name: str, folder: Path, every: int) -> Tally:
    """Let each call of one scenario fail, or some."""
    scenario, tally = SCENARIOS[name], Tally()
    base = folder / "base"
    base.mkdir()
    scenario.before(base)
    numbers = itertools.cycle(LASTING)
    try:
        what, calls = expected(scenario, base, folder / "whole")
        for at in range(len(name) % every, len(calls), every):
            for lasting in (False, True) if name in LASTING_IN else (False,):
                trial = copy(base, folder / "trial")
                number = next(numbers)
                kind = f"{'from' if lasting else 'at'} call {at} of {len(calls)} ({calls[at]})"
                where = f"{name}, {errno.errorcode[number]} {kind}"
                scenario.set_disk()
                act = scenario.prepare(trial)
                DISK.change = failing = Failing(at, number, lasting)
                error = raised(act, tally, where)
                DISK.change = Killer()
                found = what.check_interrupted(trial, tally, where)
                check_said(error, trial, failing, what, found, tally, where)
                what.check_finished(trial, found, tally, where, act)
                tally.counts["injected errors"] += 1
                shutil.rmtree(trial)
                act = error = None
                gc.collect()  # a manager whose close failed gives its lock back before the folder's name is used again
        for longest in (1000, 4096):
            trial = copy(base, folder / "trial")
            where = f"{name}, at most {longest} bytes a write"
            scenario.set_disk()
            act = scenario.prepare(trial)
            DISK.change = Short(longest)
            tally.check(raised(act, tally, where) is None, f"{where}: it failed")
            what.check_finished(trial, what.check_interrupted(trial, tally, where), tally, where)
            tally.counts["runs with short writes"] += 1
            shutil.rmtree(trial)
    finally:
        reset_disk()
    return tally


def _has_files(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())  # an empty stage was committed and has been emptied


def raised(act: Act, tally: Tally, where: str) -> CheckpointError | None:
    """Return the error that something ends in, which must be one that we raise on purpose."""
    try:
        act()
    except CheckpointError as error:
        return error
    except Exception as error:
        tally.losses.append(f"{where}: ends in {error!r}")
    return None


def check_said(
    error: CheckpointError | None,
    root: Path,
    failing: Failing,
    what: Expected,
    found: Found,
    tally: Tally,
    where: str,
) -> None:
    """Check the sentence, and that no partial file stays where removing it does not fail as well."""
    if error is None:
        tally.check(same(found, what.new), f"{where}: nothing was said, and the new step is not there")
        return
    said, text = str(error), os.strerror(failing.number)
    told = said.startswith(str(root / NAME)) and f": {text}" in said and said.endswith(".") and "\n" not in said
    tally.check(told, f"{where}: it says {said!r}")
    if "save of step" in said or "not migrated: " in said:
        tally.check("B needed, " in said and "B free)" in said, f"{where}: no numbers in {said!r}")
    if not failing.lasting or failing.number == errno.ENOSPC:
        committed = FolderReader(root / NAME).committed  # a stage where folders cannot be renamed
        left = [path.name for path in (root / NAME).glob(".stage-*") if path != committed and _has_files(path)]
        fails_to_remove = failing.calls[failing.fails_at] in ("unlink", "rmdir")
        is_recovery = where.startswith("recovery")  # what was there before it is for it to remove
        tally.check(not left or fails_to_remove or is_recovery, f"{where}: {left} stays")


def run(folder: Path, names: Iterable[str] = CHOSEN, every: int = 1) -> Tally:
    """Let every call of every scenario fail, or one of every so many."""
    torch.set_num_threads(1)
    tally = Tally()
    for name in names:
        place = folder / name.replace(" ", "_")
        place.mkdir(parents=True)
        tally.add(fail_everywhere(name, place, every))
        shutil.rmtree(place)
    return tally
