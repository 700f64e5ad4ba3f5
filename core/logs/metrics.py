"""metrics.jsonl: one line per step and per evaluation; after a resume, never ahead of the committed step."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..bundle.storage import DISK
from ..console.files import open_regular, read_regular
from ..errors import InputError, SaveFailed

_LARGEST = 2**30
"""Bytes of the longest log that is read, of some ten million steps."""

UNREADABLE = "metrics_unreadable.jsonl"
"""Where lines of the log go that are not JSON."""


class Metrics:
    """Append-only log of a training run, in memory until `flush`; without a path (other ranks) it logs nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lines: list[tuple[Any, str]] = []  # step and text, not on the disk yet
        self._flushing = threading.Lock()
        self._step: int | None = None
        self._there: set[tuple[str, ...]] = set()  # what the file has of the step that the run continues from

    def cut(self, step: int) -> str | None:
        """Drop what was logged after a step, and a last line that a crash cut short: the run continues from there.

        What is there of that step is not logged again: a run that was killed after an evaluation repeats it. Lines that
        are not JSON objects are moved to a file beside the log, and reported in the sentence that is returned; all
        others stay, in their order.

        Raises: InputError when the log cannot be read.
        """
        self._there.clear()
        self._lines[:] = [line for line in self._lines if _is_up_to(line[0], step)]
        if self.path is None or not (self.path.exists() or self.path.is_symlink()):
            return None
        DISK.append(self.path).close()  # it is ours, and has no other name
        try:
            data = read_regular(self.path, _LARGEST)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}, expected the log of the run. Move it away.") from error
        *lines, rest = data.split(b"\n")
        lines += [rest] if _values(rest) is not None else []  # a person's editor may have left out the last newline
        unreadable = [line for line in lines if line.strip() and _values(line) is None]
        known = [
            (line, values)
            for line in lines
            if (values := _values(line)) is not None and _is_up_to(values.get("step"), step)
        ]
        kept = [line for line, _ in known]
        self._there = {tuple(values) for _, values in known if values.get("step") == step}
        self._step = step
        whole = b"".join(line + b"\n" for line in kept)
        if unreadable:
            self._set_aside(unreadable)
        if data.startswith(whole):
            os.truncate(self.path, len(whole))
        else:
            new = self.path.with_name(f".{self.path.name}.new")
            new.unlink(missing_ok=True)  # of a process that was killed here
            DISK.write(new, whole)
            DISK.rename(new, self.path)
        if not unreadable:
            return None
        count = "1 line that is" if len(unreadable) == 1 else f"{len(unreadable)} lines that are"
        return f"{self.path}: {count} not valid JSON went to {UNREADABLE}; the other {len(kept)} stay."

    def _set_aside(self, lines: list[bytes]) -> None:
        """Append lines to the file beside the log, durably, before they are taken out of it."""
        assert self.path is not None
        with DISK.append(self.path.with_name(UNREADABLE)) as file:
            file.write(b"".join(line + b"\n" for line in lines))
            DISK.sync(file)

    def add(self, **values: Any) -> None:
        """Log one line; `step` comes first by custom."""
        is_there = values.get("step") == self._step and tuple(values) in self._there
        if self.path is not None and not is_there:
            self._lines.append((values.get("step"), json.dumps(values) + "\n"))

    def flush(self, step: float = math.inf) -> None:
        """Append what was logged up to a step and make it durable; before its commit, so that no such step lacks lines.

        Another thread may log meanwhile. After a failure the lines are kept for the next attempt.

        Raises: SaveFailed.
        """
        with self._flushing:
            due = [line for line in self._lines[:] if _is_up_to(line[0], step)]
            if self.path is not None and due:
                self._append(self.path, "".join(text for _, text in due).encode())
                for line in due:
                    self._lines.remove(line)

    def _append(self, path: Path, data: bytes) -> None:
        end = None
        try:
            with DISK.append(path) as file:
                end = file.tell()
                file.write(data)
                DISK.sync(file)
        except OSError as error:
            if end is not None:
                # Otherwise half a line would remain in the middle, and a resume would drop everything after it.
                with contextlib.suppress(OSError):
                    os.truncate(path, end)
            raise SaveFailed(f"{path}: {error.strerror}. The last saved step is intact.") from error

    def events(self, start: int, step: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the lines that name a step, from a byte of the file on and up to the first that is ahead of `step`.

        Each with the byte after it.
        """
        if self.path is None or not self.path.exists():
            return
        with io.BufferedReader(open_regular(self.path)) as file:
            file.seek(start)
            for line in file:
                start += len(line)
                values = _values(line) if line.endswith(b"\n") else {}
                if values and isinstance(logged := values.get("step"), int):
                    if logged > step:
                        return
                    yield start, values


def _values(line: bytes) -> dict[str, Any] | None:
    """The values of a line; None for one that is not a JSON object."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _is_up_to(logged: Any, step: float) -> bool:
    """Whether a line is not ahead of a step; one that names no step is somebody's note."""
    return not isinstance(logged, (int, float)) or logged <= step
