"""Ranks without torchrun: one process imports torch and forks them, which is most of what a start costs.

python -m tests.makers.forked RANKS MODULE ARGUMENTS...
"""

from __future__ import annotations

import importlib
import os
import socket
import sys


def main(ranks: int, module: str, words: list[str]) -> int:
    """Run a module's `main` on each rank, as torchrun would; returns the largest exit code."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
    children = []
    for rank in range(ranks):
        if not (child := os.fork()):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            sys.argv = [module, *words]
            from core.console.commandline import run

            run(importlib.import_module(module).main)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256 for child in children)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
