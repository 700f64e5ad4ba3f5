"""A disk in memory that forgets what was not fsynced, and a Storage on it that can be watched call by call.

Every file and folder is an inode. What happens to names is a list of operations, each one a few assignments
(folder, name) := inode that take effect together; fsync of a folder makes its assignments durable, and an operation
that touches two folders is durable when both were fsynced. After a power loss any subset of the operations that are
not durable is gone. A file that was not fsynced is empty, a prefix, garbage or whole, or has its size and zeros for
some or all of its bytes, as one whose blocks were reserved or written out of order.
"""

from __future__ import annotations

import errno
import io
import itertools
import math
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from core.bundle.storage import Storage

ROOT = Path("m")
"""The model's folder; inode 0."""

Slot = tuple[int, str]
Changes = tuple[tuple[Slot, int | None], ...]
Operation = tuple[Changes, frozenset[int]]
"""Its assignments, and the folders among them that were not fsynced since."""


class Disk:
    """The names and contents of everything: what is durable, and the operations and writes that are not yet."""

    def __init__(self) -> None:
        self.folders: dict[int, dict[str, int]] = {0: {}}
        self.files: dict[int, tuple[bytes, bytes | None]] = {}
        self.operations: list[Operation] = []
        self.seen: dict[int, dict[str, int]] = {0: {}}
        self.last = 0

    def copy(self) -> Disk:
        """Copy it; the dicts of names are replaced on change, never changed."""
        new = Disk.__new__(Disk)
        new.folders, new.files, new.seen = dict(self.folders), dict(self.files), dict(self.seen)
        new.operations, new.last = list(self.operations), self.last
        return new

    def find(self, path: Path) -> int | None:
        """The inode a running program finds under a path."""
        inode: int | None = 0
        for part in path.parts[1:]:
            if inode is None or inode not in self.seen:
                return None
            inode = self.seen[inode].get(part)
        return inode

    def text(self, path: Path) -> bytes | None:
        """The content a running program finds under a path."""
        inode = self.find(path)
        return self.files[inode][0] if inode in self.files else None

    def assign(self, *changes: tuple[Slot, int | None]) -> None:
        """Change names together: one operation, not durable."""
        self.operations.append((changes, frozenset(slot[0] for slot, _ in changes)))
        for slot, inode in changes:
            self.seen[slot[0]] = _assigned(self.seen[slot[0]], slot[1], inode)

    def sync(self, inode: int) -> None:
        """Make the content of a file durable, or the names in a folder."""
        if inode in self.files:
            self.files[inode] = (self.files[inode][0],) * 2
            return
        left: list[Operation] = []
        blocked: set[Slot] = set()
        for changes, unsynced in self.operations:
            unsynced = unsynced - {inode}
            slots = {slot for slot, _ in changes}
            if unsynced or slots & blocked:
                left.append((changes, unsynced))
                blocked |= slots
            else:
                for slot, target in changes:
                    self.folders[slot[0]] = _assigned(self.folders[slot[0]], slot[1], target)
        self.operations = left

    def sync_all(self) -> Disk:
        """Make everything durable, and return it."""
        for inode in [*self.files, *self.seen]:
            self.sync(inode)
        return self.tidy()

    def tidy(self) -> Disk:
        """Forget folders, files and operations that no name can ever lead to again."""
        reach, todo = {0}, [0]
        while todo:
            folder = todo.pop()
            found = set(self.folders[folder].values())
            found |= {inode for changes, _ in self.operations for (f, _), inode in changes if f == folder and inode}
            todo += [inode for inode in found - reach if inode in self.folders]
            reach |= found
        kept = []
        for changes, unsynced in self.operations:
            changes = tuple(change for change in changes if change[0][0] in reach)
            if changes:
                kept.append((changes, unsynced & reach))
        self.operations = kept
        self.folders = {i: names for i, names in self.folders.items() if i in reach}
        self.seen = {i: names for i, names in self.seen.items() if i in reach}
        self.files = {i: content for i, content in self.files.items() if i in reach}
        return self

    def key(self) -> int:
        """A hash that is equal for disks that no program and no crash can tell apart."""
        number: dict[int, int] = {0: 0}
        parts: list[Any] = []
        todo = [0]

        def name(inode: int | None) -> int:
            if inode is None:
                return -1
            if inode not in number:
                number[inode] = len(number)
                todo.append(inode)
            return number[inode]

        def visit() -> None:
            while todo:
                inode = todo.pop()
                if inode in self.files:
                    parts.append(self.files[inode])
                else:
                    parts.append(tuple((n, name(i)) for n, i in sorted(self.folders[inode].items())))

        visit()
        for changes, unsynced in self.operations:
            parts.append(tuple((name(slot[0]), slot[1], name(inode)) for slot, inode in changes))
            parts.append(tuple(sorted(name(folder) for folder in unsynced)))
            visit()
        return hash(tuple(parts))

    def power_loss(self, limit: int) -> Iterator[Disk]:
        """Every disk that a power loss now can leave; where there are more than `limit`, a sample."""
        groups = self._groups()
        outer = [results for touched, results in groups if 0 in touched]
        for first in _choices(outer, limit):
            inner = [(touched, results) for touched, results in groups if 0 not in touched]
            for names in self._inner(_applied(self.folders, first), inner, limit):
                reach = self._reach(names)
                files = [i for i in reach if i in self.files]
                for contents in itertools.product(*(_torn(*self.files[i]) for i in files)):
                    disk = Disk.__new__(Disk)
                    disk.folders = {i: names[i] for i in reach if i in names}
                    disk.seen = dict(disk.folders)
                    disk.files = {i: (content, content) for i, content in zip(files, contents, strict=True)}
                    disk.operations, disk.last = [], self.last
                    yield disk

    def _inner(
        self, folders: dict[int, dict[str, int]], groups: list[tuple[set[int], list[Changes]]], limit: int
    ) -> Iterator[dict[int, dict[str, int]]]:
        """Names after what may be left of operations in folders, level by level: a lost folder's own do not matter."""
        reach = set(self._reach(folders))
        here = [group for group in groups if group[0] & reach]
        if not here:
            yield folders
            return
        deeper = [group for group in groups if not group[0] & reach]
        for chosen in _choices([results for _, results in here], limit):
            yield from self._inner(_applied(folders, chosen), deeper, limit)

    def _groups(self) -> list[tuple[set[int], list[Changes]]]:
        """Operations that share a name, as the folders they touch and what each subset of them comes to."""
        groups: list[tuple[set[Slot], list[int]]] = []
        for number, (assigned, _) in enumerate(self.operations):
            slots, members = {slot for slot, _ in assigned}, [number]
            for group in [g for g in groups if g[0] & slots]:
                groups.remove(group)
                slots |= group[0]
                members += group[1]
            groups.append((slots, members))
        found = []
        for slots, numbers in groups:
            members = [self.operations[number] for number in sorted(numbers)]
            results: dict[Changes, None] = {(): None}
            for changes, unsynced in members:
                with_it = {tuple(sorted({**dict(r), **dict(changes)}.items())): None for r in results}
                results = {**results, **with_it} if unsynced else with_it
            found.append(({folder for folder, _ in slots}, list(results)))
        return found

    @staticmethod
    def _reach(folders: dict[int, dict[str, int]]) -> list[int]:
        reach = [0]
        for inode in reach:  # grows while it is read
            if inode in folders:
                reach += [i for i in folders[inode].values() if i not in reach]
        return reach

    def tree(self, folder: int = 0, indent: str = "  ") -> str:
        """List what a running program finds, for messages."""
        lines = []
        for name, inode in sorted(self.seen[folder].items()):
            lines.append(f"{indent}{name}{'/' if inode in self.seen else f': {self.files[inode][0][:60]!r}'}")
            if inode in self.seen:
                lines.append(self.tree(inode, indent + "  "))
        return "\n".join(line for line in lines if line)


