"""Save to a disk that is really full, and to one that is really read-only; run in a mount namespace of its own.

unshare --mount --map-root-user python -m tests.faults.full_disk FOLDER
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from core.bundle.commit import MODEL
from core.errors import CheckpointError, SaveFailed
from tests.conftest import ROOT
from tests.faults.scenarios import NAME, loaded, whole_steps
from tests.faults.tally import Tally
from tests.makers.models import equal, save_durably, started, train_and_save, update

ENTER = ["unshare", "--mount", "--map-root-user"]


def why_not() -> str | None:
    """Say why this machine cannot mount a file system for a test; None where it can."""
    if not shutil.which("unshare") or not shutil.which("mount"):
        return "unshare and mount are not installed"
    tried = subprocess.run([*ENTER, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no mount namespace here: {tried.stderr.strip()}"


def run(folder: Path) -> Tally:
    """Fill a small tmpfs up, and mount a folder read-only, in a process that alone sees it."""
    command = [*ENTER, sys.executable, "-W", "ignore", "-m", "tests.faults.full_disk", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tally = Tally.parse(done.stdout)
    tally.check(done.returncode == 0 and tally.counts, f"ended with {done.returncode}: {done.stderr[-500:]}")
    return tally


def fill_up(place: Path, tally: Tally) -> None:
    """Leave less and less room for a save, until it fits no more, and from nothing until it fits again."""
    _mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", place)
    made, model, optimizer = started(place)
    train_and_save(made, model, optimizer, 2)
    free = shutil.disk_usage(place).free
    for left in (0, 4096, 8192, 65536, 131072, 262144, free // 2, free):
        filler = place / "filler"
        free = shutil.disk_usage(place).free  # less than before where a mapped step was removed
        filler.write_bytes(bytes(max(free - left, 0)))
        before, step = loaded(place), model.step
        update(model, optimizer)
        where = f"{left} bytes free"
        try:
            save_durably(made, model, optimizer, step=model.step)
        except SaveFailed as error:
            said = f"save of step {model.step} failed: No space left on device ("
            tally.check(said in str(error) and f"Step {step} is intact." in str(error), f"{where}: it says {error}")
            tally.check(equal(loaded(place)[1], before[1]), f"{where}: step {step} is not intact")
            tally.check(not list((place / NAME).glob(".stage-*")), f"{where}: partial files stay")
            tally.check(len(whole_steps(place)) == 1, f"{where}: the kept step is not whole")
            tally.counts["saves that did not fit"] += 1
            filler.unlink()
            save_durably(made, model, optimizer, step=model.step)
        else:
            filler.unlink()
            tally.counts["saves that fitted"] += 1
        there = torch.load(place / NAME / MODEL, weights_only=True)
        tally.check(equal(there, model.state_dict()), f"{where}: the next save is not there")
    made.close()


def refuse_writes(place: Path, tally: Tally) -> None:
    """Save to, recover and migrate a folder that became read-only; read it still."""
    made, model, optimizer = started(place)
    train_and_save(made, model, optimizer, 2)
    _mount("--bind", place, place)
    _mount("-o", "remount,ro,bind", place)
    before = loaded(place)
    update(model, optimizer)
    for what, act in (
        ("a save", lambda: save_durably(made, model, optimizer, step=3)),
        ("a resume", lambda: started(place)),
    ):
        try:
            act()
        except CheckpointError as error:
            told = str(error).startswith(str(place)) and "Read-only file system" in str(error)
            tally.check(told, f"read-only: {what} says {error}")
        else:
            tally.losses.append(f"read-only: {what} said nothing")
        made.close()  # the next one needs the lock
        tally.counts["writes refused"] += 1
    tally.check(before is not None and equal(loaded(place)[1], before[1]), "read-only: it cannot be read")


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = Tally()
    for act in (fill_up, refuse_writes):
        target = Path(sys.argv[1]) / act.__name__
        target.mkdir()
        act(target, found)
    print(found.lines())
