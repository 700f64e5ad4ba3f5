"""Tell the referee of files that are written by descriptor, in its own terms.

ckpt-chaos counts an `os.open`, so that it kills before one. But it cuts in half only files of `open()`, `torch.save`
and safetensors, and takes back as not synced only those of `open()`. Ours are written by descriptor, in a folder that
is renamed as a whole: without this file it could find none of our mistakes of these two kinds.
"""

from __future__ import annotations

import os
from pathlib import Path

from ckpt_chaos import inject

_state = inject._state


def see_descriptors() -> None:
    """Have files of `os.open` torn and rolled back like those of `open()`, and followed through renames of folders."""
    opened, closed, wrapped = os.open, os.close, os.fdopen
    torn: dict[int, tuple[str, int]] = {}

    def new_open(path, flags, mode=0o777, *, dir_fd=None):
        if not flags & (os.O_WRONLY | os.O_RDWR) or not isinstance(path, (str, os.PathLike)) or not inject._under(path):
            return opened(path, flags, mode, dir_fd=dir_fd)
        name = inject._norm(path)
        tear = inject._event("open", path, tornable=True)
        if _state["unsynced"]:
            inject._note_open_for_write(name)
        fd = opened(os.fsencode(path), flags, mode, dir_fd=dir_fd)  # the referee does not count names in bytes
        _state["fd_path"][fd] = name
        if tear:
            torn[fd] = name, os.fstat(fd).st_size
        return fd

    def cut(name: str, before: int) -> None:
        """Leave half of what was written: all of a new file, the end of one that was appended to."""
        size = Path(name).stat().st_size
        os.truncate(name, before + (size - before) // 2 if size > before else max(1, size // 2))
        os._exit(137)

    def new_close(fd):
        closed(fd)
        _state["fd_path"].pop(fd, None)
        if fd in torn:
            cut(*torn[fd])

    class Torn:
        """A file that is cut when it is closed."""

        def __init__(self, file, fd: int) -> None:
            self._file, self._fd = file, fd

        def __getattr__(self, name: str):
            return getattr(self._file, name)

        def close(self) -> None:
            """Close it, cut it, and end the process."""
            self._file.close()
            cut(*torn[self._fd])

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

    def new_fdopen(fd, *args, **kwargs):
        file = wrapped(fd, *args, **kwargs)
        return Torn(file, fd) if fd in torn else file

    def moved(rename):
        def new_rename(source, target, *args, **kwargs):
            rename(source, target, *args, **kwargs)
            old, new = inject._norm(source) + os.sep, inject._norm(target) + os.sep
            for name in [name for name in _state["dirty"] if name.startswith(old)]:
                _state["dirty"].discard(name)
                for kind in ("dirty", "zero"):
                    _state[kind].add(new + name.removeprefix(old))

        return new_rename

    os.open, os.close, os.fdopen = new_open, new_close, new_fdopen
    os.replace, os.rename = moved(os.replace), moved(os.rename)
