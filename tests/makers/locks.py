"""A folder in which another process writes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from core.bundle import lock
lock.KERNEL_LOCKS = lock.KERNEL_LOCKS and sys.argv[2] == "kernel"
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def locked(folder: Path, kind: str = "kernel") -> Iterator[subprocess.Popen[bytes]]:
    """Have another process write in a folder, until its input ends or the block does."""
    command = [sys.executable, "-c", HOLDER, str(folder), kind]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        try:
            yield child
        finally:
            child.kill()
