"""Zips that lie, bombs, and files that are two things at once."""

from __future__ import annotations

import struct
from typing import Any

from tests.hostile.assemble import (
    RUN,
    Record,
    torch_records,
    torch_stream,
    torch_zip,
    zipped,
)
from tests.hostile.case import SOUND, SOUND_ZIP, WEIGHTS, Case, file


def zip64_end(count: int, length: int, start: int, at: int) -> bytes:
    """The 64-bit end of a directory, and its locator."""
    end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    return end + struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)


NO_END = struct.pack("<4sHHHHIIH", b"PK\5\6", *[0] * 7)


def changed(which: int, **fields: Any) -> bytes:
    """A sound zip but for one record."""
    records = torch_records(SOUND, WEIGHTS)
    for key, value in fields.items():
        setattr(records[which], key, value)
    return zipped(records)


def two_directories() -> bytes:
    """Two whole zips end to end, each of which some readers see; the offsets of the second count from the beginning."""
    first = torch_zip(RUN + b".")
    return zipped(torch_records(SOUND, WEIGHTS), prefix=first)


def in_comment() -> bytes:
    """A second zip in the comment of the first: readers that search from the end find another directory."""
    inner = torch_zip(RUN + b".")
    outer = torch_zip(SOUND, WEIGHTS)
    return outer[:-2] + struct.pack("<H", len(inner)) + inner


def of_wide_field(kind: str) -> bytes:
    """A record whose 64-bit fields lie."""
    wide = struct.pack("<HHQ", 1, 8, {"offset": 1 << 62, "size": 1 << 62, "negative": (1 << 64) - 1}[kind])
    records = torch_records(SOUND, WEIGHTS)
    records[2].extra = wide
    if kind == "offset":
        records[2].offset = 0xFFFFFFFF
    else:
        records[2].size = records[2].packed = 0xFFFFFFFF
        records[2].extra = struct.pack("<HHQQ", 1, 16, *struct.unpack("<4xQ", wide) * 2)
    return zipped(records)


def in_pickle() -> bytes:
    """A stream of torch that is also a zip: its trailing bytes are a directory."""
    return torch_stream(b"N.", tail=torch_zip(RUN + b"."))


def bomb() -> bytes:
    return zipped(torch_records(bytes(50_000_000) + b".", stored=False))


