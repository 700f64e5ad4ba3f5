"""A part of a checkpoint: the weights, or the optimizer state, in a torch file of their own or under a key of one."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..console.commands import typed
from ..containers.checksum import crc32_range
from ..containers.container import Container
from ..containers.dcp.folder import open_dcp
from ..containers.dcp.metadata import METADATA
from ..containers.filled import Filled
from ..containers.pickles.foreign import foreign_calls
from ..containers.spec import TensorSpec
from ..containers.torch_files.file import open_torch_file
from ..containers.torch_files.storages import TorchArchive
from ..errors import CheckpointError
from ..families.family import Shape

WEIGHTS_KEYS = ("model_state_dict", "state_dict")
"""The keys under which files that hold more than a state dict have it."""


class TorchFile:
    """A torch file, open; its header is read once, when it is first asked for."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.filled: Filled | None = None
        """Its bytes in memory of the process, where verification put them, so that nothing reads it a second time."""

    @functools.cached_property
    def header(self) -> TorchArchive:
        """What the file describes: its structure, with a spec for each tensor.

        Raises: CheckpointError when it is not a torch file, or is damaged.
        """
        return open_torch_file(self.file, str(self.path))

    @property
    def foreign(self) -> list[str]:
        """What the pickle of the file names besides data, as text: in its content, or computed and discarded."""
        return foreign_calls(self.header.content, dropped=self.header.unused)

    def refuse_foreign(self, records: bool = False) -> None:
        """Raise CheckpointError when the file names anything but data; nothing of it was executed.

        With `records`, values of a program's classes and functions by name are let through: they are not used.
        """
        calls = [call for call in self.foreign if not (records and getattr(call, "is_record", False))]
        if calls:
            raise CheckpointError(
                f"{self.path}: its pickle names {', '.join(calls[:3])}. Nothing was executed, and nothing is loaded; "
                f"{typed('inspect_model.py')} shows its tensors and plain values."
            )


class Part:
    """The content of a torch file, or what lies under one of its keys."""

    def __init__(self, source: TorchFile, keys: tuple[str, ...] = ()) -> None:
        self.source = source
        self._keys = keys

    @functools.cached_property
    def key(self) -> str | None:
        """The first of the keys that the content has; None for the whole content."""
        content = self.source.header.content
        return next(
            (key for key in self._keys if isinstance(content, dict) and isinstance(content.get(key), dict)), None
        )

    def of(self, content: Any) -> Any:
        """The part within the content of a file."""
        return content if self.key is None else content[self.key]

    @property
    def content(self) -> Any:
        """The part as the header shows it: plain values, and a spec for each tensor."""
        return self.of(self.source.header.content)

    @functools.cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """The tensors of the part by name."""
        before = "" if self.key is None else f"{self.key}."
        found = self.source.header.tensors
        return {name.removeprefix(before): spec for name, spec in found.items() if name.startswith(before)}

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of its tensors by name."""
        return {name: spec.shape for name, spec in self.tensors.items()}


def once(tensors: Mapping[str, TensorSpec]) -> dict[str, Shape]:
    """The shapes of tensors, tied ones under their first name alone, as a program's parameters are."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, t in tensors.items():
        seen.setdefault((t.storage, t.offset, t.shape, t.strides), name)
    return {name: tensors[name].shape for name in seen.values()}


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
        """Name the tensors in a file whose bytes are not what was written.

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
