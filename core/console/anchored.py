"""Relative paths that a change of the working folder does not move: they print as they were written."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def anchored(path: str | Path) -> Path:
    """A path that stays below the working folder of now, as do all that are made from it; an absolute one as it is."""
    path = path if isinstance(path, Path) else Path(path)
    if path.is_absolute() or isinstance(path, _Anchored):
        return path
    return _below(os.getcwd())(path)  # noqa: PTH109


class _Anchored(type(Path())):  # type: ignore[misc]
    """A path of which the system is given the absolute form."""

    _start = ""

    def __fspath__(self) -> str:
        return os.path.join(self._start, str(self))  # noqa: PTH118

    def absolute(self) -> Path:
        return Path(os.fspath(self))

    # Python 3.13 lists the folder of the text

    def iterdir(self) -> Iterator[Path]:
        return (self / name for name in os.listdir(self))  # noqa: PTH208

    def glob(self, *args: Any, **how: Any) -> Iterator[Path]:
        return self._spelled(self.absolute().glob(*args, **how))

    def rglob(self, *args: Any, **how: Any) -> Iterator[Path]:
        return self._spelled(self.absolute().rglob(*args, **how))

    def _spelled(self, found: Iterable[Path]) -> Iterator[Path]:
        return (self / path.relative_to(self.absolute()) for path in found)

    def __reduce__(self) -> Any:
        return Path, (os.fspath(self),)


@functools.cache
def _below(start: str) -> type[Path]:
    """The class of paths below a folder: what pathlib makes of a path has its class."""
    return type("Anchored", (_Anchored,), {"_start": start})
