"""Compare the files of a step with their checksums, and name the damaged tensor."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..containers.checksum import crc32_file, crc32_range
from ..containers.filled import fill
from ..containers.torch_files.file import open_torch_file
from ..containers.torch_files.storages import TorchArchive
from ..errors import CheckpointDamaged, CheckpointError
from .bundle import ALL_PARTS, OPTIMIZER, TOKENIZER, Bundle
from .folder import MODEL, shown
from .parts import Part, ShardedFile, files_of
from .tokenizer_state import proves_itself

FILLED = (MODEL, OPTIMIZER)
"""The files of which training changes every byte."""


def verify(bundle: Bundle, names: tuple[str, ...] = ALL_PARTS, to_train: bool = False) -> list[str]:
    """Check files of a bundle against their checksums, and return a sentence for each that was replaced since.

    With `to_train` the bytes of the model and its optimizer stay in memory, each file's in the `filled` of its part.

    A replaced file is whole by its own checksums, but not the recorded one. Files of old bundles, which recorded
    nothing, are checked by the CRC32 of each zip record. Of a single file, the parts of these names are checked.

    Raises: CheckpointDamaged naming the tensor, with both checksums.
    """
    if bundle.single:
        unused = bundle.optimizer if OPTIMIZER not in names else None
        verify_records(bundle.files[bundle.single], bundle.path(bundle.single), _storages_alone(unused, bundle.weights))
        return []
    recorded = bundle.state.files
    replaced = []
    for name in [file for part in names for file in files_of(part, bundle.files)]:
        if name not in bundle.files:
            continue
        file, path, expected = bundle.files[name], bundle.path(name), recorded.get(name)
        if expected is None:
            if name != TOKENIZER and "/" not in name:
                verify_records(file, path)
            continue
        size = os.fstat(file.fileno()).st_size
        part = bundle.torch_parts.get(name) if to_train and name in FILLED else None
        crc = f"{_crc32(file, size, part):08x}" if size == expected["size"] else None
        if crc == expected["crc32"]:
            continue
        found = (
            f"{size} bytes; recorded {expected['size']}"
            if crc is None
            else f"CRC32 {crc}, recorded {expected['crc32']}"
        )
        if "/" in name:
            raise _damaged_shard(bundle, name, found)
        if name == TOKENIZER:
            if not proves_itself(bundle.tokenizer):
                raise CheckpointDamaged(f"{path} is damaged ({found}).")
            same = False
        else:
            same = expected.get("tensors") == tensors_digest(verify_records(file, path))
        replaced.append(f"{path}: {_what_differs(crc, same, expected)} ({found}). It is used as it is.")
    return replaced


def _crc32(file: BinaryIO, size: int, part: Part | None) -> int:
    """CRC32 of a file, whose bytes stay in memory where it is that of a part and there is room."""
    if part is not None and not isinstance(part.source, ShardedFile):
        with contextlib.suppress(CheckpointError):  # damaged: the sum says so
            records = [r for r in part.source.header.records.values() if r.stored and "/data/" in r.name]
            part.source.filled = fill(file.fileno(), size, [(r.offset, r.offset + r.size) for r in records])
            if part.source.filled is not None:
                return part.source.filled.crc32
    return crc32_file(file.fileno(), size)


def _what_differs(crc: str | None, same: bool, expected: Mapping[str, Any]) -> str:
    """Describe a file that is whole, but not the recorded one; without a CRC32 it has another size."""
    if same and crc is not None:
        return "every tensor is bit for bit what was saved, but a byte in its headers or its padding is not"
    if same:
        return "written again since it was saved, with every tensor bit for bit the same"
    if crc is not None and "tensors" not in expected and "size" in expected:
        return "whole, but not the file that was saved: it was replaced, or a bit flipped between its tensors"
    return "whole, but not the file that was saved: it was replaced"


def _storages_alone(unused: Part | None, used: Part) -> set[str]:
    """The storages of a part that no other part of the same file shares."""
    return (
        {t.storage for t in unused.tensors.values()} - {t.storage for t in used.tensors.values()} if unused else set()
    )


def _damaged_shard(bundle: Bundle, name: str, found: str) -> CheckpointDamaged:
    folder, _, file = name.partition("/")
    names: list[str] = []
    for part in (bundle.weights, bundle.optimizer):
        if part is not None and isinstance(part.source, ShardedFile) and part.source.path.name == folder:
            with contextlib.suppress(CheckpointError):  # it is too damaged to name the place
                names = part.source.damaged(file)
    what = f"{', '.join(names[:3])} is damaged" if names else "damaged"
    return CheckpointDamaged(f"{shown(bundle.path(name))}: {what} ({found}).")


def verify_records(file: BinaryIO, path: Path, unused: Container[str] = ()) -> TorchArchive:
    """Check every record of a torch file against the CRC32 in its directory, except storages that are not used.

    The old stream format recorded none. Returns the header.

    Raises: CheckpointDamaged naming the tensors whose bytes differ.
    """
    try:
        archive = open_torch_file(file, str(path))
    except CheckpointError as error:
        raise CheckpointDamaged(str(error)) from error
    for record in archive.records.values():
        key = record.name.rpartition("/data/")[2]
        if not (record.stored and record.crc32) or key in unused:
            continue
        found = crc32_range(file.fileno(), record.offset, record.offset + record.size)
        if found != record.crc32:
            names = [t.name for t in archive.tensors.values() if t.storage == key] or [record.name]
            raise CheckpointDamaged(
                f"{path}: {', '.join(names[:3])} is damaged (CRC32 {found:08x}, recorded {record.crc32:08x})."
            )
    return archive


def tensors_digest(archive: TorchArchive) -> str:
    """CRC32 of the CRC32s of the storages of a torch file, in their order: what `integrity` records as `tensors`."""
    digest = 0
    for record in archive.records.values():
        if "/data/" in record.name:
            digest = zlib.crc32(record.crc32.to_bytes(4, "little"), digest)
    return f"{digest:08x}"
