"""A part of a step in shards: a folder in DCP's form, in place of a torch file, one file of it from each rank."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..containers.checksum import crc32_range
from ..containers.container import Container
from ..containers.dcp.folder import open_dcp
from ..containers.dcp.metadata import METADATA
from .parts import TorchFile


def folder_of(name: str) -> str:
    """Name the folder that stands for a torch file: `model_sharded` for `model.pt`."""
    return f"{name.removesuffix('.pt')}_sharded"


def files_of(name: str, files: Mapping[str, Any]) -> list[str]:
    """Name the files of a bundle that a part lies in: its torch file, or all files of its folder."""
    return [name] if name in files else [file for file in files if file.startswith(f"{folder_of(name)}/")]


class ShardedFile(TorchFile):
    """A folder of shards, its files open; read once, when it is first asked for, without torch."""

    def __init__(self, files: Mapping[str, BinaryIO], path: Path) -> None:
        super().__init__(files[METADATA], path)
        self.files = files
        self._mapped: dict[str, mmap.mmap] = {}

    @functools.cached_property
    def header(self) -> Container:  # type: ignore[override]
        """What the folder holds: values, and a spec for each tensor with its blocks.

        Raises: CheckpointError when it cannot be read, CheckpointDamaged when it contradicts itself.
        """
        return open_dcp(self.path, opened=self.files)

    @property
    def foreign(self) -> list[str]:
        """What its pickles name besides data, as text."""
        return self.header.foreign

    def mapped(self, file: str) -> mmap.mmap:
        """Map a file, privately, once."""
        if file not in self._mapped:
            self._mapped[file] = mmap.mmap(self.files[file].fileno(), 0, access=mmap.ACCESS_COPY)
        return self._mapped[file]

    def damaged(self, file: str) -> list[str]:
        """Name the tensors in a file whose bytes are not those that were written.

        Raises: CheckpointDamaged when the file cannot be read at all.
        """
        fd = self.files[file].fileno()
        return [
            name
            for check in self.header.checks
            if check.file == file
            and check.crc32 is not None
            and crc32_range(fd, check.offset, check.offset + check.size) != check.crc32
            for name in check.names
        ]
