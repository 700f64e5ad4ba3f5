"""Kill saves, goings back and walk backs on mounted file systems: an overlay, tmpfs, and FUSE by way of bindfs.

unshare --mount --map-root-user python -m tests.faults.mounts FOLDER KIND EVERY

The model lies in the lower layer of the overlay, as in the image of a container: the folders of its kept steps
cannot be renamed there.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT
from tests.faults import kill_points
from tests.faults.full_disk import ENTER, why_not
from tests.faults.tally import Tally
from tests.makers.models import copy

__all__ = ["lacking", "run", "why_not"]

NAMES = ["save that prunes two", "back to an older step", "walk back", "recovery of a commit"]


@contextlib.contextmanager
def overlay(base: Path, trial: Path) -> Iterator[Path]:
    """Lend an overlay whose lower layer is the folder."""
    layers = trial.with_name("layers")  # an upper layer cannot lie on an overlay itself: tmpfs
    layers.mkdir()
    trial.mkdir()
    with _mounted(layers, "-t", "tmpfs", "tmpfs"):
        for name in ("upper", "work"):
            (layers / name).mkdir()
        options = f"lowerdir={base},upperdir={layers}/upper,workdir={layers}/work,userxattr"
        with _mounted(trial, "-t", "overlay", "overlay", "-o", options):
            yield trial
    shutil.rmtree(layers)
    trial.rmdir()


@contextlib.contextmanager
def tmpfs(base: Path, trial: Path) -> Iterator[Path]:
    """Lend a copy in memory."""
    trial.mkdir()
    with _mounted(trial, "-t", "tmpfs", "tmpfs"):
        yield copy(base, trial / "copy")
    trial.rmdir()


@contextlib.contextmanager
def fuse(base: Path, trial: Path) -> Iterator[Path]:
    """Lend a copy seen through bindfs."""
    behind = copy(base, trial.with_name("behind"))
    trial.mkdir()
    subprocess.run(["bindfs", behind, trial], check=True)
    yield trial
    subprocess.run(["umount", trial], check=True)
    trial.rmdir()
    shutil.rmtree(behind)


@contextlib.contextmanager
def _mounted(place: Path, *arguments: str) -> Iterator[None]:
    subprocess.run(["mount", *arguments, str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


KINDS = {"overlay": overlay, "tmpfs": tmpfs, "fuse": fuse}


def lacking(kind: str) -> str | None:
    """Say what this machine lacks for one kind of mount; None where it has all."""
    if why := why_not():
        return why
    if kind == "fuse":
        return None if shutil.which("bindfs") else "bindfs is not installed, so nothing can be mounted by way of FUSE"
    if kind == "tmpfs":
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "base").mkdir()
        command = [*ENTER, sys.executable, "-m", "tests.faults.mounts", folder, "overlay", "try"]
        tried = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no overlay can be mounted here: {tried.stderr.strip()[-200:]}"


def killed_on(kind: str, folder: Path, every: int) -> Tally:
    """Kill the scenarios on one kind of mount, in a process that alone sees it."""
    command = [*ENTER, sys.executable, "-W", "ignore", "-m", "tests.faults.mounts", folder, kind, str(every)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tally = Tally.parse(done.stdout)
    tally.check(done.returncode == 0 and tally.counts, f"{kind}: ended with {done.returncode}: {done.stderr[-500:]}")
    return tally


def run(folder: Path) -> Tally:
    """Kill the scenarios on each kind of mount that this machine can make."""
    tally = Tally()
    for kind in KINDS:
        if lacking(kind) is None:
            (folder / kind).mkdir()
            tally.add(killed_on(kind, folder / kind, 4))
    return tally


if __name__ == "__main__":
    place, lay = Path(sys.argv[1]), KINDS[sys.argv[2]]
    if sys.argv[3] == "try":
        with lay(place / "base", place / "trial"):
            sys.exit()
    print(kill_points.run(place, NAMES, int(sys.argv[3]), lay).lines())
