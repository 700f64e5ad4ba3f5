"""Container: the common view of every storage format for tensors, and how its files are opened."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from ..console.files import Irregular, open_regular
from ..errors import CheckpointDamaged, CheckpointNotFound
from . import checksum
from .pickles.inert import as_name, as_text
from .spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Check:
    """A run of bytes and the checksum that the container recorded for it; None where it recorded none."""

    file: str
    offset: int
    size: int
    crc32: int | None
    names: tuple[str, ...]  # the tensors in these bytes, or a description of other content


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Bytes that a file holds in another form, compressed or as text; they are unpacked each time they are opened."""

    size: int
    write: Callable[[BinaryIO], None]


@dataclass
class Container:
    """An opened file or folder: its tensors by name, everything else as inert content, and what can be checked.

    Nothing is loaded and nothing is executed.
    """

    kind: str  # in words: "torch zip", "safetensors, 2 files", "DCP folder"
    path: Path
    tensors: dict[str, TensorSpec]
    content: Any  # everything but tensors; a pickle's content has a spec in place of each tensor
    files: dict[str, int]  # every file that belongs to it, by name within the folder, and its size in bytes
    checks: list[Check] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # calls and names in its pickles beyond plain data
    notes: list[str] = field(default_factory=list)  # sentences for people: what is missing, unusual or left out
    caveats: list[str] = field(default_factory=list)  # sentences that whoever uses the tensors has to pass on
    unpacked: dict[str, Unpacked] = field(default_factory=dict)  # what specs and checks name like files

    def open(self, name: str) -> BinaryIO:
        """Open one of its files for reading, or what one of them holds packed.

        Raises: CheckpointNotFound when it is gone, CheckpointDamaged when it cannot be unpacked.
        """
        if name in self.unpacked:
            import tempfile  # few files have any

            with contextlib.ExitStack() as held:
                file = cast(BinaryIO, held.enter_context(tempfile.TemporaryFile()))
                self.unpacked[name].write(file)
                file.flush()
                held.pop_all()
            return file
        return open_file(self.path / name if self.path.is_dir() else self.path)

    def read_into(self, file: BinaryIO, buffer: memoryview, position: int) -> int:
        """Read from a position of one of its open files into a buffer; returns the number of bytes, 0 at the end."""
        return checksum.read_into(file.fileno(), buffer, position)

    @property
    def scatters(self) -> bool:
        """Whether one call of the system reads its bytes into several places of memory."""
        return checksum.POSITIONED_READS

    def proves_itself(self, name: str) -> bool:
        """Whether the content of one of its files proves that the file is complete, without a recorded checksum."""
        return False


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading, unbuffered.

    Raises: CheckpointNotFound when it cannot be opened, or is not a regular file: a pipe would wait for its writer.
    """
    try:
        return open_regular(path)
    except (Irregular, IsADirectoryError) as error:
        what = "a folder" if isinstance(error, IsADirectoryError) else error.strerror
        raise CheckpointNotFound(f"{as_name(str(path), 200)}: {what}, expected a file.") from error
    except OSError as error:
        raise CheckpointNotFound(f"{as_name(str(path), 200)}: cannot be opened ({error.strerror}).") from error


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Keep a file open while its header is read.

    Raises: CheckpointNotFound as `open_file`, CheckpointDamaged when the disk cannot read it.
    """
    with open_file(path) as file:
        try:
            yield file
        except OSError as error:
            raise CheckpointDamaged(f"{path}: cannot be read ({error.strerror}). The disk may be failing.") from error


def listing(folder: Path) -> dict[str, int | None]:
    """List a folder, sorted by name: the size of each file in bytes, None for a folder and for a broken link.

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
    except OSError:  # a link that forms a loop, or whose target is out of reach
        return None


def is_plain(name: str) -> bool:
    """Whether a name is the normalized relative path of a file within a folder."""
    path = PurePosixPath(name)
    return name.isprintable() and str(path) == name != "." and ".." not in path.parts and not path.is_absolute()


def member(folder: Path, name: str, where: str) -> Path:
    """The path of a file that a checkpoint refers to; it must be inside the checkpoint's folder, and may be missing.

    A link may lead to a file in the folder, or to one of the `blobs` of the Hugging Face cache that holds the folder.

    Raises: CheckpointDamaged when the name leads elsewhere; `where` is the file that refers to it.
    """
    if not is_plain(name):
        raise CheckpointDamaged(f"{where}: names the file {as_text(name, 80)}, expected one within its folder.")
    root = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(root / name))
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in [root, *blobs]):
        raise CheckpointDamaged(
            f"{where}: {as_text(name, 80)} is a link that leads outside the folder, to {as_text(str(real))}. "
            "Put the file itself there, or name it directly."
        )
    return folder / name
