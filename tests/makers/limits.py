"""Limits of time: how much the processor works, and how long is waited for another process."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def processor_seconds(most: float) -> Iterator[None]:
    """Fail when the block keeps the processor longer; what else the machine does costs nothing."""
    start = time.process_time()
    yield
    took = time.process_time() - start
    assert took < most, f"{took:.1f} seconds of processor time, expected less than {most}"


def wait_until(holds: Callable[[], object], run: subprocess.Popen | None = None, seconds: float = 200.0) -> None:
    """Wait until something holds, which a process brings about; fail when it ends before, or takes longer."""
    end = time.monotonic() + seconds
    while not holds():
        assert run is None or run.poll() is None, f"it ended with {run.returncode}"
        assert time.monotonic() < end, f"waited for {seconds} seconds"
        time.sleep(0.002)
