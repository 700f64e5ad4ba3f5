"""How much memory this process may still allocate: on the machine, and in every control group that it is in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

FILES = {
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By kind of mount: the file of a group's limit, that of its use, and the entry of memory.stat for idle page cache."""


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still allocate; 0 where unknown. Tests give a `root` of files for the system's own.

    A group is as tight as the tightest group around it. Page cache that was not used lately counts as free, as it does
    in the machine's own number.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        found.append(_entry(root / "proc/meminfo", "MemAvailable:") * 1024)
    for kind, folder in _groups(root):
        with contextlib.suppress(OSError, ValueError):  # no limit: "max"; the group of all processes has no such file
            found.append(_free_in(folder, *FILES[kind]))
    return max(0, min(found, default=0))


def _entry(file: Path, name: str) -> int:
    """The number that follows a name in a file of lines."""
    return int(next(words[1] for words in map(str.split, file.read_text().splitlines()) if words[:1] == [name]))


def _free_in(folder: Path, limit_file: str, use_file: str, idle: str) -> int:
    limit, used = (int((folder / name).read_text()) for name in (limit_file, use_file))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        used -= _entry(folder / "memory.stat", idle)
    return limit - max(0, used)


def _groups(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield kind and folder of each group that this process is in, from its own to the outermost that is mounted."""
    paths = {}
    mounts: list[list[str]] = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():  # "4:memory:/user/job", "0::/user/job"
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                paths["cgroup" if controllers else "cgroup2"] = path
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text().splitlines()]
    for words in mounts:  # "35 31 0:32 /user /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        if kind in paths and (kind == "cgroup2" or "memory" in options):
            top = root / words[4].lstrip("/").replace("\\040", " ")
            folder = top / _below(paths[kind], words[3])
            while folder != top:
                yield kind, folder
                folder = folder.parent
            yield kind, top


def _below(path: str, mounted: str) -> PurePosixPath:
    """Where a group lies below a mount of its hierarchy; the mount itself where that shows only what is within it."""
    with contextlib.suppress(ValueError):
        below = PurePosixPath(path).relative_to(mounted)
        if ".." not in below.parts:  # seen from another namespace
            return below
    return PurePosixPath()
