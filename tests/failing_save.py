"""A save that fails on rank 1: tests.forked RANKS tests.failing_save ROOT; each rank writes what it was told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from core.distributed import open_world
from core.errors import SaveFailed
from core.ranked_checkpoint import RankedManager


def main(words: list[str]) -> int:
    root = Path(words[0])
    with open_world("fsdp") as world, RankedManager("dante", root, world=world) as manager:
        model, optimizer, step = manager.initialize_for_training({"device": "cpu"}, "char", None, 1e-3)
        storage, create = manager._folder.storage, manager._folder.storage.create_blocks

        def full(path, size):
            if world.rank == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return create(path, size)

        storage.create_blocks = full  # type: ignore[method-assign]
        manager.save(model, optimizer, step=step + 1)
        try:
            manager.wait()
        except SaveFailed as error:
            (root / f"told{world.rank}.txt").write_text(str(error))
        storage.create_blocks = create  # type: ignore[method-assign]
        manager.save(model, optimizer, step=step + 2)
        manager.wait()
    return 0
