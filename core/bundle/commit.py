"""How a step becomes visible in the folder of a model, and how the folder goes back: stage, commit, preserve, advance.

docs/commit_protocol.md says what is on disk after every call, and what a crash there leaves. Whoever changes the
folder holds the lock of core/bundle/lock.py.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.gpt import same_architecture
from ..containers.json_files import parse_json
from ..errors import CheckpointDamaged, CheckpointMismatch, SaveFailed
from .folder import (
    COMMITTED,
    CONFIG,
    LOG,
    MODEL,
    MODEL_SHARDS,
    MORE,
    STANDARD,
    FolderReader,
    OpenStep,
    aside_folder,
    entries,
    file_names,
    step_folder,
    top_state,
)
from .output import PIECE
from .owner import new_stage_name, stage_name
from .removal import TRASH, Removal
from .storage import DISK, MOVING, Storage
from .training_state import STATE, TrainingState, new_id, seal, unseal

BUILDING = ".hist"

_MOVES = re.compile(r"\.hist$|(step|aside)_\d{8,}")
"""Names of the folders that may be on their way, file by file, when a writer is killed."""

TOP = "."
"""The name of the top in the list of what is moved aside."""


def _is_aside(name: Any, aside: Any) -> bool:
    """Whether an entry of a training state, which is not trusted, names a step or the top, and a folder set aside."""
    known = name == TOP or re.fullmatch(r"step_\d{8,}", str(name))
    return bool(known and re.fullmatch(r"aside_\d{8,}_[a-z]+_[0-9a-f]+", str(aside)))


class ModelFolder(FolderReader):
    """The folder of a model, open for changes."""

    def __init__(self, path: Path, storage: Storage = DISK) -> None:
        super().__init__(path, storage)
        self.removal = Removal(path, storage)

    def recover(self) -> None:
        """Finish a commit that was interrupted, then remove what saves that never committed left behind."""
        for path in (self.path / COMMITTED, self.committed, self.path / BUILDING):
            self.storage.refuse_link(path)
        # The last rename of a killed writer may not be durable, and what follows depends on it.
        self.storage.sync_folder(self.path)
        self._finish_moves()
        if self.storage.exists(self.path / COMMITTED):
            listed = {*entries(file_names(top_state(self))), *STANDARD, *MORE}
            if listed & set(self.storage.names(self.committed)):
                self.roll_forward()
            else:
                self._close_commit()
        self.removal.remove_left_over()

    def _finish_moves(self) -> None:
        """Finish what moves file by file; what moves within the top, `roll_forward` finishes."""
        folders = [self.path / name for name in self.storage.names(self.path) if _MOVES.match(name)]
        folders = [folder for folder in folders if self.storage.is_folder(folder)]  # not links to others
        for folder in folders:
            target = self.storage.moves_to(folder)
            if target is not None and target.startswith(TRASH):
                self.storage.mark(folder, target)
                self.removal.remove_tree(folder)
            elif target is not None and _MOVES.match(target):
                self.storage.rename(folder, self.path / target)
        for folder in folders:
            names = self.storage.names(folder)
            if MOVING in names and not re.fullmatch(rb"(from|to) [\w.-]+\n", self.storage.read(folder / MOVING)):
                self.storage.remove(folder / MOVING)  # cut while it was written: nothing has moved
                self.storage.sync_folder(folder)
            elif not names and self.storage.exists(folder):
                self.storage.remove_folder(folder)
        if folders:
            self.storage.sync_folder(self.path)

    def stage(self) -> Path:
        """Make a folder for the files of the next step; no reader looks into it."""
        path = self.path / new_stage_name()
        self.storage.make_folder(path)
        return path

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """Make a folder for the files of the next step, which no recovery removes; removed when the block fails."""
        with stage_name() as name, self.removed_unless_committed(path := self.path / name):
            self.storage.make_folder(path)
            yield path

    @contextlib.contextmanager
    def removed_unless_committed(self, stage: Path) -> Iterator[None]:
        """Remove a stage when the block fails, but not where the commit was made before that and leads to it."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # the next writer removes what is left
                if self.committed != stage:
                    self.storage.remove_tree(stage)
            raise

    def commit(self, stage: Path, sizes: Mapping[str, int] | None = None) -> None:
        """Make a staged step the newest one. When this returns it is durable; the roll forward may still be due.

        `sizes` are those of its files, in bytes; those that its training state lists unless given.

        Raises: SaveFailed when a file is not in the stage, whole; nothing is committed then.
        """
        if sizes is None:
            listed = unseal(self.storage.read(stage / STATE), f"{stage / STATE}").files
            sizes = {name: entry["size"] for name, entry in listed.items()}
        for name, size in sizes.items():
            found = self._size(stage / name)
            if found != size:
                here = "missing" if found is None else f"{found:,} bytes"
                raise SaveFailed(
                    f"{stage / name}: {here}, expected {size:,} bytes as they were written. Another program changes "
                    "this folder. Nothing was committed."
                )
        self.storage.sync_tree(stage)
        if not self.storage.renames(stage, self.path / COMMITTED):
            self.storage.sync_folder(self.path)
            pointer = self.path / new_stage_name()
            with self.storage.removed_on_failure(pointer):
                self.storage.write(pointer, stage.name.encode())
                self.storage.rename(pointer, self.path / COMMITTED)
        self.storage.sync_folder(self.path)

    def _size(self, path: Path) -> int | None:
        try:
            with self.storage.open(path) as file:
                return file.seek(0, os.SEEK_END)
        except FileNotFoundError:
            return None

    def replace_state(self, state: Mapping[str, Any]) -> None:
        """Replace the training state at the top, durably, for the same step and files; readers see old or new."""
        with self.storage.published(self.path / STATE) as staged:  # in one folder: recovery fsyncs only that
            self.storage.write(staged, seal(state))

    def keep(self, stage: Path, step: int) -> Path:
        """Make a staged step a kept one, durably; CheckpointMismatch when that step is kept already."""
        target = self.path / step_folder(step)
        if self.storage.exists(target):
            raise CheckpointMismatch(f"{target}: this step is kept already, and is not replaced.")
        self.storage.publish(stage, target)
        return target

    def roll_forward(self) -> None:
        """Keep the old top as history and move the committed files to the top."""
        self._preserve_top()
        self._roll_forward()
        self._close_commit()

    def _preserve_top(self) -> None:
        """Keep the old top before the committed step takes its place; a crash at any call is safe, it starts again."""
        # The five cases in the order of the returns below; step_O is the folder for the step of the old top.
        #   it goes back to a kept step        the top and the later steps move aside, to the names that it lists
        #   .committed lacks a listed entry    nothing is due: the old top is in its place, the roll forward has begun
        #   it has no parent, or there is no   nothing is due: there is no old step
        #     top, here or half moved in .hist
        #   step_O is the parent itself        nothing is due: it is kept already, or was gone back to
        #   anything else                      the top becomes step_O by way of .hist; another step_O moves aside first
        state = self._committed_state()
        if state.went_back is not None:
            self._move_aside(state.went_back)
            return
        gone = set(entries(file_names(state))) - set(self.storage.names(self.committed))
        if gone:
            self._check_begun(state, gone)
            return
        parent, names = state.parent, self._top_names()
        begun = self.storage.exists(self.path / BUILDING)  # without links the model may have moved there already
        if parent is None or not (begun or {MODEL, STATE} & set(names)):
            return
        target = self.path / self._history_name()
        if self.storage.exists(target):
            if self._is(target, parent):
                return
            self.storage.rename(target, self.path / aside_folder(int(target.name.rpartition("_")[2]), "displaced"))
        self._build_history(names)
        self.storage.rename(self.path / BUILDING, target)
        self.storage.sync_folder(self.path)

    def _check_begun(self, state: TrainingState, gone: set[str]) -> None:
        """Make sure that what is no longer in `.committed` has been rolled forward.

        `commit` renames only a stage that has every listed file, whole and durable. The roll forward begins when the
        old top is durable in its new place, and renames one after the other to the top, where each is at every moment
        and after every crash. A file that is not there either was taken by another program, and proves nothing.

        Raises: CheckpointDamaged; nothing is changed then.
        """
        taken = [
            name
            for name, listed in state.files.items()
            if name.partition("/")[0] in gone and name != CONFIG and not self._is_file(self.path / name, listed)
        ]
        if taken:
            raise CheckpointDamaged(
                f"{self.committed}: {' and '.join(taken)} of step {state.step}, which was committed, is gone, and at "
                f"the top there is another file or none. Another program took it: put it back; or move "
                f"{self.committed} away, so that the step at the top is the newest again. Nothing was changed."
            )

    def _is_file(self, path: Path, listed: Mapping[str, Any]) -> bool:
        if self._size(path) != listed["size"]:
            return False
        with self.storage.open(path) as file:
            return f"{self.storage.crc32(file):08x}" == listed["crc32"]

    def _history_name(self) -> str:
        """Where the old top goes: to the folder of its step, or aside if its step is unknown or it is not a bundle."""
        state = self._top_state()
        if state is None or not self.storage.exists(self.path / CONFIG):
            return aside_folder(0, "displaced")
        return step_folder(state.step or 0)

    def _build_history(self, names: Iterable[str]) -> None:
        building = self.path / BUILDING
        if not self.storage.exists(building):
            self.storage.make_folder(building)
        # Without links the files move: a lost entry of this folder would be a lost checkpoint.
        self.storage.sync_folder(self.path)
        there = set(self.storage.names(building))
        for name in names:
            source, target = self.path / name, building / name
            if name.endswith((".json", ".jsonl")):
                # A copy, never a link: an editor that writes in place must not rewrite history.
                if name in there:
                    self.storage.remove(target)
                self.storage.write(target, self.storage.read(source))
            elif (real := self.storage.points_to(source)) is not None:
                # The file itself: from another folder, what a relative link says leads elsewhere.
                if name not in there and not self.storage.link(real, target):
                    self.storage.symlink(real, target)
            elif self.storage.is_folder(source):
                self.storage.rename(source, target)  # a folder always moves: it has no second name
            elif name not in there and not self.storage.link(source, target):
                self.storage.rename(source, target)
        self.storage.sync_folder(building)
        self.storage.sync_folder(self.path)

    def _top_state(self) -> TrainingState | None:
        """The training state at the top: empty where there is none, None where it is damaged."""
        try:
            return unseal(self.storage.read(self.path / STATE), f"{self.path / STATE}")
        except FileNotFoundError:
            return TrainingState()
        except CheckpointDamaged:
            return None

    def _top_names(self) -> list[str]:
        """The files of the bundle that are at the top, whether or not its training state is whole."""
        listed = {*entries(file_names(self._top_state() or TrainingState())), *STANDARD, *MORE}
        return [name for name in self.storage.names(self.path) if name in listed]

    def _committed_state(self) -> TrainingState:
        # After a power loss the training state may be at the top already, and other files not yet.
        return unseal(self.read(STATE), f"{self.path / STATE}")

    def _roll_forward(self) -> None:
        state = self._committed_state()
        committed = self.committed
        names, pending, top = entries(file_names(state)), set(self.storage.names(committed)), self._top_names()
        replaces = state.parent is not None or state.went_back is not None
        stale = [name for name in top if name not in names] if replaces else []
        stale += [name for name in top if name in pending and self._is_kept_folder(name)]
        for name in stale:
            trash = self.path / f"{TRASH}{name}-{new_id()}"
            if not self.storage.is_folder(self.path / name) or not self.storage.renames(self.path / name, trash):
                self.storage.remove_tree(self.path / name)
        if stale:
            self.storage.sync_folder(self.path)  # before the training state that no longer lists them
        config_stays = not (isinstance(state.went_back, dict) and state.went_back.get("config_goes"))
        for name in names:
            if name not in pending:
                continue
            is_there = self.storage.is_same(committed / name, self.path / name)  # rename would leave both names
            if is_there or (name == CONFIG and config_stays and self._top_config_stays()):
                self.storage.remove(committed / name)
            else:
                self.storage.rename(committed / name, self.path / name)

    def _is_kept_folder(self, name: str) -> bool:
        """Whether a name at the top is a folder of the old step, not the committed one that has moved there in part."""
        return self.storage.is_folder(self.path / name) and self._is_in_place(self.committed / name)

    def _top_config_stays(self) -> bool:
        """Whether config.json at the top, which a person may have edited, fits the committed tensors."""
        try:
            top = parse_json(self.storage.read(self.path / CONFIG), f"{self.path / CONFIG}")
        except (FileNotFoundError, CheckpointDamaged):
            return False
        return same_architecture(top, parse_json(self.storage.read(self.committed / CONFIG), CONFIG))

    def _close_commit(self) -> None:
        committed = self.committed
        if self.storage.exists(committed):
            self.storage.sync_folder(committed)
        self.storage.sync_folder(self.path)
        if committed.name != COMMITTED:
            self.storage.remove(self.path / COMMITTED)
            self.storage.sync_folder(self.path)
        if self.storage.names(committed):
            self._set_aside(committed)
        elif self.storage.exists(committed):
            self.storage.remove_folder(committed)
        self.storage.sync_folder(self.path)

    def _set_aside(self, committed: Path) -> None:
        """Free the name of a committed step that has moved to the top; what is in it still is not ours.

        Hidden files are what systems leave: `.nfs…` of a file that is open, `.DS_Store`.
        """
        if all(name.startswith(".") for name in self.storage.names(committed)):
            trash = self.path / f"{TRASH}{COMMITTED}-{new_id()}"
            self.storage.rename(committed, trash)
            self.removal.remove_tree(trash)
        else:
            self.storage.rename(committed, self.path / aside_folder(top_state(self).step or 0, "displaced"))

    def prune(self, steps: Sequence[int]) -> None:
        """Remove kept steps."""
        kept = self.kept_steps()
        self.removal.remove([kept[step] for step in steps])

    def clear_top(self, besides: Iterable[str] = (), *, config_stays: bool = False) -> list[Path]:
        """Move what is at the top, and other files by name, to a folder aside; return it in a list, or [].

        The weights move first, durably: without its training state the rest must not pass for a bundle of version 1.
        A config.json that stays, since a person may have edited it, is copied.
        """
        names = [*dict.fromkeys((*self._top_names(), *besides))]
        if not names:
            return []
        aside = self.path / aside_folder((self._top_state() or TrainingState()).step or 0, "cleared")
        self.storage.make_folder(aside)
        for name in sorted(names, key=lambda name: name not in (MODEL, MODEL_SHARDS)):
            if name == CONFIG and config_stays:
                self.storage.write(aside / name, self.storage.read(self.path / name))
            else:
                self.storage.rename(self.path / name, aside / name)
            if name in (MODEL, MODEL_SHARDS):
                self._sync_asides()
        self._sync_asides()
        return [aside]

    def _sync_asides(self) -> None:
        # All of them: an interrupted move holds files that must not come back to the top.
        for folder in self.asides():
            self.storage.sync_folder(folder)
        self.storage.sync_folder(self.path)

    def go_back(
        self,
        folder: Path,
        why: str,
        later: Iterable[Path] = (),
        *,
        top_stays: bool = False,
        config_goes: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> list[Path]:
        """Make a kept step the newest one again, under the commit id it has; the top and `later` steps go aside.

        It is one commit: it lists what goes aside, and those moves are made before it is rolled forward. Returns the
        folders that were moved aside. With `top_stays` the top is already one of the kept steps, and is not kept again.
        `config_goes` says that the config.json at the top is no person's, and does not stay. `facts` replace those of
        the step's training state.
        """
        top, files = self._top_state() or TrainingState(), {MODEL, STATE} & set(self._top_names())
        aside = {TOP: aside_folder(top.step or 0, why)} if files and not top_stays else {}
        aside |= {path.name: aside_folder(int(path.name.rpartition("_")[2]), why) for path in later}
        said = {"step": top.step, "commit_id": top.commit_id, "why": why, "aside": aside}
        said |= {"config_goes": True} if config_goes else {}
        opened = self.open_kept(folder)
        with contextlib.closing(opened), self.staging() as stage:
            for entry in entries(opened.files):
                if self.storage.is_folder(folder / entry):
                    self.storage.make_folder(stage / entry)
            for name, file in opened.files.items():
                if name.endswith(".json") or not self.storage.link(folder / name, stage / name):
                    with self.storage.create(stage / name) as output:
                        while data := file.read(PIECE):
                            output.write(data)
            state = opened.state if opened.state.integrity is not None else self._adopt(opened)
            self.storage.write(stage / STATE, seal(state.having(**(facts or {}), went_back=said)))
            # A person may have replaced a file of this step since it was written.
            self.commit(stage, {name: file.seek(0, os.SEEK_END) for name, file in opened.files.items()})
        self.roll_forward()
        return [self.path / name for name in aside.values()]

    def _move_aside(self, said: Any) -> None:
        """Move what a commit that goes back lists; targets that exist were moved before an interruption."""
        listed = said.get("aside") if isinstance(said, dict) else None
        if not isinstance(listed, dict) or not all(_is_aside(*names) for names in listed.items()):
            raise CheckpointDamaged(f"{self.committed / STATE}: went_back does not list folders to be moved aside.")
        for name, aside in listed.items():
            if self.storage.exists(self.path / aside):
                continue
            if name == TOP:
                # The log is cut back to the step that training continues from, which removes the lines of this one.
                log = [name for name in self.storage.names(self.path) if name == LOG]
                self._build_history([*self._top_names(), *log])
                self.storage.rename(self.path / BUILDING, self.path / aside)
            elif self.storage.exists(self.path / name):
                self.storage.rename(self.path / name, self.path / aside)
        self.storage.sync_folder(self.path)

    def _adopt(self, opened: OpenStep) -> TrainingState:
        """The training state that a bundle of format version 1 would have."""
        files = {
            name: {"size": file.seek(0, os.SEEK_END), "crc32": f"{self.storage.crc32(file):08x}"}
            for name, file in opened.files.items()
        }
        optimizer = "optimizer.pt" if "optimizer.pt" in files else None
        state = TrainingState.from_dict({"step": 0, "optimizer_file": optimizer, **opened.state})
        return state.committed(None, integrity={"files": files})
