"""Saves that fail on rank 1: forked.py RANKS tests.makers.failing_save ROOT; each rank writes what it was told."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from core.checkpoint import CheckpointManager
from core.errors import SaveFailed
from core.networks.distributed import open_world
from core.training.ranks import WorldRanks


def main(words: list[str]) -> int:
    root = Path(words[0])
    with open_world("fsdp") as world, CheckpointManager("dante", root, ranks=WorldRanks(world)) as manager:
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
        _fail_to_copy(manager, model, optimizer, step + 3, world.rank, root)
    return 0


def _fail_to_copy(manager: CheckpointManager, model: Any, optimizer: Any, step: int, rank: int, root: Path) -> None:
    """Fail on rank 1 before a byte is copied; rank 0 has heard of it when all begin the next save, the others not."""
    memory = manager._saver.memory
    blocks = memory.blocks

    def none_left(wanted: int, pinned: bool) -> Any:
        if rank == 1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return blocks(wanted, pinned)

    memory.blocks = none_left  # type: ignore[method-assign]
    manager.save(model, optimizer, step=step)
    manager._saver.join()
    memory.blocks = blocks  # type: ignore[method-assign]
    said: list[Any] = []
    for ask in ([manager.raise_failed] if rank == 0 else []) + 2 * [
        lambda: manager.save(model, optimizer, step=step + 1)
    ]:
        try:
            said.append(ask())
        except SaveFailed as error:
            said.append(str(error))
    manager.wait()
    (root / f"copy{rank}.json").write_text(json.dumps(said))