ZIPS = {
    "data before the zip": Case(file(b"#!/bin/sh\ntouch executed\n" + SOUND_ZIP), refused="not a torch zip file"),
    "data before the zip that begins as one": Case(
        file(b"PK\3\4" + bytes(60) + SOUND_ZIP), refused="in its directory is damaged"
    ),
    "data behind the zip": Case(file(SOUND_ZIP + b"#!/bin/sh\n" * 9), reported="belong to no record"),
    "two directories": Case(file(two_directories()), reported="belong to no record"),
    "a zip in the comment": Case(file(in_comment()), refused="in its directory is damaged"),
    "a zip that is a pickle": Case(file(in_pickle()), refused="belong to nothing"),
    "a pickle that is a zip": Case(
        file(zipped(torch_records(SOUND, WEIGHTS), prefix=b"\x80\x02" + RUN + b".")), refused="without the magic number"
    ),
    "a record between the others that the directory lacks": Case(
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("x/data/1", RUN, hidden=True)])),
        reported="belong to no record",
    ),
    "bytes between records": Case(file(changed(2, gap=RUN * 20)), reported="belong to no record"),
    "bytes before the directory": Case(
        file(zipped(torch_records(SOUND, WEIGHTS), before_directory=RUN * 20)), reported="belong to no record"
    ),
    "another name before the data": Case(file(changed(0, local_name="x/data.pk2")), refused="calls itself"),
    "names that differ in length": Case(file(changed(2, local_name="x/data/00")), refused="calls itself"),
    "two records of one name": Case(
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("x/data.pkl", RUN + b".")])),
        refused="two records are called",
    ),
    "records that share bytes": Case(file(changed(1, offset=0)), refused="begins at byte|calls itself|two records"),
    "records that overlap": Case(file(changed(0, packed=300, size=300)), refused="claims 300 bytes"),
    "a record beyond the file": Case(file(changed(2, offset=1 << 30)), refused="begins at byte 1073741824"),
    "a record longer than the file": Case(file(changed(2, packed=1 << 31, size=1 << 31)), refused="claims 2147483648"),
    "a record of no bytes that claims some": Case(file(changed(2, size=17)), refused="has 16 bytes and claims 17"),
    "a directory beyond the file": Case(file(zipped(torch_records(SOUND), directory=1 << 31)), refused="claims bytes"),
    "a directory that is too long": Case(file(zipped(torch_records(SOUND), length=1 << 31)), refused="claims bytes"),
    "a directory that is too short": Case(
        file(zipped(torch_records(SOUND, WEIGHTS), length=50)), refused="claims bytes"
    ),
    "65535 records in 300 bytes": Case(
        file(zipped(torch_records(SOUND, WEIGHTS), count=65535)), refused="claims bytes"
    ),
    "fewer records than there are": Case(
        file(zipped(torch_records(SOUND, WEIGHTS), count=3)), reported="belong to no record"
    ),
    "zip64 offset of 4 EB": Case(file(of_wide_field("offset")), refused="begins at byte 4611686018427387904"),
    "zip64 size of 4 EB": Case(file(of_wide_field("size")), refused="claims 4611686018427387904"),
    "zip64 size of -1": Case(file(of_wide_field("negative")), refused="claims 18446744073709551615"),
    "zip64 end that counts 2**40 records": Case(
        file(zipped(torch_records(SOUND), before_directory=b"")[:-22] + zip64_end(1 << 40, 46 << 40, 0, 0) + NO_END),
        refused="no 64-bit directory record",
    ),
    "zip64 end at itself": Case(
        file(b"PK\3\4" + zip64_end(1 << 40, 46 << 40, 0, 4) + NO_END),
        refused="1099511627776 records",
    ),
    "an encrypted record": Case(file(changed(0, flags=1)), refused="encrypted"),
    "a bomb: 50 MB of pickle in 50 KB": Case(file(bomb()), refused="compressed"),
    "compressed weights": Case(file(changed(2, stored=False, data=bytes(16))), reported=""),
    "compressed weights of another length": Case(
        file(changed(2, stored=False, data=bytes(17))), refused="data.pkl says 16"
    ),
    "code of TorchScript": Case(
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("x/code/__torch__.py", b"import os")])),
        reported="code/__torch__.py",
    ),
    "a pickle in another record": Case(
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("x/extra.pkl", RUN + b".")])), reported="extra.pkl"
    ),
    "constants.pkl with a call": Case(
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("x/constants.pkl", RUN + b".")])), reported="constants.pkl"
    ),
    "records outside of the folder": Case(
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("../evil", b"x")])), refused="a torch file is one folder"
    ),
    "a record whose name leads out": Case(
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("x/../../evil", b"x")])), refused="leads out of the archive"
    ),
    "a record named by an escape sequence": Case(
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("x/\x1b[2J\n", b"x")])), reported="\\u001b[2J\\n"
    ),
    "a record named by no UTF-8": Case(
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("x/\udcff", b"x")])), refused="is not UTF-8"
    ),
    "a second pickle behind the first": Case(file(torch_zip(SOUND + RUN + b".", WEIGHTS)), reported="behind"),
    "a wrong checksum of data.pkl": Case(file(changed(0, crc=1)), refused="data.pkl is damaged"),
    "big endian": Case(
        file(zipped([torch_records(SOUND)[0], Record("x/byteorder", b"big"), *torch_records(SOUND)[2:]])),
        refused="big-endian",
    ),
}
