"""metrics.jsonl: one line per step and per evaluation; after a resume, never ahead of the committed step."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ..bundle.storage import DISK
from ..errors import SaveFailed


class Metrics:
    """Append-only log of a training run, in memory until `flush`; without a path (other ranks) it logs nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lines: list[str] = []

    def cut(self, step: int) -> None:
        """Drop what was logged after a step, and a line that a crash cut short: the run continues from there."""
        if self.path is None or not self.path.exists():
            return
        data = self.path.read_bytes()
        end = 0
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n") or not _is_up_to(line, step):
                break
            end += len(line)
        if end < len(data):
            os.truncate(self.path, end)

    def add(self, **values: Any) -> None:
        """Log one line; `step` comes first by custom."""
        if self.path is not None:
            self._lines.append(json.dumps(values) + "\n")

    def flush(self) -> None:
        """Append what was logged and make it durable: done before a commit, so that no committed step lacks lines.

        Another thread may log meanwhile. After a failure the lines are kept for the next attempt.

        Raises: SaveFailed.
        """
        lines = self._lines[:]
        if self.path is None or not lines:
            return
        end = None
        try:
            with self.path.open("ab") as file:
                end = file.tell()
                file.write("".join(lines).encode())
                DISK.sync(file)
        except OSError as error:
            if end is not None:
                # Otherwise half a line would remain in the middle, and a resume would drop everything after it.
                with contextlib.suppress(OSError):
                    os.truncate(self.path, end)
            raise SaveFailed(f"{self.path}: {error.strerror}. The last saved step is intact.") from error
        del self._lines[: len(lines)]


def _is_up_to(line: bytes, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False