def _assigned(names: dict[str, int], name: str, inode: int | None) -> dict[str, int]:
    names = {n: i for n, i in names.items() if n != name}
    return names if inode is None else {**names, name: inode}


def _torn(content: bytes, durable: bytes | None) -> list[bytes]:
    if content == durable:
        return [content]
    half, garbage = len(content) // 2, bytes(byte ^ 0x55 for byte in content)
    zeros, late = bytes(len(content)), bytes(half) + content[half:]
    return list(dict.fromkeys([durable or b"", content[:half], garbage, zeros, late, content]))


def _applied(folders: dict[int, dict[str, int]], chosen: Iterable[Changes]) -> dict[int, dict[str, int]]:
    folders = dict(folders)
    for changes in chosen:
        for (folder, name), inode in changes:
            folders[folder] = _assigned(folders[folder], name, inode)
    return folders


def _choices(groups: list[list[Changes]], limit: int) -> Iterable[tuple[Changes, ...]]:
    """Choose one result of each group in every way, or in `limit` ways: all lost, all kept, all but one, at random."""
    if math.prod(map(len, groups)) <= limit:
        return itertools.product(*groups)
    lost, kept = [g[0] for g in groups], [g[-1] for g in groups]
    sample = {tuple(lost), tuple(kept)}
    for i in range(len(groups)):
        sample |= {(*lost[:i], kept[i], *lost[i + 1 :]), (*kept[:i], lost[i], *kept[i + 1 :])}
    choose = random.Random(len(groups))
    while len(sample) < limit:
        sample.add(tuple(choose.choice(g) for g in groups))
    return sample


