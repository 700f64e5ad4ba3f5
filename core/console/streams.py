"""What a process prints to: output that a run outlives, and that no text of a checkpoint can take over.

Training goes on to the end when nobody can read what it says. Control characters, which names and settings may have,
move a cursor, hide lines, or retitle a window; none gets through.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
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


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What moves the cursor or changes the terminal, but the line feed and the tab; and what reverses the order of text."""


def guard_terminal() -> None:
    """Let the rest of the process print control characters to stdout and stderr as their escapes."""
    sys.stdout, sys.stderr = Guarded(sys.stdout), Guarded(sys.stderr)


def unguarded(stream: Any) -> Any:
    """The stream below the guard: for what gets a text as it is, a file or a program."""
    return stream._wrapped if isinstance(stream, Guarded) else stream


class Guarded:
    """A text stream on which control characters appear as their escapes; these are JSON's, so that JSON stays the same.

    Progress bars, which are drawn with such characters and have no text of a checkpoint, write to the stream below it.
    """

    def __init__(self, stream: Any) -> None:
        self._wrapped = stream  # the name by which tqdm finds that two streams are one

    def write(self, text: str) -> int:
        """Write text; returns its length."""
        self._wrapped.write(_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


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
