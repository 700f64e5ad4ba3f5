"""Read the contents of a `.pt` zip from its directory and `data.pkl` alone: no torch, no weights, nothing executed.

The zip is PKWARE's APPNOTE 4.3 with its 64-bit extension; the records of a torch file are described in the
documentation of torch.serialization and in the docstring of `core/containers/torch_files/layout.py`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from ...console.words import listed_names
from ...errors import CheckpointDamaged, CheckpointError
from ..blocks import read_at
from ..checksum import crc32
from ..pickles.inert import as_name, as_text
from .storages import LARGEST_PICKLE, TensorLoader, TorchArchive, name_tensors
from .zip_directory import Record, read_directory, read_head


def open_torch_zip(file: BinaryIO, where: str, unpack: bool = False) -> TorchArchive:
    """Read the directory and data.pkl of a torch file; `where` is its path, for messages.

    With `unpack`, records may be deflated, and tensors arrays in the pickle: their specs name what has to be unpacked.

    Raises: CheckpointDamaged when it is cut off or contradicts itself, CheckpointError for another kind of file.
    """
    records, loose = read_directory(file, where, _least_size)
    if "data.pkl" not in records:
        raise CheckpointError(
            f"{where}: a zip without data.pkl, so not one that torch.save wrote; it holds "
            f"{as_text(sorted(records)[:5])}."
        )
    if other := next((name for name in records if name.lower() in _LOOKED_FOR and name not in _LOOKED_FOR), None):
        raise CheckpointDamaged(
            f"{where}: a record is called {as_text(other)}, which torch, without case, reads as "
            f"{as_text(other.lower())}."
        )
    loader = TensorLoader(where, unpack=unpack)
    size = file.seek(0, os.SEEK_END) if unpack else 0
    order = _read(file, records, "byteorder", where, size) if "byteorder" in records else b"little"
    if order == b"big":
        raise loader.refuse_big_endian()
    if order != b"little":
        raise CheckpointDamaged(f"{where}: its byteorder is {as_text(order)}, expected little or big.")
    data = _read(file, records, "data.pkl", where, size)
    parsed = loader.read(data)
    loader.place(_storage_offsets(loader, records, size))
    odd = _odd(records, loader, loose, len(data) - parsed.end)
    tensors = name_tensors(parsed.value, where)
    return TorchArchive("zip", where, parsed.value, tensors, parsed.unused, records, odd, loader.arrays)


_PIECE = 1 << 20
"""Bytes that are inflated at a time."""

_SMALL = 1 << 20
"""Bytes that a deflated pickle may have, even where its file has fewer."""

_MOST_UNFOLDED, _MUCH = 16, 1 << 28
"""How much larger than their file deflated tensors may be: so many times, and so many bytes."""

_KNOWN = ("data.pkl", "byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id")

_LOOKED_FOR = {*_KNOWN, ".data/version", "constants.pkl"}
"""Records that torch looks for by name, the last two in files of TorchScript."""


def _odd(records: dict[str, Record], loader: TensorLoader, loose: int, behind: int) -> list[str]:
    """Parts of the file that torch.save does not write: nothing here reads them, but other programs may."""
    said = []
    known = {*_KNOWN, *(f"data/{key}" for key in loader.storages)}
    others = [name for name in records if name not in known]
    if others:
        shown = listed_names(others, 5, show=lambda name: as_name(name, 60))
        said.append(f"{len(others)} records that nothing here refers to: {shown}.")
    if loose:
        said.append(f"{loose} bytes of the zip belong to no record.")
    if behind:
        said.append(f"{behind} bytes stand behind the end of data.pkl's pickle.")
    return said


def _read(file: BinaryIO, records: dict[str, Record], name: str, where: str, size: int) -> bytes:
    """Read a record that is not a tensor, and check its bytes if the directory has their checksum.

    A deflated one is read where `size`, that of the file, is given: its own is bounded by it.
    """
    record = records[name]
    if not record.stored and not (record.inflated >= 0 and size):
        raise CheckpointDamaged(
            f"{where}: {record.name} is compressed; torch stores it plainly. Unpack and save again."
        )
    if record.size > LARGEST_PICKLE:
        raise CheckpointDamaged(f"{where}: {record.name} has {record.size} bytes, at most {LARGEST_PICKLE} are read.")
    if not record.stored and record.inflated > max(size, _SMALL):
        raise CheckpointDamaged(
            f"{where}: {record.name} is compressed, with {record.inflated} bytes in a file of {size}."
        )
    data = b"".join(pieces_of(file, record, where))
    if record.crc32 and (found := crc32(data)) != record.crc32:
        raise CheckpointDamaged(f"{where}: {name} is damaged (CRC32 {found:08x}, recorded {record.crc32:08x}).")
    return data


def pieces_of(file: BinaryIO, record: Record, where: str) -> Iterator[bytes]:
    """Read the bytes of a record, inflated where it is deflated.

    Raises: CheckpointDamaged when they are not as many as the directory says.
    """
    if record.stored:
        yield read_at(file, record.offset, record.size, where)
        return
    inflater, left, at, end = zlib.decompressobj(-zlib.MAX_WBITS), record.inflated, record.offset, record.size
    end += at
    try:
        while left >= 0 and not inflater.eof:
            packed = inflater.unconsumed_tail
            if not packed:
                packed = read_at(file, at, min(_PIECE, end - at), where)
                at += len(packed)
            made = inflater.decompress(packed, min(_PIECE, left) + 1)
            left -= len(made)
            if made:
                yield made
            elif not packed:
                break
    except zlib.error as error:
        raise CheckpointDamaged(f"{where}: {record.name} cannot be inflated ({error}).") from error
    if left or not inflater.eof:
        raise CheckpointDamaged(f"{where}: {record.name} does not inflate to its {record.inflated} bytes.")


def _storage_offsets(loader: TensorLoader, records: dict[str, Record], size: int) -> dict[str, int]:
    """The offset of each storage in the file, after its record's size is compared with data.pkl; 0 in a deflated one.

    `size` is that of a file whose records may be deflated.
    """
    offsets = {}
    unfolded = sum(max(records[f"data/{key}"].inflated, 0) for key in loader.storages if f"data/{key}" in records)
    if size and unfolded > _MOST_UNFOLDED * size + _MUCH:
        raise CheckpointError(f"{loader.where}: its tensors unfold to {unfolded} bytes, the file has {size}; not read.")
    for key, storage in loader.storages.items():
        record = records.get(f"data/{key}")
        if record is None:
            raise CheckpointDamaged(f"{loader.where}: {loader.shown(key)} is missing, its tensors cannot be read.")
        is_deflated = not record.stored and record.inflated >= 0 and size > 0
        if (record.inflated if is_deflated else record.size) != storage.nbytes or not (record.stored or is_deflated):
            raise CheckpointDamaged(
                f"{loader.where}: {as_name(record.name, 200)} has {record.size} bytes, data.pkl says {storage.nbytes}."
            )
        offsets[key] = 0 if is_deflated else record.offset
        if is_deflated:
            loader.packed[key] = record.name
    return offsets


def _least_size(file: BinaryIO, size: int, where: str) -> str:
    """Describe how large a file without directory must have been: data.pkl, which comes first, shows its tensors."""
    loader = TensorLoader(where)
    try:
        name, begin = read_head(file, 0, where)
        if not name.endswith(b"/data.pkl"):
            return ""
        loader.read(read_at(file, begin, min(max(size - begin, 0), LARGEST_PICKLE), where))
    except CheckpointError:  # cut off within data.pkl: nothing more is known
        return ""
    return loader.needs_more(size - begin)
