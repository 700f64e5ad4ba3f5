"""Container: what every way of storing tensors on disk gives to those who look into it, and how files are opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..errors import CheckpointDamaged, CheckpointNotFound
from .pickles.inert import as_text
from .spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Check:
    """A run of bytes and the checksum that the container recorded for it; None where it recorded none."""

    file: str
    offset: int
    size: int
    crc32: int | None
    names: tuple[str, ...]  # the tensors in it, or what else it holds


@dataclass
class Container:
    """An opened file or folder: its tensors by name, everything else as inert content, and what can be checked.

    Nothing was loaded and nothing executed.
    """

    kind: str  # as a person would call it: "torch zip", "safetensors, 2 files", "DCP folder"
    path: Path
    tensors: dict[str, TensorSpec]
    content: Any  # what is no tensor; in that of a pickle a spec stands in the place of each tensor
    files: dict[str, int]  # every file that belongs to it and its bytes; by name within the folder
    checks: list[Check] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # what its pickles name besides data, as text
    notes: list[str] = field(default_factory=list)  # what a person should know: what is missing, odd or left out

    def open(self, name: str) -> BinaryIO:
        """Open one of its files for reading.

        Raises: CheckpointNotFound when it is gone.
        """
        return open_file(self.path / name if self.path.is_dir() else self.path)

    def proves_itself(self, name: str) -> bool:
        """Whether one of its files shows by what it holds that it is whole, whatever was recorded of it."""
        return False


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading, unbuffered.

    Raises: CheckpointNotFound when that cannot be done, or it is no file: opening a pipe would wait for its writer.
    """
    try:
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "a device or a pipe"
            raise CheckpointNotFound(f"{path}: {what}, expected a file.")
        return path.open("rb", buffering=0)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise CheckpointNotFound(f"{as_text(str(path))[1:-1]}: cannot be opened ({reason}).") from error


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Hold a file open while its header is read.

    Raises: CheckpointNotFound as `open_file`, CheckpointDamaged when the disk cannot read what it holds.
    """
    with open_file(path) as file:
        try:
            yield file
        except OSError as error:
            raise CheckpointDamaged(f"{path}: cannot be read ({error.strerror}). The disk may be failing.") from error


def listing(folder: Path) -> dict[str, int | None]:
    """What is in a folder by name, sorted: the bytes of each file, None for a folder and a link to nowhere.

    Raises: CheckpointNotFound when it cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: _size(entry) for entry in entries}
    except OSError as error:
        raise CheckpointNotFound(f"{folder}: cannot be listed ({error.strerror}).") from error
    return dict(sorted(found.items()))


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError:  # a link that leads round in a circle, or out of reach
        return None


def is_plain(name: str) -> bool:
    """Whether a name is that of a file within a folder, written the one way there is."""
    path = PurePosixPath(name)
    return name.isprintable() and str(path) == name != "." and ".." not in path.parts and not path.is_absolute()


def member(folder: Path, name: str, where: str) -> Path:
    """The path of a file that a checkpoint names, which has to lie in the checkpoint's folder; it may be missing.

    A link may end in the folder, or among the `blobs` of the Hugging Face cache that the folder is in.

    Raises: CheckpointDamaged when the name leads elsewhere; `where` is who names it.
    """
    if not is_plain(name):
        raise CheckpointDamaged(f"{where}: names the file {as_text(name, 80)}, expected one within its folder.")
    root = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(root / name))
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in [root, *blobs]):
        raise CheckpointDamaged(
            f"{where}: {as_text(name, 80)} is a link that leads out of the folder, to {as_text(str(real))}. "
            "Put the file itself there, or name it directly."
        )
    return folder / name
