"""The CheckpointIO by which Lightning's Trainer reads what a CheckpointManager has saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..console.anchored import anchored
from ..errors import InputError
from .framework import framework


def checkpoint_io(folder: Path, load: Callable[[Any], dict[str, Any]], trainer: Any) -> Any:
    """Make the CheckpointIO: the folder of the manager is its own, every other path goes to the one before."""
    base: Any = framework("lightning.pytorch.plugins.io").CheckpointIO
    before = trainer.strategy.checkpoint_io
    before = getattr(before, "before", before)  # a second call of fit

    class ManagedIO(base):
        """Reads what a CheckpointManager has saved."""

        def __init__(self) -> None:
            self.before = before

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            if anchored(path) == folder:
                raise InputError(f"{path}: the callback saves here, at its steps. Nothing was written.")
            before.save_checkpoint(checkpoint, path, storage_options)

        def load_checkpoint(
            self, path: Any, map_location: Any = None, weights_only: bool | None = None
        ) -> dict[str, Any]:
            if anchored(path) == folder:
                return load(trainer)
            how = {} if map_location is None else {"map_location": map_location}
            return before.load_checkpoint(path, weights_only=weights_only is not False, **how)

        def remove_checkpoint(self, path: Any) -> None:
            if anchored(path) != folder:
                before.remove_checkpoint(path)

        def teardown(self) -> None:
            before.teardown()

    return ManagedIO()
