"""What a hostile checkpoint is, and the sound parts that most are made of."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import inspect_model
from core.errors import CheckpointError
from tests.hostile.assemble import FOUR, entry, items, safetensors, tensor, torch_zip


@dataclass(frozen=True)
class Case:
    """A hostile checkpoint: how it is written, and what is said of it."""

    write: Callable[[Path], Path]  # into an empty folder; returns what to open
    refused: str = ""  # in the message, where it is refused
    reported: str = ""  # in a finding or a note, where it opens


def file(data: bytes, called: str = "x.pt") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / called).write_bytes(data)
        return folder / called

    return write


def folder_of(files: dict[str, bytes | str], links: dict[str, str] | None = None) -> Callable[[Path], Path]:
    """Files by name within a folder (texts are written as UTF-8), and links by name and target."""

    def write(folder: Path) -> Path:
        for where, data in files.items():
            (folder / where).parent.mkdir(parents=True, exist_ok=True)
            (folder / where).write_bytes(data if isinstance(data, bytes) else data.encode())
        for where, target in (links or {}).items():
            (folder / where).symlink_to(target)
        return folder

    return write


def shown(*words: object) -> str:
    """What inspect_model.py prints; it ends in one of two ways."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            assert inspect_model.main([str(word) for word in words]) in (0, 1)
        except CheckpointError as error:  # which the script prints as one line
            out.write(str(error))
    return out.getvalue()


WEIGHTS = {"0": FOUR}
SOUND = items(w=tensor()) + b"."
SOUND_ZIP = torch_zip(SOUND, WEIGHTS)
SOUND_TENSORS = safetensors({"w": entry([2, 2], 0, 16)}, FOUR)
