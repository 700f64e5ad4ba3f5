"""The file system, as few calls as a commit needs; every change of the disk passes through one method.

A feature that a system may lack has a switch that turns itself off at the first refusal; a fallback then replaces it:
hard links, renames of folders, fsync of a file or a folder, writes past the page cache, space reserved in advance. A
folder that cannot be renamed (on most object stores; in the lower layer of an overlay) moves file by file, under a
marker.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..console.files import LARGEST, Irregular, open_regular
from ..console.words import size_text
from ..containers.blocks import read_whole
from ..containers.checksum import crc32_file
from ..errors import CheckpointDamaged, SaveFailed
from .output import BlockFile, Output
from .owner import stage_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MOVING = ".moving"
"""A file in both folders of a move that goes file by file: neither is a step until it is gone."""

_NO_FOLDER_RENAME = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMFILE}  # EMFILE: gcsfuse
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.EACCES}
_NO_FILE_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP, errno.EISDIR}


class Storage:
    """A file system that tests can observe: they count, fail or kill calls of `change`."""

    def __init__(self) -> None:
        self.links = hasattr(os, "link")
        self.file_fsync = True
        self.folder_fsync = os.name == "posix"
        self.folder_renames = True
        self.unbuffered = fcntl is not None and hasattr(os, "O_DIRECT")
        self.preallocation = hasattr(os, "posix_fallocate")

    def change(self, call: Callable[..., Any], *args: Any) -> Any:
        """Make one system call that changes the disk, or makes a change durable; its error says which one it was."""
        try:
            return call(*args)
        except OSError as error:
            error.call = getattr(call, "__name__", None)  # type: ignore[attr-defined]
            raise

    def make_folder(self, path: Path) -> None:
        """Make one folder, which must not exist."""
        self.change(os.mkdir, path)

    def make_folders(self, path: Path) -> None:
        """Make a folder and its parents, where they do not exist."""
        try:
            self.make_folder(path)
        except FileNotFoundError:
            self.make_folders(path.parent)
            self.make_folders(path)
        except FileExistsError:
            if not path.is_dir():
                raise

    def descriptor(self, path: Path) -> int:
        """Open a new file for writing, as its descriptor; it must not exist."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        return self.change(os.open, path, flags, 0o666)

    def create(self, path: Path) -> Output:
        """Open a new file for writing; it must not exist."""
        return Output(self, self.descriptor(path))

    def create_blocks(self, path: Path, size: int) -> BlockFile:
        """Open a new file of known size for blocks; it must not exist."""
        return BlockFile(self, path, size)

    def append(self, path: Path) -> BinaryIO:
        """Open a file to append to, making it where there is none; what is written goes to no other name.

        A file with other names (a folder that was copied with hard links) is replaced by a copy of itself first.

        Raises: SaveFailed for a link, a pipe or a device.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe without a reader does not wait
        self.refuse_link(path)
        try:
            fd = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise not_ours(path, "file") from error
            raise
        file = os.fdopen(fd, "ab")
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            file.close()
            raise not_ours(path, "file")
        if found.st_nlink > 1:
            file.close()
            with self.published(path) as copy:
                self.write(copy, self.read(path))
            return self.append(path)
        return file

    def refuse_link(self, path: Path) -> None:
        """Raise SaveFailed when a name of ours, which need not exist, is a link: what it leads to is not ours."""
        if path.is_symlink():
            raise not_ours(path, "file or folder")

    def write(self, path: Path, data: bytes) -> None:
        """Write a new file and make its content durable."""
        with self.create(path) as output:
            output.write(data)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or folder, replacing a target file.

        A folder that the file system cannot rename moves file by file; a move that is cut goes on when it is called
        again.
        """
        if not self.renames(source, target):
            self._move(source, target)

    def renames(self, source: Path, target: Path) -> bool:
        """Rename by one call; False for a folder that the file system cannot rename, or that moves already."""
        if self.is_folder(source) and (self.exists(source / MOVING) or not self.folder_renames):
            return False
        try:
            self.change(os.replace, source, target)
        except OSError as error:
            emptied = error.errno in (errno.ENOTEMPTY, errno.EEXIST) and not self.names(source)  # by a move
            if not self.is_folder(source) or not (emptied or error.errno in _NO_FOLDER_RENAME):
                raise
            self.folder_renames = emptied or error.errno in (errno.EXDEV, errno.EMFILE)  # others may be renamed
            return False
        return True

    def _move(self, source: Path, target: Path) -> None:
        self.refuse_link(target)
        self.mark(source, target.name)
        if not self.exists(target):
            self.make_folder(target)
        if names := [name for name in self.names(source) if name != MOVING]:
            if not self.exists(target / MOVING):
                self.write(target / MOVING, f"from {source.name}\n".encode())
            self.sync_folder(target)
            self.sync_folder(target.parent)
            for name in names:
                self.rename(source / name, target / name)
        self.sync_folder(source)
        self.sync_folder(target)
        if self.exists(target / MOVING):
            self.remove(target / MOVING)
            self.sync_folder(target)  # before the source's marker goes: whoever finds that one goes on from there
        self.sync_folder(target.parent)
        self.remove(source / MOVING)
        self.remove_folder(source)

    def mark(self, folder: Path, target: str) -> None:
        """Say in a folder, durably, what becomes of it: the name that it moves to, file by file."""
        if self.moves_to(folder) == target:  # said by a writer that was killed, perhaps before it was durable
            self.sync_folder(folder / MOVING)
        else:
            if self.exists(folder / MOVING):
                self.remove(folder / MOVING)
            self.write(folder / MOVING, f"to {target}\n".encode())
        self.sync_folder(folder)

    def moves_to(self, folder: Path) -> str | None:
        """The name that a folder is moving to; None where it is not, or is the target of a move."""
        try:
            found = re.fullmatch(rb"to ([\w.-]+)\n", self.read(folder / MOVING))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found[1].decode() if found else None

    def link(self, source: Path, target: Path) -> bool:
        """Give a file a second name; False (and `links` off from now on) where the file system cannot."""
        if not self.links:
            return False
        try:
            self.change(os.link, source, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self.links = False
        return self.links

    def symlink(self, source: Path, target: Path) -> None:
        """Make a symbolic link to a file, by its absolute path."""
        self.change(os.symlink, source, target)

    def remove(self, path: Path) -> None:
        """Remove one file."""
        self.change(os.unlink, path)

    def remove_folder(self, path: Path) -> None:
        """Remove one empty folder."""
        self.change(os.rmdir, path)

    def remove_tree(self, path: Path) -> None:
        """Remove a file, or a folder and all that is in it; links are removed, not followed."""
        if not self.is_folder(path):
            self.remove(path)
            return
        names = self.names(path)
        for name in names:
            if name != MOVING:
                self.remove_tree(path / name)
        if MOVING in names:
            self.sync_folder(path)  # without its marker, half of a folder would pass for a whole one
            self.remove(path / MOVING)
        self.remove_folder(path)

    @contextlib.contextmanager
    def removed_on_failure(self, path: Path) -> Iterator[None]:
        """Remove a file or folder that the block makes when the block fails."""
        try:
            yield
        except BaseException:
            # A disk that fails may refuse this as well; the next writer removes what is left.
            with contextlib.suppress(OSError):
                self.remove_tree(path)
            raise

    def publish(self, source: Path, target: Path, *, aside: Path | None = None, replace: bool = True) -> None:
        """Publish what is finished, its files durable, under its name by one rename, which is durable on return.

        A file of that name is replaced; with `aside`, anything that has the name is renamed to that first. Without
        `replace` the file stays, and FileExistsError is raised, where the file system has hard links.
        """
        if self.is_folder(source):
            self.sync_tree(source)
        if aside is not None:
            self.rename(target, aside)
        if replace or not self.link(source, target):
            self.rename(source, target)
        else:
            self.remove(source)
        self.sync_folder(target.parent)

    @contextlib.contextmanager
    def published(self, target: Path, *, replace: bool = True) -> Iterator[Path]:
        """Lend a hidden name beside the target; what the block makes there, durably, is then published as the target.

        It is removed when anything fails. `recover` removes what a killed process leaves in a model's folder.
        """
        with stage_name() as name, self.removed_on_failure(part := target.with_name(name)):
            yield part
            self.publish(part, target, replace=replace)

    @contextlib.contextmanager
    def workplace(self, folder: Path, busy: Callable[[], object]) -> Iterator[None]:
        """Lend one process an empty folder, to publish it or something in it; the rest is removed at the end.

        What a killed process left there is removed first. `busy` is called when another process is at work there:
        unless it raises, this one waits.
        """
        with self._lock(folder, busy):
            for name in self.names(folder):
                self.remove_tree(folder / name)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # published; or a disk that fails, and the next process removes it
                    self.remove_tree(folder)

    def _lock(self, folder: Path, busy: Callable[[], object]) -> contextlib.ExitStack:
        """Make a folder and lock it until the stack is closed; a dead process holds no lock."""
        while True:
            self.make_folders(folder)
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as held:
                if fcntl is None:  # two processes are then told apart by the rename alone
                    return held
                self.refuse_link(folder)
                fd = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
                held.callback(os.close, fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    busy()
                    fcntl.flock(fd, fcntl.LOCK_EX)
                # The other process has published or removed the folder: the name is now a new folder, or free.
                if os.path.samestat(os.fstat(fd), folder.stat()):
                    return held.pop_all()

    def sync(self, file: BinaryIO) -> None:
        """Make durable what was written to an open file."""
        file.flush()
        self.sync_content(file.fileno())

    def sync_content(self, fd: int) -> None:
        """Make the content of an open file durable, where the file system can."""
        if not self.file_fsync:
            return
        try:
            self.change(os.fsync, fd)
        except OSError as error:
            if error.errno not in _NO_FILE_FSYNC:
                raise
            self.file_fsync = False

    def sync_tree(self, path: Path) -> None:
        """Make the names in a folder, and in the folders in it, durable."""
        for name in self.names(path):
            if self.is_folder(path / name):
                self.sync_tree(path / name)
        self.sync_folder(path)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable, or the content of a file that another process wrote."""
        if not self.folder_fsync:
            return
        fd = os.open(path, os.O_RDONLY)
        try:
            self.change(os.fsync, fd)
        except OSError as error:
            if error.errno not in _NO_FOLDER_FSYNC:
                raise
            self.folder_fsync = False
        finally:
            os.close(fd)

    def open(self, path: Path) -> BinaryIO:
        """Open a file for reading; what is open stays readable when the name moves or goes.

        Raises: CheckpointDamaged for a pipe, whose writer would be waited for, or a device.
        """
        try:
            return open_regular(path)
        except Irregular as error:
            raise CheckpointDamaged(f"{path}: {error.strerror}, expected a file.") from error

    def read(self, path: Path) -> bytes:
        """Read a whole file of at most LARGEST bytes, or a log of lines, which may have any length.

        Raises: CheckpointDamaged when it is larger.
        """
        with self.open(path) as file:
            return file.read() if path.suffix == ".jsonl" else read_whole(file, LARGEST, str(path))

    def names(self, path: Path) -> list[str]:
        """List a folder, sorted; a folder that is not there is empty."""
        try:
            return sorted(os.listdir(path))  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, path: Path) -> bool:
        """Whether a file or folder has this name."""
        return path.exists()

    def is_folder(self, path: Path) -> bool:
        """Whether this name is a folder itself, not a link to one."""
        return path.is_dir() and not path.is_symlink()

    def points_to(self, path: Path) -> Path | None:
        """What a symbolic link points to, by its absolute path; None for anything else, and where that is not there."""
        return path.resolve() if path.is_symlink() and path.exists() else None

    def may_change(self, folder: Path) -> bool:
        """Whether this process may change a folder: it is its own, and not mounted read-only."""
        return os.access(folder, os.W_OK)

    def is_same(self, a: Path, b: Path) -> bool:
        """Whether two names belong to one file; a missing one is not the same as any."""
        try:
            return a.samefile(b)
        except FileNotFoundError:
            return False

    def free(self, path: Path) -> int | None:
        """Free bytes on the file system of a folder; None where it does not say, like some network mounts."""
        usage = shutil.disk_usage(path)
        return usage.free if usage.total else None

    def room(self, path: Path) -> str:
        """Describe in words what is free on the file system of a folder; "" where it does not say."""
        if hasattr(os, "statvfs"):
            found = os.statvfs(path)
            if found.f_files and not found.f_favail:
                return f"0 of {found.f_files} inodes free: it has too many files"
        free = self.free(path)
        return "" if free is None else f"{size_text(free)} free"

    def crc32(self, file: BinaryIO) -> int:
        """CRC32 of an open file."""
        return crc32_file(file.fileno(), os.fstat(file.fileno()).st_size)


def not_ours(path: Path, what: str) -> SaveFailed:
    """The error for a name of ours under which something lies that leads elsewhere."""
    try:
        kind = f"a link to {path.readlink()}"
    except OSError:  # of what is no link, also when it was one a moment ago
        kind = "a pipe or a device"
    return SaveFailed(
        f"{path}: {kind}, expected a {what} of this program. Nothing is written through it, and nothing was changed. "
        "Remove it, or move it away."
    )


def failed_call(error: OSError) -> str:
    """What failed, and why: `fsync: Input/output error`."""
    call, why = getattr(error, "call", None), error.strerror or str(error)
    return f"{call}: {why}" if call else why


DISK = Storage()
"""The real file system."""
