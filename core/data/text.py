"""Read UTF-8 files as one text, in pieces that do not depend on the available memory.

Several files are joined by a newline. A byte order mark at the start of a file is dropped; nothing else is changed.
"""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..console.files import open_regular
from ..errors import InputError

CHUNK = 1 << 20
"""Bytes of one read, and characters after which a piece is cut."""

BORDER = re.compile(r"(?s).*\S(?=[ \n])")
"""Up to the last place where a space or newline follows something else.

GPT-2's byte pairs never span such a place and nothing before it depends on what follows, so a cut there changes no
token. A text of CHUNK characters without one is cut where the read ended.
"""


class Segment(NamedTuple):
    """Bytes `start` to `end` of a file; both lie between characters."""

    path: Path
    start: int
    end: int


def split(files: list[Path], val_fraction: float) -> tuple[list[Segment], list[Segment]]:
    """Split the joined files by bytes: the last `val_fraction` is for validation.

    A border inside a character moves to its end. The newline between two files is dropped if the border is there.
    """
    sizes = [_size(path) for path in files]
    border = int((sum(sizes) + len(files) - 1) * (1 - val_fraction))
    train: list[Segment] = []
    for index, (path, size) in enumerate(zip(files, sizes, strict=True)):
        if border <= size:
            border = _next_character(path, border)
            rest = [Segment(p, 0, s) for p, s in zip(files[index + 1 :], sizes[index + 1 :], strict=True)]
            val = [Segment(path, border, size), *rest] if border < size else rest
            return [*train, Segment(path, 0, border)], val
        train.append(Segment(path, 0, size))
        border -= size + 1
    return train, []


def pieces(segments: list[Segment], advance: Callable[[int], object] = lambda count: None) -> Iterator[str]:
    """Read segments as text, piece by piece; the ends of the pieces depend only on the bytes.

    `advance` receives the number of bytes read.

    Raises: InputError with the path and the byte offset when a file is not UTF-8.
    """
    pending = ""
    for index, segment in enumerate(segments):
        pending += "\n" if index else ""
        for text in _decoded(segment, advance):
            pending += text
            if len(pending) >= CHUNK:
                border = BORDER.match(pending)
                cut = border.end() if border else len(pending)
                yield pending[:cut]
                pending = pending[cut:]
    if pending:
        yield pending


def _decoded(segment: Segment, advance: Callable[[int], object]) -> Iterator[str]:
    path, position, end = segment
    decoder = codecs.getincrementaldecoder("utf-8")()
    with readable(path), open_regular(path) as file:
        file.seek(position)
        while position < end:
            block = file.read(min(CHUNK, end - position))
            if not block:
                raise InputError(f"{path}: ended at byte {position:,}, expected {end:,}; it changed while it was read.")
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=position + len(block) == end)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, position - held + error.start, error.object) from error
            yield text.removeprefix("\ufeff") if position == 0 else text
            position += len(block)
            advance(len(block))


def _not_utf8(path: Path, offset: int, block: bytes) -> InputError:
    encoding = "UTF-16" if block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "LATIN1"
    return InputError(
        f"{path}: byte {offset:,} does not belong to UTF-8 text. "
        f"Convert the file, for example: iconv -f {encoding} -t UTF-8 {path.name} > utf8.txt"
    )


@contextlib.contextmanager
def readable(path: Path, expected: str = "a readable file") -> Iterator[None]:
    """Raise InputError with the path where the block finds a file that it cannot read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror}, expected {expected}.") from error


def _size(path: Path) -> int:
    with readable(path, "a text file"):
        return path.stat().st_size


def _next_character(path: Path, offset: int) -> int:
    """The offset moved forward over the continuation bytes (10xxxxxx) of UTF-8."""
    with readable(path), open_regular(path) as file:
        file.seek(offset)
        following = file.read(3)
    inside = 0
    while inside < len(following) and following[inside] & 0xC0 == 0x80:
        inside += 1
    return offset + inside
