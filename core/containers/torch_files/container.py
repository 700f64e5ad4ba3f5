"""A checkpoint in one file of torch, zip or stream, as a container."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..container import Check, Container, reading
from ..pickles.foreign import foreign_calls
from ..spec import TensorSpec
from .file import open_torch_file
from .storages import TorchArchive
from .zip_directory import Record


def open_torch_single(path: Path) -> Container:
    """Open a torch file of any version; only its directory and its pickles are read.

    Raises: CheckpointNotFound, CheckpointDamaged when it is cut off or contradicts itself, CheckpointError when it is
        another kind of file.
    """
    with reading(path) as file:
        archive = open_torch_file(file, str(path))
        size = file.seek(0, os.SEEK_END)
    return container_of(archive, path, size)


def container_of(archive: TorchArchive, path: Path, size: int) -> Container:
    """Present an opened torch file of `size` bytes as a container."""
    return Container(
        kind=f"torch {archive.container}",
        path=path,
        tensors=archive.tensors,
        content=archive.content,
        files={path.name: size},
        checks=_checks(archive, path.name),
        foreign=foreign_calls([archive.content, archive.unused]),
        notes=[f"{path.name}: {line}" for line in archive.odd],
    )


def _checks(archive: TorchArchive, file: str) -> list[Check]:
    """Each record of a zip with its checksum; of a stream, which has none, the bytes of each storage."""
    in_storage: dict[str, list[TensorSpec]] = defaultdict(list)
    for spec in archive.tensors.values():
        in_storage[f"data/{spec.storage}"].append(spec)
    if archive.container == "zip":
        return record_checks(archive.records, file, {key: [s.name for s in specs] for key, specs in in_storage.items()})
    checks = []
    for specs in in_storage.values():
        begin = min(spec.offset for spec in specs)
        end = max(spec.offset + spec.extent for spec in specs)
        checks.append(Check(file, begin, end - begin, None, tuple(spec.name for spec in specs)))
    return checks


def record_checks(
    records: Mapping[str, Record], file: str, tensors: Mapping[str, Sequence[str]], before: str = ""
) -> list[Check]:
    """List the records of a zip with their checksums; `tensors` has the names of those in a record."""
    return [
        Check(file, record.offset, record.size, record.checksum, tuple(tensors.get(name, ())) or (before + name,))
        for name, record in records.items()
    ]
