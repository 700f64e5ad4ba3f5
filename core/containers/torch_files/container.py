"""A checkpoint in one file of torch, zip or stream, as a container."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..container import Check, Container, Unpacked, reading
from ..pickles.foreign import foreign_calls, is_module
from ..pickles.inert import Call, as_name, as_text
from ..spec import ITEM_SIZES, TensorSpec
from .file import open_torch_file
from .storages import TorchArchive
from .zip import pieces_of
from .zip_directory import Record


def open_torch_single(path: Path) -> Container:
    """Open a torch file of any version; only its directory and its pickles are read.

    Raises: CheckpointNotFound, CheckpointDamaged when it is cut off or contradicts itself, CheckpointError when it is
        another kind of file.
    """
    with reading(path) as file:
        archive = open_torch_file(file, str(path), True)
        size = file.seek(0, os.SEEK_END)
    container = container_of(archive, path, size)
    container.unpacked = _unpacked(archive, path)
    return container


def container_of(archive: TorchArchive, path: Path, size: int) -> Container:
    """Present an opened torch file of `size` bytes as a container."""
    return Container(
        kind=f"torch {archive.container}",
        path=path,
        tensors=archive.tensors,
        content=archive.content,
        files={path.name: size},
        checks=_checks(archive, path.name),
        foreign=foreign_calls(archive.content, dropped=archive.unused),
        notes=[f"{path.name}: {line}" for line in archive.odd] + _modules(archive.content, path),
    )


def _modules(content: Any, path: Path) -> list[str]:
    """Say which parts of a file are whole modules, and how a state dict is made of them."""
    parts = content.items() if isinstance(content, dict) else [("", content)]
    return [f"{path.name}: {module_said(part, str(name), path)}" for name, part in parts if is_module(part)]


def module_said(module: Call, name: str, path: Path) -> str:
    """What the record of a module is, under its name in a file, and the two lines that make a state dict of it."""
    at = f"[{name!r}]" if name else ""
    return (
        f"{as_name(name) or 'its content'} is a whole module ({as_text(module.callable, 80)}), whose code is not in "
        "the file and is not imported. Where that code is, two lines make a file of its tensors: "
        f"model = torch.load({str(path)!r}, weights_only=False){at}; torch.save(model.state_dict(), 'weights.pt')."
    )


def _unpacked(archive: TorchArchive, path: Path) -> dict[str, Unpacked]:
    """What the file holds in another form: arrays in its pickle, and deflated records with tensors."""
    found = {
        name: Unpacked(math.prod(array.shape) * ITEM_SIZES[array.dtype], array.write)
        for name, array in archive.arrays.items()
    }
    packed = {spec.file for spec in archive.tensors.values()} - found.keys() - {""}
    for record in archive.records.values():
        if record.name in packed:
            found[record.name] = Unpacked(record.inflated, partial(_inflate, path, record))
    return found


def _inflate(path: Path, record: Record, into: BinaryIO) -> None:
    with reading(path) as file:
        for piece in pieces_of(file, record, str(path)):
            into.write(piece)


def _checks(archive: TorchArchive, file: str) -> list[Check]:
    """Each record of a zip with its checksum; of a stream, which has none, the bytes of each storage."""
    in_storage: dict[str, list[TensorSpec]] = defaultdict(list)
    for spec in archive.tensors.values():
        in_storage[f"data/{spec.storage}"].append(spec)
    if archive.container == "zip":
        return record_checks(archive.records, file, {key: [s.name for s in specs] for key, specs in in_storage.items()})
    checks = []
    for specs in in_storage.values():
        if specs[0].file:
            continue
        begin = min(spec.offset for spec in specs)
        end = max(spec.offset + spec.extent for spec in specs)
        checks.append(Check(file, begin, end - begin, None, tuple(spec.name for spec in specs)))
    return checks


def record_checks(
    records: Mapping[str, Record], file: str, tensors: Mapping[str, Sequence[str]], before: str = ""
) -> list[Check]:
    """List the records of a zip with their checksums; `tensors` has the names of those in a record."""
    made = []
    for name, record in records.items():
        held, place = tuple(tensors.get(name, ())), (file, record.offset, record.size, record.checksum)
        if held and not record.stored:
            place = (record.name, 0, record.inflated, record.crc32 or None)
        made.append(Check(*place, held or (before + name,)))
    return made
