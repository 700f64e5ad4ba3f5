"""Read the contents of a `.pt` zip from its directory and `data.pkl` alone: no torch, no weights, nothing executed.

The zip is PKWARE's APPNOTE 4.3 with its 64-bit extension; the records of a torch file are described in the
documentation of torch.serialization and in the docstring of `core/containers/torch_files/layout.py`.
"""

from __future__ import annotations

import zlib
from typing import BinaryIO

from ...console.words import listed_names
from ...errors import CheckpointDamaged, CheckpointError
from ..blocks import read_at
from ..pickles.inert import as_name, as_text
from .storages import LARGEST_PICKLE, TensorLoader, TorchArchive, name_tensors
from .zip_directory import Record, read_directory, read_head


def open_torch_zip(file: BinaryIO, where: str) -> TorchArchive:
    """Read the directory and data.pkl of a torch file; `where` is its path, for messages.

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
    loader = TensorLoader(where)
    order = _read(file, records, "byteorder", where) if "byteorder" in records else b"little"
    if order == b"big":
        raise loader.refuse_big_endian()
    if order != b"little":
        raise CheckpointDamaged(f"{where}: its byteorder is {as_text(order)}, expected little or big.")
    data = _read(file, records, "data.pkl", where)
    parsed = loader.read(data)
    loader.place(_storage_offsets(loader, records))
    odd = _odd(records, loader, loose, len(data) - parsed.end)
    return TorchArchive("zip", where, parsed.value, name_tensors(parsed.value, where), parsed.unused, records, odd)


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


def _read(file: BinaryIO, records: dict[str, Record], name: str, where: str) -> bytes:
    """Read a record that is not a tensor, and check its bytes if the directory has their checksum."""
    record = records[name]
    if not record.stored:
        raise CheckpointDamaged(
            f"{where}: {record.name} is compressed; torch stores it plainly. Unpack and save again."
        )
    if record.size > LARGEST_PICKLE:
        raise CheckpointDamaged(f"{where}: {record.name} has {record.size} bytes, at most {LARGEST_PICKLE} are read.")
    data = read_at(file, record.offset, record.size, where)
    if record.crc32 and (found := zlib.crc32(data)) != record.crc32:
        raise CheckpointDamaged(f"{where}: {name} is damaged (CRC32 {found:08x}, recorded {record.crc32:08x}).")
    return data


def _storage_offsets(loader: TensorLoader, records: dict[str, Record]) -> dict[str, int]:
    """The offset of each storage in the file, after its record's size is compared with data.pkl."""
    offsets = {}
    for key, storage in loader.storages.items():
        record = records.get(f"data/{key}")
        if record is None:
            raise CheckpointDamaged(f"{loader.where}: {loader.shown(key)} is missing, its tensors cannot be read.")
        if record.size != storage.nbytes or not record.stored:
            raise CheckpointDamaged(
                f"{loader.where}: {as_name(record.name, 200)} has {record.size} bytes, data.pkl says {storage.nbytes}."
            )
        offsets[key] = record.offset
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
