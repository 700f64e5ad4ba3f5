"""The folder of one model, and how a step becomes visible in it: stage, commit, preserve, roll forward, prune.

docs/commit_protocol.md says what is on disk after every call, and what a crash there leaves. Whoever changes the
folder holds the lock of core/lock.py; readers take no lock and change nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from core.config import FORMAT_VERSION, same_architecture
from core.errors import CheckpointDamaged, CheckpointMismatch, CheckpointNotFound
from core.storage import DISK, PIECE, Storage
from core.training_state import STATE, parse_json, seal, unseal

COMMITTED = ".committed"
BUILDING = ".hist"
CONFIG = "config.json"
MODEL = "model.pt"
STANDARD = (MODEL, CONFIG, "tokenizer.json", STATE, "optimizer.pt")
"""The files of a bundle whose training state does not list them."""

_NOT_THERE = (FileNotFoundError, NotADirectoryError)

READ_ATTEMPTS = 1000
"""Commits that may happen while a reader opens one bundle, before it gives up."""


@dataclass
class Opened:
    """The files of one committed step, open: a save beside it cannot mix in another step."""

    folder: Path
    state: dict[str, Any]
    files: dict[str, BinaryIO]

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()


def new_id() -> str:
    """Make a random commit id."""
    return os.urandom(8).hex()


def step_folder(step: int) -> str:
    """Name the folder that keeps an older step."""
    return f"step_{step:08d}"


def file_names(state: dict[str, Any]) -> tuple[str, ...]:
    """Name the files of a bundle, its training state last."""
    if "integrity" not in state:
        return (*(n for n in STANDARD if n != STATE), STATE)
    return (*state["integrity"]["files"], STATE)


class ModelFolder:
    """One model on disk: the newest step at the top, older ones in `step_NNNNNNNN/`."""

    def __init__(self, path: Path, storage: Storage = DISK) -> None:
        self.path = path
        self.storage = storage
        self.committed = path / COMMITTED

    # Reading

    def read(self, name: str) -> bytes:
        """Read one file of the newest step: what is committed and not yet rolled forward comes first.

        Raises: FileNotFoundError when there is none.
        """
        try:
            return self.storage.read(self.committed / name)
        except _NOT_THERE:
            return self.storage.read(self.path / name)

    def _open(self, name: str) -> BinaryIO:
        try:
            return self.storage.open(self.committed / name)
        except _NOT_THERE:
            return self.storage.open(self.path / name)

    def open_newest(self) -> Opened:
        """Open every file of the newest committed step; never a mixture of two.

        Raises: CheckpointDamaged when a listed file is missing or the training state is damaged.
        """
        for _ in range(READ_ATTEMPTS):
            before = self._state_bytes()
            state = unseal(before, f"{self.path / STATE}") if before is not None else {}
            opened, missing, stale = Opened(self.path, state, {}), None, False
            for name in file_names(state)[:-1]:
                try:
                    opened.files[name] = self._open(name)
                except _NOT_THERE:
                    missing = missing or name
                except (OSError, CheckpointDamaged) as error:
                    # a network file system: the name moved while it was being opened
                    stale = isinstance(error, OSError) and error.errno == errno.ESTALE
                    if not stale:
                        opened.close()
                        raise
            if not stale and self._state_bytes() == before:
                if missing is None or "integrity" not in state:
                    return opened
                opened.close()
                raise CheckpointDamaged(
                    f"{self.path / missing}: missing, but {STATE} of step {state['step']} lists it."
                )
            opened.close()
        raise CheckpointDamaged(f"{self.path}: another program commits faster than this one can open files.")

    def _state_bytes(self) -> bytes | None:
        try:
            return self.read(STATE)
        except _NOT_THERE:
            return None

    def open_step(self, step: int) -> Opened:
        """Open every file of a kept step.

        Raises: CheckpointNotFound when the step is not kept, CheckpointDamaged when a listed file is missing.
        """
        return self.open_kept(self.path / step_folder(step))

    def open_kept(self, folder: Path) -> Opened:
        """Open every file of the bundle in one `step_NNNNNNNN/` folder."""
        if not self.storage.exists(folder):
            kept = ", ".join(str(s) for s in self.kept_steps()) or "none"
            raise CheckpointNotFound(f"{folder}: this step is not kept. Kept steps: {kept}.")
        try:
            state = unseal(self.storage.read(folder / STATE), f"{folder / STATE}")
        except FileNotFoundError:
            state = {}
        files: dict[str, BinaryIO] = {}
        for name in file_names(state)[:-1]:
            try:
                files[name] = self.storage.open(folder / name)
            except FileNotFoundError as error:
                if "integrity" in state:
                    Opened(folder, state, files).close()
                    raise CheckpointDamaged(f"{folder / name}: missing, but {STATE} lists it.") from error
        return Opened(folder, state, files)

    def kept_steps(self) -> dict[int, Path]:
        """List the older steps that are kept, oldest first."""
        found = (re.fullmatch(r"step_(\d{8,})", name) for name in self.storage.names(self.path))
        return dict(sorted((int(m[1]), self.path / m[0]) for m in found if m))

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

    # Changing; the caller holds the lock

    def recover(self) -> None:
        """Finish a commit that was interrupted, then delete what saves that never committed left behind."""
        # What a killed writer renamed last may not be durable, and what follows rests on it.
        self.storage.sync_folder(self.path)
        if self.storage.exists(self.committed):
            if self.storage.names(self.committed):
                self._preserve_top()
                self._roll_forward()
            self._close_commit()
        for name in self.storage.names(self.path):
            if name.startswith((".stage-", ".trash-")):
                self._remove_tree(self.path / name)

    def stage(self) -> Path:
        """Make a folder for the files of the next step; no reader looks into it."""
        path = self.path / f".stage-{new_id()}"
        self.storage.make_folder(path)
        return path

    def discard(self, stage: Path) -> None:
        """Remove a staged step that will not be committed."""
        self._remove_tree(stage)

    def commit(self, stage: Path) -> None:
        """Make a staged step the newest one. When this returns it is durable; the roll forward may still be due."""
        self.storage.sync_folder(stage)
        self.storage.rename(stage, self.committed)
        self.storage.sync_folder(self.path)

    def keep(self, stage: Path, step: int) -> Path:
        """Make a staged step a kept one, durably; CheckpointMismatch when that step is kept already."""
        target = self.path / step_folder(step)
        if self.storage.exists(target):
            raise CheckpointMismatch(f"{target}: this step is kept already, and is not replaced.")
        self.storage.sync_folder(stage)
        self.storage.rename(stage, target)
        self.storage.sync_folder(self.path)
        return target

    def roll_forward(self) -> None:
        """Keep the old top as history and move the committed files to the top."""
        self._preserve_top()
        self._roll_forward()
        self._close_commit()

    def _preserve_top(self) -> None:
        state, present = self._committed_state(), set(self.storage.names(self.committed))
        if not present.issuperset(file_names(state)):
            return  # the roll forward has begun, and it begins only after the old top is durable in its new place
        parent, names = state.get("parent"), self._top_names()
        begun = self.storage.exists(self.path / BUILDING)  # without links the model may have moved there already
        if parent is None or not (begun or {MODEL, STATE} & set(names)):
            return
        target = self.path / self._history_name()
        if self.storage.exists(target):
            if self._is(target, parent):
                return
            self.storage.rename(target, self.path / f"aside_{target.name.removeprefix('step_')}_{new_id()}")
        self._build_history(names)
        self.storage.rename(self.path / BUILDING, target)
        self.storage.sync_folder(self.path)

    def _history_name(self) -> str:
        """Where the old top goes: under its step, or aside when it does not say which step it is, or is no bundle."""
        state = self._top_state()
        if state is None or not self.storage.exists(self.path / CONFIG):
            return f"aside_{0:08d}_{new_id()}"
        return step_folder(state.get("step", 0))

    def _build_history(self, names: Iterable[str]) -> None:
        building = self.path / BUILDING
        if not self.storage.exists(building):
            self.storage.make_folder(building)
        # Without links the files move: a lost entry of this folder would be a lost checkpoint.
        self.storage.sync_folder(self.path)
        there = set(self.storage.names(building))
        for name in names:
            source, target = self.path / name, building / name
            if name.endswith(".json"):
                # A copy, never a link: an editor that writes in place must not rewrite history.
                if name in there:
                    self.storage.remove(target)
                self.storage.write(target, self.storage.read(source))
            elif name not in there and not self.storage.link(source, target):
                self.storage.rename(source, target)
        self.storage.sync_folder(building)
        self.storage.sync_folder(self.path)

    def _top_state(self) -> dict[str, Any] | None:
        """The training state at the top: empty where there is none, None where it is damaged."""
        try:
            return unseal(self.storage.read(self.path / STATE), f"{self.path / STATE}")
        except FileNotFoundError:
            return {}
        except CheckpointDamaged:
            return None

    def _top_names(self) -> list[str]:
        """The files of the bundle at the top that are there, whether or not its training state is whole."""
        listed = {*file_names(self._top_state() or {}), *STANDARD}
        return [name for name in self.storage.names(self.path) if name in listed]

    def _committed_state(self) -> dict[str, Any]:
        # After a power loss the training state may be at the top already, and other files not yet.
        return unseal(self.read(STATE), f"{self.path / STATE}")

    def _roll_forward(self) -> None:
        state = self._committed_state()
        names = file_names(state)
        if state.get("parent") is not None:
            stale = [name for name in self._top_names() if name not in names]
            for name in stale:
                self.storage.remove(self.path / name)
            if stale:
                self.storage.sync_folder(self.path)  # before the training state that no longer lists them
        pending = set(self.storage.names(self.committed))
        for name in names:
            if name not in pending:
                continue
            if name == CONFIG and self._top_config_stays():
                self.storage.remove(self.committed / CONFIG)
            else:
                self.storage.rename(self.committed / name, self.path / name)

    def _top_config_stays(self) -> bool:
        """Whether config.json at the top, which a person may have edited, fits the committed tensors."""
        try:
            top = parse_json(self.storage.read(self.path / CONFIG), f"{self.path / CONFIG}")
        except (FileNotFoundError, CheckpointDamaged):
            return False
        return same_architecture(top, parse_json(self.storage.read(self.committed / CONFIG), CONFIG))

    def _close_commit(self) -> None:
        self.storage.sync_folder(self.committed)
        self.storage.sync_folder(self.path)
        self.storage.remove_folder(self.committed)
        self.storage.sync_folder(self.path)

    def prune(self, steps: Sequence[int]) -> None:
        """Remove kept steps; each leaves under another name first, so that a crash leaves no half of one."""
        kept = self.kept_steps()
        doomed = [self.path / f".trash-{kept[s].name}-{new_id()}" for s in steps]
        for step, trash in zip(steps, doomed, strict=True):
            self.storage.rename(kept[step], trash)
        if doomed:
            self.storage.sync_folder(self.path)
        for trash in doomed:
            self._remove_tree(trash)

    def set_aside(self, folder: Path) -> Path:
        """Move a damaged bundle, the top or a kept step, to `aside_NNNNNNNN_<id>/`, and say where it is now."""
        if folder != self.path:
            aside = self.path / f"aside_{folder.name.removeprefix('step_')}_{new_id()}"
            self.storage.rename(folder, aside)
        else:
            state, names = self._top_state() or {}, self._top_names()
            aside = self.path / f"aside_{state.get('step', 0):08d}_{new_id()}"
            self.storage.make_folder(aside)
            self.storage.sync_folder(self.path)
            for name in sorted(names, key=STATE.__eq__):  # the training state last
                if name == STATE:  # without it the files at the top would pass for a bundle of format version 1
                    self._sync_asides()
                if name == CONFIG:  # what a person edited stays
                    self.storage.write(aside / name, self.storage.read(self.path / name))
                else:
                    self.storage.rename(self.path / name, aside / name)
            self._sync_asides()
        self.storage.sync_folder(self.path)
        return aside

    def _sync_asides(self) -> None:
        # All of them: one that was begun and interrupted holds files that must not come back to the top.
        for name in self.storage.names(self.path):
            if name.startswith("aside_"):
                self.storage.sync_folder(self.path / name)
        self.storage.sync_folder(self.path)

    def restore(self, folder: Path) -> None:
        """Make a kept step the newest one again, under the commit id it has; the top has been set aside before."""
        opened = self.open_kept(folder)
        with contextlib.closing(opened):
            stage = self.stage()
            for name, file in opened.files.items():
                if name.endswith(".json") or not self.storage.link(folder / name, stage / name):
                    with self.storage.create(stage / name) as output:
                        while data := file.read(PIECE):
                            output.write(data)
            state = opened.state
            if "integrity" not in state:
                state = self._adopt(opened)
            self.storage.write(stage / STATE, seal(state))
        self.commit(stage)
        self.roll_forward()

    def _adopt(self, opened: Opened) -> dict[str, Any]:
        """The training state that a bundle of format version 1 would have had."""
        files = {
            name: {"size": file.seek(0, os.SEEK_END), "crc32": f"{self.storage.crc32(file):08x}"}
            for name, file in opened.files.items()
        }
        optimizer = "optimizer.pt" if "optimizer.pt" in files else None
        return {
            "step": opened.state.get("step", 0),
            "optimizer_file": optimizer,
            **opened.state,
            "format_version": FORMAT_VERSION,
            "commit_id": new_id(),
            "parent": None,
            "integrity": {"files": files},
        }

    def _remove_tree(self, path: Path) -> None:
        if not self.storage.is_folder(path):
            self.storage.remove(path)
            return
        for name in self.storage.names(path):
            self._remove_tree(path / name)
        self.storage.remove_folder(path)
