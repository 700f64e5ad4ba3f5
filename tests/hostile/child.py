"""Open the paths on stdin under a limit of memory, without torch: one JSON line for each, in a process of its own."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from core.containers.open import open_container
from core.errors import CheckpointError
from tests.fuzz.mutate import peak_megabytes

ROOM = 400 << 20
"""Bytes of address space: Python and its libraries have half of them before anything is opened."""


def main() -> None:
    """Say of each path how it opened, how long that took, and the most memory until then."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
    for line in sys.stdin:
        path = Path(line.rstrip("\n"))
        start = time.process_time()
        try:
            container = open_container(path)
            found = {"opened": [*container.foreign, *container.notes]}
        except CheckpointError as error:
            found = {"refused": str(error)}
        took = time.process_time() - start
        print(json.dumps({**found, "seconds": took, "megabytes": peak_megabytes()}), flush=True)
    assert "torch" not in sys.modules and "numpy" not in sys.modules


if __name__ == "__main__":
    main()
