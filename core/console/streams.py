"""Output that a run outlives: training goes on to the end when nobody can read what it says."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


def outlive_terminal() -> None:
    """Let the rest of the process print to stdout and stderr whatever becomes of them: closed, full, hung up, latin-1.

    A descriptor from 0 to 2 that was closed before the start is opened on nothing. Otherwise the next file would get
    its number, and a line for the terminal would go into a checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)


class Lasting:
    """A text stream whose writes do not fail: what cannot be written is dropped, what has no character is escaped."""

    def __init__(self, stream: TextIO | None) -> None:
        # None: it was closed before the start
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115

    def write(self, text: str) -> int:
        """Write what can be written; returns the length of the text, whatever became of it."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            code = self._stream.encoding or "ascii"
            return self.write(text.encode(code, "backslashreplace").decode(code)) and len(text)
        except (OSError, ValueError):  # ValueError: somebody closed it
            return len(text)
        return len(text)

    def flush(self) -> None:
        """Write what is pending, if that is possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
