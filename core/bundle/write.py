"""Write the files of a step into a staged folder, each durable, the training state last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..containers.json_files import dump_json
from .commit import ModelFolder
from .output import Output
from .storage import Storage
from .training_state import STATE, seal


class InBlocks(Protocol):
    """A file that is written block by block: memory, where its bytes begin in the file, how many they are."""

    size: int

    def blocks(self) -> Iterator[tuple[memoryview, int, int]]:
        """Yield the blocks in order, each valid until the next."""

    @property
    def recorded(self) -> dict[str, Any]:
        """What the training state records of the file, once it is written."""


Writer = Callable[[Output], str | None]
"""Writes a file, and returns the digest of its tensors where it has any."""

Content = Writer | InBlocks | dict[str, Any]
"""The source of a step's file; a dict becomes JSON."""


def write_bundle(folder: ModelFolder, stage: Path, state: Mapping[str, Any], files: Mapping[str, Content]) -> None:
    """Write the files of one step into a staged folder, each durable, the training state with their checksums last."""
    recorded = {name: write_file(folder.storage, stage / name, content) for name, content in files.items()}
    folder.storage.write(stage / STATE, seal(state, recorded))


def write_file(storage: Storage, path: Path, content: Content) -> dict[str, Any]:
    """Write a new file, durably, and return what the training state records of it."""
    if not isinstance(content, dict) and not callable(content):
        with storage.create_blocks(path, content.size) as file:
            for block, start, length in content.blocks():
                file.write(block, start, length)
        return content.recorded
    digest = None
    with storage.create(path) as output:
        if isinstance(content, dict):
            output.write(dump_json(content))
        else:
            digest = content(output)
    entry = {"size": output.size, "crc32": f"{output.crc32:08x}"}
    return entry if digest is None else {**entry, "tensors": digest}