class MemoryStorage(Storage):
    """The real Storage, its system calls answered by a Disk; `watch` is called before each of them."""

    def __init__(self, disk: Disk, links: bool = True, watch: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.folder_fsync = True
        self.disk = disk
        self.can_link = links
        self.longest_write = 2**30
        self.watch = watch
        self._open: dict[int, int] = {}
        self._answers: dict[Callable[..., Any], Callable[..., Any]] = {
            os.mkdir: self._mkdir,
            os.open: self._create,
            os.write: self._append,
            os.pwrite: self._put,
            os.ftruncate: self._cut,
            os.fsync: self._fsync,
            os.replace: self._replace,
            os.link: self._link,
            os.unlink: self._unlink,
            os.rmdir: self._rmdir,
        }
        if hasattr(os, "posix_fallocate"):
            self._answers[os.posix_fallocate] = self._reserve

    def change(self, call: Callable[..., Any], *args: Any) -> Any:
        self.watch()
        return self._answers[call](*args)

    def _slot(self, path: Path) -> Slot:
        folder = self.disk.find(path.parent)
        if folder is None or folder not in self.disk.seen:
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(path))
        return folder, path.name

    def _existing(self, path: Path) -> int:
        inode = self.disk.find(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return inode

    def _new(self, path: Path) -> int:
        if self.disk.find(path) is not None:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        self.disk.last += 1
        return self.disk.last

    def _mkdir(self, path: Path) -> None:
        inode = self._new(path)
        self.disk.folders[inode] = self.disk.seen[inode] = {}
        self.disk.assign((self._slot(path), inode))

    def _create(self, path: Path, flags: int, mode: int) -> int:
        fd = os.open(os.devnull, os.O_WRONLY)  # a number that Output may close
        self.opened(fd, path)
        return fd

    def opened(self, fd: int, path: Path) -> None:
        """Make a new file that is open under this number."""
        inode = self._open[fd] = self._new(path)
        self.disk.files[inode] = (b"", None)
        self.disk.assign((self._slot(path), inode))

    def _append(self, fd: int, data: memoryview) -> int:
        return self._put(fd, data, len(self.disk.files[self._open[fd]][0]))

    def _put(self, fd: int, data: memoryview, start: int) -> int:
        content, durable = self.disk.files[self._open[fd]]
        written = bytes(data[: self.longest_write])
        self.disk.files[self._open[fd]] = (content[:start] + written + content[start + len(written) :], durable)
        return len(written)

    def _reserve(self, fd: int, start: int, size: int) -> None:
        content, durable = self.disk.files[self._open[fd]]
        self.disk.files[self._open[fd]] = (content.ljust(start + size, b"\0"), durable)

    def _cut(self, fd: int, size: int) -> None:
        content, durable = self.disk.files[self._open[fd]]
        self.disk.files[self._open[fd]] = (content[:size].ljust(size, b"\0"), durable)

    def _fsync(self, target: int | Path) -> None:
        self.disk.sync(self._open[target] if isinstance(target, int) else self._existing(target))

    def _replace(self, source: Path, target: Path) -> None:
        inode, over = self._existing(source), self.disk.find(target)
        if over in self.disk.seen and (inode not in self.disk.seen or self.disk.seen[over]):
            raise OSError(errno.ENOTEMPTY, "a folder is there", str(target))
        if over is not None and over in self.disk.files and inode in self.disk.seen:
            raise NotADirectoryError(errno.ENOTDIR, "a file is there", str(target))
        if inode != over:  # two names of one file: rename does nothing, and says that it succeeded
            self.disk.assign((self._slot(source), None), (self._slot(target), inode))

    def _link(self, source: Path, target: Path) -> None:
        if not self.can_link:
            raise OSError(errno.EPERM, "no links here", str(target))
        if self.disk.find(target) is not None:
            raise FileExistsError(errno.EEXIST, "exists", str(target))
        self.disk.assign((self._slot(target), self._existing(source)))

    def _unlink(self, path: Path) -> None:
        if self._existing(path) in self.disk.seen:
            raise IsADirectoryError(errno.EISDIR, "a folder", str(path))
        self.disk.assign((self._slot(path), None))

    def _rmdir(self, path: Path) -> None:
        if self.disk.seen[self._existing(path)]:
            raise OSError(errno.ENOTEMPTY, "not empty", str(path))
        self.disk.assign((self._slot(path), None))

    def sync_folder(self, path: Path) -> None:
        self.change(os.fsync, path)

    def read(self, path: Path) -> bytes:
        content = self.disk.text(path)
        if content is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return content

    def open(self, path: Path) -> BinaryIO:
        return io.BytesIO(self.read(path))

    def names(self, path: Path) -> list[str]:
        return sorted(self.disk.seen.get(self.disk.find(path), {}))

    def exists(self, path: Path) -> bool:
        return self.disk.find(path) is not None

    def points_to(self, path: Path) -> None:
        return None  # nothing makes symbolic links here

    def is_same(self, a: Path, b: Path) -> bool:
        return self.disk.find(a) is not None and self.disk.find(a) == self.disk.find(b)

    def is_folder(self, path: Path) -> bool:
        return self.disk.find(path) in self.disk.seen

    def crc32(self, file: BinaryIO) -> int:
        file.seek(0)
        return zlib.crc32(file.read())


class RenamesNoFolder(MemoryStorage):
    """A bucket that is mounted: files can be renamed, folders cannot."""

    def _replace(self, source: Path, target: Path) -> None:
        if self.is_folder(source):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(source))
        super()._replace(source, target)


class Overlay(MemoryStorage):
    """An overlay: folders that were there when it was mounted cannot be renamed, later ones can."""

    def __init__(self, disk: Disk, links: bool = True, watch: Callable[[], None] = lambda: None) -> None:
        super().__init__(disk, links, watch)
        self.lower = set(disk.seen)

    def _replace(self, source: Path, target: Path) -> None:
        if self.disk.find(source) in self.lower and self.is_folder(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        super()._replace(source, target)
