"""The folder of one model, for reading: the names of its files, and which of them are the newest step.

docs/commit_protocol.md says what is on disk at each moment. Readers take no lock and change nothing.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from ..console.commands import typed
from ..containers.json_files import parse_json
from ..errors import CheckpointDamaged, CheckpointNotFound
from .storage import DISK, MOVING, Storage
from .training_state import STATE, TrainingState, new_id, unseal

T = TypeVar("T")

COMMITTED = ".committed"
CONFIG = "config.json"
MODEL = "model.pt"
MODEL_SHARDS = "model_sharded"
LOG = "metrics.jsonl"
STANDARD = (MODEL, CONFIG, "tokenizer.json", STATE, "optimizer.pt")
"""The files of a bundle whose training state lists none."""
MORE = ("ema.pt", "also.pt")
"""Files that a bundle may have in addition."""

_NOT_THERE = (FileNotFoundError, NotADirectoryError)

READ_ATTEMPTS = 1000
"""How many commits may happen while a reader opens one bundle before it gives up."""


@dataclass
class OpenStep:
    """The files of one committed step, open: a save beside it cannot mix in another step."""

    folder: Path
    state: TrainingState
    files: dict[str, BinaryIO]

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()


def step_folder(step: int) -> str:
    """Name the folder that keeps an older step."""
    return f"step_{step:08d}"


def aside_folder(step: int, why: str) -> str:
    """Name a folder for what is not deleted and never read: `damaged`, `abandoned`, `displaced` or `cleared`."""
    return f"aside_{step:08d}_{why}_{new_id()}"


def file_names(state: TrainingState) -> tuple[str, ...]:
    """Name the files of a bundle, its training state last; one in a folder is called `folder/file`."""
    if state.integrity is None:
        return (*(n for n in STANDARD if n != STATE), STATE)
    return (*state.files, STATE)


def entries(names: Iterable[str]) -> tuple[str, ...]:
    """Name what moves when a step is committed: files, and folders in place of the files in them."""
    return tuple(dict.fromkeys(name.partition("/")[0] for name in names))


def shown(path: Path) -> str:
    """A file's path for messages; for a shard, with the rank that wrote it."""
    shard = re.fullmatch(r"__(\d+)_\d+\.distcp", path.name)
    return f"{path} (the shard of rank {shard[1]})" if shard else str(path)


