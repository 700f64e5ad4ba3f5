"""A checkpoint in one file of torch, zip or stream, as a container."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from ..container import Check, Container, reading
from ..pickles.foreign import foreign_calls
from ..spec import TensorSpec
from .file import open_torch_file
from .stream import TorchStream
from .zip import TorchZip


def open_torch_single(path: Path) -> Container:
    """Open a torch file of any version; only its directory and its pickles are read.

    Raises: CheckpointNotFound, CheckpointDamaged when it is cut off or contradicts itself, CheckpointError when it is
        another kind of file.
    """
    with reading(path) as file:
        archive = open_torch_file(file, str(path))
        size = file.seek(0, os.SEEK_END)
    return container_of(archive, path, size)


def container_of(archive: TorchZip | TorchStream, path: Path, size: int) -> Container:
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


def _checks(archive: TorchZip | TorchStream, file: str) -> list[Check]:
    """Each record of a zip with its checksum; of a stream, which has none, the bytes of each storage."""
    in_storage: dict[str, list[TensorSpec]] = defaultdict(list)
    for spec in archive.tensors.values():
        in_storage[spec.storage].append(spec)
    checks = []
    if isinstance(archive, TorchZip):
        for name, record in archive.records.items():
            specs = in_storage.get(name.removeprefix("data/"), []) if name.startswith("data/") else []
            # the CRC32 of nothing is 0, which otherwise means that none was recorded; compressed bytes have another one
            crc32 = record.crc32 or (None if record.size else 0)
            names = tuple(spec.name for spec in specs) or (name,)
            checks.append(Check(file, record.offset, record.size, crc32 if record.stored else None, names))
        return checks
    for specs in in_storage.values():
        begin = min(spec.offset for spec in specs)
        end = max(spec.offset + spec.extent for spec in specs)
        checks.append(Check(file, begin, end - begin, None, tuple(spec.name for spec in specs)))
    return checks
