"""The parts of the suite, each run by itself."""

from __future__ import annotations

import importlib
import io
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests.faults.tally import Tally

PARTS = {
    "killed_runs": "real runs of train.py that save at every step, killed",
    "kill_points": "killed before, after and in the middle of storage calls",
    "failing_calls": "storage calls that fail",
    "power_loss": "power lost under real folders",
    "crash_model": "power lost and killed, on a disk in memory",
    "random_lives": "random sequences of saves, kills, damage, going back",
    "readers": "loads beside saves",
    "damage": "bits flipped, files cut and exchanged",
    "mounts": "killed on an overlay, in memory, on FUSE",
    "full_disk": "disks that are full or read-only",
    "referee": "killed and judged by a program of somebody else",
}
"""Every part has a function `run(folder)` that returns a Tally, and may have a `why_not` that says what is missing."""


def look(name: str) -> tuple[Tally, str | None, float]:
    """Run one part in a process of its own: what it counted, why it was left out, and the seconds."""
    sys.stderr = io.StringIO()  # what loads of damaged files say, thousands of times
    warnings.simplefilter("ignore")
    started, part = time.perf_counter(), importlib.import_module(f"tests.faults.{name}")
    why = part.why_not() if hasattr(part, "why_not") else None
    if why:
        return Tally(), why, 0.0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        tally = part.run(Path(folder))
    return tally, None, time.perf_counter() - started
