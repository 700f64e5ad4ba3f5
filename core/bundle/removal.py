"""What goes from a model's folder. Tidying up is not saving: what cannot be removed now is said once, and tried again.

A reader on a network file system holds a step open (`.nfs…`, `.fuse_hidden…`), a desktop leaves a file of its own, an
administrator protects a folder: no save fails and no start is refused for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .owner import STAGE, is_left_over, stage_name
from .storage import Storage
from .training_state import STATE, TrainingState, new_id, seal

TRASH = ".trash-"
"""How the names of folders begin that are being removed."""


class Removal:
    """Removes folders of a model, and remembers those that it could not remove."""

    def __init__(self, path: Path, storage: Storage) -> None:
        self.path, self.storage = path, storage
        self._reasons: dict[Path, str] = {}
        self._reported: set[Path] = set()

    def remove(self, folders: Sequence[Path]) -> list[Path]:
        """Remove folders, and return those that are gone.

        Each is renamed first, so that a crash never leaves half of one under its name.
        """
        doomed = {}
        for folder in folders:
            trash = self.path / f"{TRASH}{folder.name}-{new_id()}"
            with self._noting(folder):
                if not self.storage.renames(folder, trash):
                    self.storage.mark(folder, trash.name)
                    trash = folder
                doomed[folder] = trash
        if doomed:
            self.storage.sync_folder(self.path)
        gone = [folder for folder, trash in doomed.items() if self.remove_tree(trash)]
        if any(folder is trash for folder, trash in doomed.items()):
            self.storage.sync_folder(self.path)
        return gone

    def remove_from_step(self, folder: Path, state: TrainingState, doomed: Sequence[Path]) -> bool:
        """Remove files from a kept step, of which `state` is the training state without them; False where not possible.

        The training state is replaced first, durably, so that the step is whole at every moment: with the files, or
        without. What a crash leaves of them is listed nowhere, and removed by the next call.
        """
        if not self.storage.is_folder(folder):  # a link: what it leads to is not ours
            return False
        with self._noting(folder):
            if self.storage.read(folder / STATE) != (data := seal(state)):
                with stage_name() as name, self.storage.removed_on_failure(staged := self.path / name):
                    self.storage.write(staged, data)
                    self.storage.rename(staged, folder / STATE)
            self.storage.sync_folder(folder)
            self.storage.sync_folder(self.path)
            for path in doomed:
                self.storage.remove_tree(path)
            self.storage.sync_folder(folder)
            return True
        return False

    def remove_left_over(self) -> None:
        """Remove what writers left that were killed: stages that were never committed, and half removed folders."""
        for name in self.storage.names(self.path):
            if name.startswith(TRASH) or (name.startswith(STAGE) and is_left_over(name)):
                self.remove_tree(self.path / name)

    def remove_tree(self, path: Path) -> bool:
        """Remove a file or a folder; False where that is not possible now."""
        with self._noting(path):
            self.storage.remove_tree(path)
            return True
        return False

    @contextlib.contextmanager
    def _noting(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._reasons[path] = error.strerror or str(error)

    def report(self, say: Callable[[str], None]) -> None:
        """Say what could not be removed since the last report, each path once."""
        for path, reason in self._reasons.items():
            if path not in self._reported:
                say(f"WARNING: {path}: cannot be removed now ({reason}). Nothing needs it; the next save tries again.")
        self._reported |= self._reasons.keys()
        self._reasons.clear()
