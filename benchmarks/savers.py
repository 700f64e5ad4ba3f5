"""Ways to save a model and its optimizer, ours and others, behind the same three calls: save, wait, clear.

`save` returns when training may go on, `wait` when all is written. A way that calls itself durable has fsynced by then.
"""

from __future__ import annotations

import mmap
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.trained import Trained
from core.checkpoint import CheckpointManager


class Saver:
    """A way to save into a folder of its own."""

    durable = False

    def __init__(self, folder: Path, trained: Trained) -> None:
        self.folder = folder
        self.trained = trained
        folder.mkdir()

    def state(self) -> dict[str, Any]:
        """What is saved, as everybody writes it."""
        return {"model": self.trained.model.state_dict(), "optimizer": self.trained.optimizer.state_dict()}

    def save(self, step: int) -> None:
        """Save, as far as training waits for it."""

    def wait(self) -> None:
        """Wait until all is written."""

    def clear(self) -> None:
        """Remove what was written, so that the next way finds the disk idle."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Let go of what is held."""


class Ours(Saver):
    """CheckpointManager, the older step pruned."""

    durable = True

    def __init__(self, folder: Path, trained: Trained, stage_memory: int | None = None) -> None:
        super().__init__(folder, trained)
        self.manager = CheckpointManager(
            "ours", folder, keep=0, say=lambda line: None, stage_memory=stage_memory
        ).__enter__()

    def save(self, step: int) -> None:
        self.manager.save(self.trained.model, self.trained.optimizer, step=step)

    def wait(self) -> None:
        self.manager.wait()

    def clear(self) -> None:
        """Nothing: as in training, a save replaces the one before it."""

    def close(self) -> None:
        self.manager.close()


class Ring(Ours):
    """The same without memory for a copy."""

    def __init__(self, folder: Path, trained: Trained) -> None:
        super().__init__(folder, trained, stage_memory=0)


class TorchSave(Saver):
    """One torch.save of everything."""

    def save(self, step: int) -> None:
        torch.save(self.state(), self.folder / "ckpt.pt")


class TorchSaveDurable(TorchSave):
    """The same, fsynced."""

    durable = True

    def save(self, step: int) -> None:
        super().save(step)
        sync(self.folder)


class CloneAndThread(Saver):
    """Copy everything, and torch.save the copy in a thread."""

    def save(self, step: int) -> None:
        state = copied(self.state())
        self.thread = threading.Thread(target=torch.save, args=(state, self.folder / "ckpt.pt"))
        self.thread.start()

    def wait(self) -> None:
        self.thread.join()


class Safetensors(Saver):
    """save_file of all tensors, fsynced."""

    durable = True

    def __init__(self, folder: Path, trained: Trained) -> None:
        from safetensors.torch import save_file

        self.save_file = save_file
        super().__init__(folder, trained)

    def save(self, step: int) -> None:
        named = dict(self.trained.model.named_parameters())
        tensors = {name: p.detach() for name, p in named.items()}
        for name, p in named.items():
            values = self.trained.optimizer.state[p]
            tensors |= {f"{name}.{key}": value for key, value in values.items()}
        self.save_file(tensors, self.folder / "state.safetensors")
        sync(self.folder)


class Dcp(Saver):
    """torch.distributed.checkpoint.save, which fsyncs its files."""

    durable = True

    def __init__(self, folder: Path, trained: Trained) -> None:
        import torch.distributed.checkpoint as dcp

        self.dcp = dcp
        super().__init__(folder, trained)

    def save(self, step: int) -> None:
        self.dcp.save(self.state(), checkpoint_id=self.folder / "dcp", no_dist=True)


class DcpAsync(Dcp):
    """Its async_save."""

    def save(self, step: int) -> None:
        self.saving = self.dcp.async_save(self.state(), checkpoint_id=self.folder / "dcp", no_dist=True)

    def wait(self) -> None:
        getattr(self.saving, "upload_completion", self.saving).result()


class TorchSnapshot(Saver):
    """torchsnapshot's take."""

    def __init__(self, folder: Path, trained: Trained) -> None:
        import torchsnapshot

        self.snapshot = torchsnapshot.Snapshot
        super().__init__(folder, trained)

    def save(self, step: int) -> None:
        state = {"model": self.trained.model, "optimizer": self.trained.optimizer}
        self.saving = self.snapshot.async_take(str(self.folder / "snapshot"), state)

    def wait(self) -> None:
        self.saving.wait()


class Accelerate(Saver):
    """accelerate's save_state, fsynced."""

    durable = True

    def __init__(self, folder: Path, trained: Trained) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True)
        self.accelerator.prepare(trained.model, trained.optimizer)
        super().__init__(folder, trained)

    def save(self, step: int) -> None:
        self.accelerator.save_state(str(self.folder / "state"))
        sync(self.folder)


class Floor(Saver):
    """As many bytes of nothing, written as fast as the disk takes them: past the page cache, into reserved room."""

    durable = True
    BLOCK = 8 * 1024 * 1024

    def __init__(self, folder: Path, trained: Trained) -> None:
        super().__init__(folder, trained)
        self.block = mmap.mmap(-1, self.BLOCK)
        self.block.write(os.urandom(self.BLOCK))

    def save(self, step: int) -> None:
        left = -(-self.trained.nbytes // self.BLOCK)
        path = self.folder / "floor"
        flags = os.O_WRONLY | os.O_CREAT
        try:
            fd = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError:  # this file system has no O_DIRECT
            fd = os.open(path, flags, 0o666)
        try:
            os.posix_fallocate(fd, 0, left * self.BLOCK)
            for i in range(left):
                os.pwrite(fd, self.block, i * self.BLOCK)
            os.fsync(fd)
        finally:
            os.close(fd)


WAYS: dict[str, Callable[[Path, Trained], Saver]] = {
    "ours": Ours,
    "ours, ring": Ring,
    "torch.save": TorchSave,
    "torch.save + fsync": TorchSaveDurable,
    "clone + thread": CloneAndThread,
    "safetensors + fsync": Safetensors,
    "dcp.save": Dcp,
    "dcp.async_save": DcpAsync,
    "torchsnapshot": TorchSnapshot,
    "accelerate + fsync": Accelerate,
    "floor": Floor,
}


def copied(value: Any) -> Any:
    """The same with every tensor cloned."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def sync(folder: Path) -> None:
    """Make all files below a folder durable, and their names."""
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