class FolderReader:
    """One model on disk: the newest step at the top, older ones in `step_NNNNNNNN/`."""

    def __init__(self, path: Path, storage: Storage = DISK) -> None:
        self.path = path
        self.storage = storage

    @property
    def committed(self) -> Path:
        """The committed step that is not yet rolled forward; it need not exist.

        Where folders cannot be renamed, it stays in the folder that it was staged in, and a file leads to it.
        """
        try:
            stage = re.fullmatch(rb"\.stage-[0-9a-z.-]+", self.storage.read(self.path / COMMITTED))
        except (*_NOT_THERE, IsADirectoryError, PermissionError):  # PermissionError: a folder, on Windows
            return self.path / COMMITTED
        return self.path / (stage[0].decode() if stage else COMMITTED)

    def read(self, name: str) -> bytes:
        """Read one file of the newest step; a committed step that is not yet rolled forward comes first.

        Raises: FileNotFoundError when there is none.
        """
        return self._newest(self.storage.read, name)

    def _newest(self, call: Callable[[Path], T], name: str) -> T:
        try:
            return call(self.committed / name)
        except _NOT_THERE:
            return call(self.path / name)

    def open_newest(self) -> OpenStep:
        """Open every file of the newest committed step; never a mixture of two.

        Raises: CheckpointDamaged when a listed file is missing or the training state is damaged.
        """
        for _ in range(READ_ATTEMPTS):
            before = self._state_bytes()
            state = unseal(before, f"{self.path / STATE}") if before is not None else TrainingState()
            opened, missing, stale = OpenStep(self.path, state, {}), None, False
            for name in file_names(state)[:-1]:
                try:
                    opened.files[name] = self._newest(self.storage.open, name)
                except _NOT_THERE:
                    missing = missing or name
                except IsADirectoryError as error:
                    opened.close()
                    raise CheckpointDamaged(f"{error.filename}: a folder, expected a file.") from error
                except (OSError, CheckpointDamaged) as error:
                    # a network file system: the name moved while it was being opened
                    stale = isinstance(error, OSError) and error.errno == errno.ESTALE
                    if not stale:
                        opened.close()
                        raise
            if not stale and self._state_bytes() == before:
                if missing is None or state.integrity is None:
                    return opened
                opened.close()
                raise CheckpointDamaged(
                    f"{shown(self.path / missing)}: missing, but {STATE} of step {state.step} lists it."
                )
            opened.close()
        raise CheckpointDamaged(f"{self.path}: another program commits faster than this one can open files.")

    def _state_bytes(self) -> bytes | None:
        try:
            return self.read(STATE)
        except _NOT_THERE:
            return None

    def open_kept(self, folder: Path) -> OpenStep:
        """Open every file of the bundle in one `step_NNNNNNNN/` folder.

        Raises: CheckpointNotFound when the step is not kept, CheckpointDamaged when a listed file is missing.
        """
        if not self.storage.exists(folder):
            raise CheckpointNotFound(f"{folder}: this step is not kept. {self.kept_said(int(folder.name[5:]))}")
        opened = self._open_listed(folder)
        if isinstance(opened, Path) and self.storage.exists(folder):  # a writer removes its optimizer state
            opened = self._open_listed(folder)
        if isinstance(opened, Path):
            raise CheckpointDamaged(f"{shown(opened)}: missing, but {STATE} lists it.")
        return opened

    def kept_said(self, wanted: int) -> str:
        """The kept steps with their losses, and the flag by which a step that is not among them would be."""
        kept, newest = self.kept_steps(), top_state(self).step
        steps = [self._step_said(step_folder(number), number) for number in kept]
        top = f"; the newest is {self._step_said('', newest)}" if newest is not None and newest not in kept else ""
        flag = f"{typed('train.py')} --keep_steps {wanted}"
        return f"Kept steps: {', '.join(steps) or 'none'}{top}. {flag} would have kept it."

    def _step_said(self, folder: str, step: int) -> str:
        loss = top_state(FolderReader(self.path / folder, self.storage)).val_loss
        return f"{step} (val_loss {loss:.4f})" if isinstance(loss, (int, float)) else str(step)

    def _open_listed(self, folder: Path) -> OpenStep | Path:
        """Open every file that the training state of a folder lists; the path of one that is missing instead."""
        try:
            state = unseal(self.storage.read(folder / STATE), f"{folder / STATE}")
        except FileNotFoundError:
            state = TrainingState()
        opened = OpenStep(folder, state, {})
        for name in file_names(state)[:-1]:
            try:
                opened.files[name] = self.storage.open(folder / name)
            except FileNotFoundError:
                if state.integrity is not None:
                    opened.close()
                    return folder / name
            except IsADirectoryError as error:
                opened.close()
                raise CheckpointDamaged(f"{error.filename}: a folder, expected a file.") from error
        return opened

    def kept_steps(self) -> dict[int, Path]:
        """List the older steps that are kept, oldest first, without those that are on their way, file by file."""
        found = (re.fullmatch(r"step_(\d{8,})", name) for name in self.storage.names(self.path))
        kept = {int(m[1]): self.path / m[0] for m in found if m}
        return {step: kept[step] for step in sorted(kept) if self._is_in_place(kept[step])}

    def _is_in_place(self, folder: Path) -> bool:
        names = self.storage.names(folder)
        return bool(names) and MOVING not in names

    def asides(self) -> list[Path]:
        """List the folders that were set aside, which are never read as checkpoints."""
        return [self.path / name for name in self.storage.names(self.path) if name.startswith("aside_")]

    def newest_id(self) -> str | None:
        """Identify the newest step: its commit id, or the checksum of a model that has none; None for no model."""
        folder = self.committed if self.storage.exists(self.committed / STATE) else self.path
        return self._commit_id(folder) or self._model_crc(folder)

    def _commit_id(self, folder: Path) -> str | None:
        try:
            return parse_json(self.storage.read(folder / STATE), f"{folder / STATE}").get("commit_id")
        except (FileNotFoundError, CheckpointDamaged):
            return None

    def _model_crc(self, folder: Path) -> str | None:
        try:
            with self.storage.open(folder / MODEL) as file:
                return f"crc32:{self.storage.crc32(file):08x}"
        except FileNotFoundError:
            return None

    def _is(self, folder: Path, identity: str) -> bool:
        # Only a model without a commit id is read whole, once, when the first save replaces it.
        found = self._model_crc(folder) if identity.startswith("crc32:") else self._commit_id(folder)
        return found == identity


def top_state(place: FolderReader) -> TrainingState:
    """The training state at the top; empty where none can be read."""
    with contextlib.suppress(FileNotFoundError, CheckpointDamaged):
        return unseal(place.read(STATE), str(place.path / STATE))
    return TrainingState()
