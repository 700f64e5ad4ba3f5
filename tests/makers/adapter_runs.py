"""Runs of the adapters as processes: to the end, or killed at random moments and started again, and what they made."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT
from tests.makers.ranks import kill, processes


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """The paths at which two results are not equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)}"]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [f"{path}: {a} and {b}"]


def start(script: str, folder: Path, *words: str, ranks: int = 1, log: str = "log") -> subprocess.Popen[bytes]:
    """Start a script of tests/adapters in a folder, its output in a file there."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", f"tests.adapters.{script}", str(folder), *words]
    folder.mkdir(exist_ok=True)
    with (folder / log).open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def whole(script: str, folder: Path, *words: str, ranks: int = 1) -> dict[str, Any]:
    """Run a script to the end, and return its result."""
    code = start(script, folder, *words, ranks=ranks).wait(240)
    assert code == 0, (folder / "log").read_text()[-4000:]
    return torch.load(folder / "result.pt", weights_only=False)


def killed(
    script: str, folder: Path, *words: str, ranks: int = 1, kills: int = 3, seed: int = 0
) -> tuple[dict[str, Any], str]:
    """Run a script, kill all of it some time after each of several saves, and run it to the end; its result and log."""
    moments, log = random.Random(seed), folder / "log"
    for _ in range(kills):
        run = start(script, folder, *words, ranks=ranks)
        before, limit = log.stat().st_size, time.monotonic() + 200
        while run.poll() is None and b"saved step" not in log.read_bytes()[before:] and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(moments.random())  # the moment is what is drawn here
        for process in (run.pid, *processes(run).values()):
            kill(process, signal.SIGKILL)
        run.wait(60)
    return whole(script, folder, *words, ranks=ranks), log.read_text()
