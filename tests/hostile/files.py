"""Hostile files and folders: lying zips, bombs, paths that lead out, impossible shapes, endless names."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hostile.assemble import (
    FOUR,
    METADATA,
    RUN,
    SYSTEM,
    Record,
    blocks,
    call,
    entry,
    index,
    items,
    metadata,
    name,
    number,
    numbers,
    place,
    record,
    safetensors,
    storage,
    tensor,
    text,
    torch_records,
    torch_stream,
    torch_zip,
    zipped,
)


@dataclass(frozen=True)
class Case:
    """A hostile checkpoint: how it is written, and what is said of it."""

    write: Callable[[Path], Path]  # into an empty folder; returns what to open
    refused: str = ""  # in the message, where it is refused
    reported: str = ""  # in a finding or a note, where it opens


def file(data: bytes, called: str = "x.pt") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / called).write_bytes(data)
        return folder / called

    return write


def folder_of(files: dict[str, bytes | str], links: dict[str, str] | None = None) -> Callable[[Path], Path]:
    """Files by name within a folder (texts are written as UTF-8), and links by name and target."""

    def write(folder: Path) -> Path:
        for where, data in files.items():
            (folder / where).parent.mkdir(parents=True, exist_ok=True)
            (folder / where).write_bytes(data if isinstance(data, bytes) else data.encode())
        for where, target in (links or {}).items():
            (folder / where).symlink_to(target)
        return folder

    return write


WEIGHTS = {"0": FOUR}
SOUND = items(w=tensor()) + b"."
SOUND_ZIP = torch_zip(SOUND, WEIGHTS)
SOUND_TENSORS = safetensors({"w": entry([2, 2], 0, 16)}, FOUR)


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
    "data before the zip": Case(file(b"#!/bin/sh\ntouch executed\n" + SOUND_ZIP), refused="no torch zip file"),
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
    "compressed weights": Case(file(changed(2, stored=False, data=bytes(16))), refused="data.pkl says 16"),
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
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("x/../../evil", b"x")])), reported="../../evil"
    ),
    "a record named by an escape sequence": Case(
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("x/\x1b[2J\n", b"x")])), reported="\\u001b[2J\\n"
    ),
    "a record named by no UTF-8": Case(
        file(zipped([*torch_records(SOUND, WEIGHTS), Record("x/\udcff", b"x")])), refused="is no UTF-8"
    ),
    "a second pickle behind the first": Case(file(torch_zip(SOUND + RUN + b".", WEIGHTS)), reported="behind"),
    "a wrong checksum of data.pkl": Case(file(changed(0, crc=1)), refused="data.pkl is damaged"),
    "big endian": Case(
        file(zipped([torch_records(SOUND)[0], Record("x/byteorder", b"big"), *torch_records(SOUND)[2:]])),
        refused="big-endian",
    ),
}


def of_tensor(**fields: Any) -> Callable[[Path], Path]:
    return file(torch_zip(items(w=tensor(**fields)) + b".", WEIGHTS))


def nested(depth: int, around: bytes = b"\x85", inside: bytes = b"N") -> bytes:
    return inside + around * depth + b"."


def doubled(times: int, leaf: bytes = b"N") -> bytes:
    """A list of twice the list before it, and so on: 2**times leaves."""
    return leaf + b"q\x000" + b"(h\x00h\x00lq\x000" * times + b"h\x00."


def clashing(seed: int) -> bytes:
    """A pair of numbers whose hash as a tuple is the same for every seed, and a value.

    Tuples of numbers hash alike in every process (xxHash without a key), so the second number can be solved for.
    """
    first, second, last = 11400714785074694791, 14029467366897019727, 2870177450012600261
    a = 1000 * seed
    while True:  # one in sixteen is short enough
        lane = (last + a * second) % WORD
        b = (0xBEEF - (lane << 31 | lane >> 33) % WORD * first) * _INVERSE % WORD
        if b < 1 << 60:
            return number(a) + number(b) + b"\x86N"
        a += 1


WORD = 1 << 64
_INVERSE = pow(14029467366897019727, -1, WORD)


ORDERED = name("collections", "OrderedDict")
STATE = ORDERED + b")R"

TENSORS = {
    "a tensor beyond its storage": Case(of_tensor(shape=(2, 3), strides=(3, 1)), refused="ends at byte 24"),
    "an offset beyond the storage": Case(of_tensor(offset=1), refused="ends at byte 20"),
    "an offset of 2**62": Case(of_tensor(offset=1 << 62), refused="ends at byte"),
    "a negative offset": Case(of_tensor(offset=-1), refused="all whole numbers from 0"),
    "a negative shape": Case(of_tensor(shape=(-2, 2)), refused="all whole numbers from 0"),
    "a shape of 2**63": Case(of_tensor(shape=(1 << 63, 1), strides=(0, 0)), refused="all whole numbers from 0"),
    "a shape whose product is 2**64": Case(of_tensor(shape=(1 << 32, 1 << 32), strides=(0, 0)), refused="ends at byte"),
    "an empty shape of 2**62": Case(of_tensor(shape=(0, 1 << 62), strides=(1 << 62, 1)), reported=""),
    "negative strides": Case(of_tensor(strides=(-2, 1)), refused="all whole numbers from 0"),
    "strides beyond the storage": Case(of_tensor(strides=(1 << 40, 1)), refused="ends at byte"),
    "strides of 2**63 - 1": Case(of_tensor(strides=((1 << 63) - 1,) * 2), refused="ends at byte"),
    "fewer strides than sizes": Case(of_tensor(strides=(1,)), refused="as many strides as sizes"),
    "65 dimensions": Case(of_tensor(shape=(1,) * 65, strides=(1,) * 65), refused="ends at|expected as many strides"),
    "10,000 dimensions": Case(of_tensor(shape=(1,) * 10_000, strides=(1,) * 10_000), refused="expected as many"),
    "a storage larger than its record": Case(of_tensor(numel=1 << 40), refused="has 16 bytes, data.pkl says"),
    "a storage of negative size": Case(of_tensor(numel=-4), refused="malformed reference"),
    "a storage of 2**70 elements": Case(of_tensor(numel=1 << 70), refused="malformed reference"),
    "a storage that is not there": Case(of_tensor(key="1"), refused="data/1 is missing"),
    "a storage whose name leads out": Case(of_tensor(key="../data.pkl"), refused="is missing"),
    "a storage with an endless name": Case(of_tensor(key="k" * 100_000), refused="is missing"),
    "one storage of two sizes": Case(
        file(torch_zip(items(a=tensor(), b=tensor(numel=2, shape=(2,), strides=(1,))) + b".", WEIGHTS)),
        refused="both 16 and 8 bytes",
    ),
    "a tensor whose storage is a call": Case(
        file(torch_zip(call("torch._utils", "_rebuild_tensor_v2", RUN, *[b"N"] * 5) + b".")), reported="posix.system"
    ),
    "a tensor whose location is a call": Case(
        file(torch_zip(items(w=tensor().replace(text("cpu"), RUN)) + b".", WEIGHTS)), reported="posix.system"
    ),
    "a tensor with a hook that is a call": Case(of_tensor(hooks=RUN), reported="posix.system"),
    "a parameter around a call": Case(
        file(torch_zip(call("torch._utils", "_rebuild_parameter", RUN, b"\x88", STATE) + b".")), reported="posix.system"
    ),
    "a parameter with a state that is a call": Case(
        file(
            torch_zip(
                call("torch._utils", "_rebuild_parameter_with_state", tensor(), b"\x88", STATE, RUN) + b".", WEIGHTS
            )
        ),
        reported="posix.system",
    ),
    "a tensor of a class that is a function": Case(
        file(
            torch_zip(
                call(
                    *("torch._tensor", "_rebuild_from_type_v2"),
                    *(SYSTEM, name("torch", "Tensor"), text("x") + b"\x85", b"}"),
                )
                + b"."
            )
        ),
        reported="_rebuild_from_type_v2(posix.system",
    ),
    "a storage that runs and is dropped": Case(
        file(torch_zip(storage("0", 4) + items(append=SYSTEM) + b"b" + text("touch executed") + b"a0N.", WEIGHTS)),
        reported="posix.system",
    ),
    "a storage of an unknown class": Case(
        file(torch_zip(storage("0", 4, "EvilStorage") + b".", WEIGHTS)), reported="torch.EvilStorage"
    ),
    "a reference of six parts": Case(
        file(torch_zip(b"(" + text("storage") + b"NNNNNtQ.")), refused="expected one to a storage"
    ),
}

LISTS = {
    "nested 190 deep": Case(file(torch_zip(nested(190))), reported=""),
    "nested 1,000 deep": Case(file(torch_zip(nested(1000))), refused="nested deeper than 200 levels"),
    "nested 100,000 deep": Case(file(torch_zip(nested(100_000))), refused="nested deeper than 200 levels"),
    "50,000 calls in calls": Case(
        file(torch_zip(name("a", "f") + b"q\x000" + nested(50_000, b"q\x010h\x00h\x01\x85R"))),
        refused="nested deeper than 200 levels",
    ),
    "100,000 marks": Case(file(torch_zip(b"(" * 100_000 + b"N.")), reported=""),
    "12,000 keys of one hash": Case(
        file(torch_zip(b"}(" + b"".join(map(clashing, range(12_000))) + b"u.")), reported=""
    ),
    "2**60 values": Case(file(torch_zip(doubled(60))), refused="unfolds to over"),
    "2**15 values in 200 bytes": Case(file(torch_zip(doubled(15))), reported=""),
    "2**14 tensors with names of 900 wide characters": Case(
        file(torch_zip(b"}" + text("\U0001f600" * 900) + doubled(14, tensor())[:-1] + b"s.", WEIGHTS)), reported=""
    ),
    "2**60 tensors": Case(file(torch_zip(doubled(60, tensor()), WEIGHTS)), refused="unfolds to over"),
    "200,000 values behind a key of 200,000 characters": Case(
        file(torch_zip(b"}" + text("k" * 200_000) + b"(" + b"N" * 200_000 + b"ls.")), reported=""
    ),
    "a list in itself": Case(file(torch_zip(b"]q\x00h\x00a.")), refused="contains itself"),
    "a dictionary in itself": Case(file(torch_zip(b"}q\x00K\x01h\x00s.")), refused="contains itself"),
    "a call in its own state": Case(file(torch_zip(b"cx\nC\n)Rq\x00h\x00b.")), refused="contains itself"),
    "a tuple as a key, 2**60 parts": Case(
        file(torch_zip(b"Nq\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"0}h\x00Ns.")), refused="unfolds to over"
    ),
    "a text of 2**63 bytes": Case(file(torch_zip(b"\x8d" + b"\xff" * 8 + b".")), refused="bytes are asked for"),
    "bytes of 4 GB": Case(file(torch_zip(b"B\xff\xff\xff\xff.")), refused="bytes are asked for"),
    "a number of 2 GB": Case(file(torch_zip(b"\x8b\xff\xff\xff\x7f.")), refused="1024 are allowed"),
    "a number of 10,000 digits": Case(file(torch_zip(b"L" + b"9" * 10_000 + b"L\n.")), refused="1024 are allowed"),
    "memo 2**31": Case(file(torch_zip(b"Nr\xff\xff\xff\x7fj\xff\xff\xff\x7f0.")), reported=""),
    "a name of 100,000 characters": Case(file(torch_zip(name("a" * 100_000, "f") + b".")), refused="no short text"),
    "a tensor with an endless name": Case(
        file(torch_zip(b"}" + text("k" * 5000) + tensor() + b"s.", WEIGHTS)), refused="endless name"
    ),
    "a tensor named by an escape sequence": Case(
        file(torch_zip(b"}" + text("\x1b[2J\n\r") + tensor() + b"s.", WEIGHTS)), reported=""
    ),
    "a tensor named by half a character": Case(
        file(torch_zip(b"}" + text("\ud800") + tensor() + b"s.", WEIGHTS)), reported=""
    ),
    "two tensors of one name": Case(
        file(torch_zip(b"}(" + text("a.b") + tensor() + text("a") + items(b=tensor()) + b"u.", WEIGHTS)),
        refused="two tensors are called",
    ),
    "copies of a shared list in calls": Case(
        file(
            torch_zip(b"](" + b"K\x01" * 5000 + b"eq\x000" + ORDERED + b"q\x010" + b"h\x01h\x00\x85R0" * 2000 + b"N.")
        ),
        refused="copy more than the file holds",
    ),
    "an empty pickle": Case(file(torch_zip(b"")), refused="it ends without STOP"),
    "a stream with an endless pickle": Case(file(torch_stream(b"(" * 5000, b"")), refused="does not end"),
    "a stream whose storages share a key": Case(
        file(torch_stream(b"N.", b"](" + text("0") * 2 + b"e.")), refused="names one of them twice"
    ),
    "a stream with bytes behind": Case(file(torch_stream(b"N.", tail=RUN + b".")), refused="belong to nothing"),
}


def tensors_file(header: Any, data: bytes = FOUR, length: int | None = None) -> Callable[[Path], Path]:
    return file(safetensors(header, data, length), "x.safetensors")


def of_entry(*args: Any) -> Callable[[Path], Path]:
    return tensors_file({"w": entry(*args)})


SAFETENSORS = {
    "a header of 2**63 bytes": Case(tensors_file({}, length=1 << 63), refused="claims 9223372036854775808 bytes"),
    "a header longer than the file": Case(tensors_file({}, length=10_000), refused="its header ends at byte 10008"),
    "a header of nothing": Case(tensors_file(b""), refused="its header begins with"),
    "a header nested 100,000 deep": Case(tensors_file(b'{"a":' + b"[" * 100_000), refused="no valid JSON"),
    "a header nested 900 deep": Case(tensors_file(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), refused="expected dtype"),
    "a number of 5,000 digits in the header": Case(
        tensors_file(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'),
        refused="no valid JSON",
    ),
    "one name twice": Case(
        tensors_file(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"w":{}}'), refused="occurs 2 times"
    ),
    "a negative size": Case(of_entry([-2, -2], 0, 16), refused="whole numbers from 0"),
    "a size of 2**62": Case(of_entry([1 << 62], 0, 16), refused="has 16 bytes"),
    "a product of 2**64": Case(of_entry([1 << 32, 1 << 32], 0, 16), refused="has 16 bytes"),
    "an empty shape of 2**120": Case(of_entry([0, 1 << 60, 1 << 60], 0, 0), refused="has 0 bytes"),
    "sizes that are texts": Case(of_entry(["2", "2"], 0, 16), refused="whole numbers from 0"),
    "sizes that are true": Case(of_entry([True, 4], 0, 16), refused="whole numbers from 0"),
    "sizes that are fractions": Case(of_entry([2.0, 2.0], 0, 16), refused="whole numbers from 0"),
    "10,000 sizes": Case(of_entry([1] * 10_000, 0, 16), refused="at most 64"),
    "offsets in the wrong order": Case(of_entry([2, 2], 16, 0), refused="the smaller one first"),
    "negative offsets": Case(of_entry([2, 2], -16, 0), refused="whole numbers from 0"),
    "offsets beyond the file": Case(of_entry([2, 2], 1 << 40, (1 << 40) + 16), refused="ends at byte"),
    "tensors that overlap": Case(
        tensors_file({"a": entry([2], 0, 8), "b": entry([2], 4, 12), "c": entry([1], 12, 16)}), refused="begins at"
    ),
    "bytes behind the tensors": Case(
        tensors_file({"w": entry([2, 2], 0, 16)}, FOUR + RUN), refused="belong to nothing"
    ),
    "bytes between the tensors": Case(
        tensors_file({"a": entry([1], 0, 4), "b": entry([1], 12, 16)}), refused="begins at"
    ),
    "an unknown dtype": Case(of_entry([2, 2], 0, 16, "PICKLE"), refused="has dtype"),
    "a dtype that is a list": Case(of_entry([2, 2], 0, 16, ["F32"]), refused="has dtype"),
    "a pickle in the metadata": Case(
        tensors_file({"__metadata__": {"x": RUN.decode("latin1")}, "w": entry([2, 2], 0, 16)}), reported=""
    ),
    "metadata that is no text": Case(
        tensors_file({"__metadata__": {"x": {"y": 1}}, "w": entry([2, 2], 0, 16)}), refused="expected texts"
    ),
    "an endless name in safetensors": Case(tensors_file({"w" * 100_000: entry([2, 2], 0, 16)}), refused="is no name"),
    "an escape sequence as a name": Case(tensors_file({"\x1b[2J\n": entry([2, 2], 0, 16)}), reported=""),
    "half a character as a name": Case(tensors_file(b'{"\\ud800":{}}'), refused="is no name"),
    "10,000 empty tensors": Case(
        tensors_file({f"w{i}": entry([0], 0, 0) for i in range(10_000)} | {"w": entry([4], 0, 16)}), reported=""
    ),
}


def hf_index(weight_map: Any, **files: bytes) -> dict[str, bytes | str]:
    """An index and the files beside it."""
    text_of = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    return {"model.safetensors.index.json": text_of, "a.safetensors": SOUND_TENSORS, **files}


OUT = "../outside.safetensors"


def beside(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """A folder with a sound checkpoint of somebody else beside it."""

    def both(folder: Path) -> Path:
        (folder / "own").mkdir()
        (folder / "outside.safetensors").write_bytes(SOUND_TENSORS)
        (folder / "outside.pt").write_bytes(SOUND_ZIP)
        (folder / "outside").mkdir()
        (folder / "rank").mkdir()
        (folder / "rank" / "model_optim_rng.pt").write_bytes(SOUND_ZIP)
        dcp({"w": blocks((2, 2), [((0, 0), (2, 2))])}, [(index("w", (0, 0)), place("a.distcp", 0, len(ITEM)))])(
            folder / "outside"
        )
        return write(folder / "own")

    return both


def dcp(
    tensors: dict[str, bytes],
    places: Sequence[tuple[bytes, bytes]],
    files: dict[str, bytes] | None = None,
    planner: bytes = b"}",
) -> Callable[[Path], Path]:
    """A DCP folder; by default its items are in one file, a.distcp."""
    return folder_of(
        {".metadata": metadata(tensors, places, planner), **({"a.distcp": ITEM} if files is None else files)}
    )


ITEM = torch_zip(tensor() + b".", WEIGHTS)
WHOLE = {"w": blocks((2, 2), [((0, 0), (2, 2))])}
AT = index("w", (0, 0))


def dcp_at(file_name: str, offset: int = 0, length: int = len(ITEM)) -> Callable[[Path], Path]:
    return dcp(WHOLE, [(AT, place(file_name, offset, length))])


def dcp_of(shape: Sequence[int], *boxes: tuple[Sequence[int], Sequence[int]]) -> Callable[[Path], Path]:
    """A tensor in these blocks, whose items are all the same one."""
    places = [(index("w", begin), place("a.distcp", i * len(ITEM), len(ITEM))) for i, (begin, _) in enumerate(boxes)]
    return dcp({"w": blocks(shape, boxes)}, places, {"a.distcp": ITEM * len(boxes)})


FOLDERS = {
    "an index that names a file out of the folder": Case(
        beside(folder_of(hf_index({"w": OUT}))), refused="expected one within its folder"
    ),
    "an index that names an absolute path": Case(
        folder_of(hf_index({"w": "/etc/passwd"})), refused="expected one within its folder"
    ),
    "an index that names a path with a stop in it": Case(
        folder_of(hf_index({"w": "./a.safetensors"})), refused="expected one within its folder"
    ),
    "an index that names a NUL": Case(folder_of(hf_index({"w": "a\0b"})), refused="expected one within its folder"),
    "an index that names half a character": Case(
        folder_of(hf_index('{"weight_map":{"w":"\\ud800"}}')), refused="expected one within its folder"
    ),
    "an index that names itself": Case(
        folder_of(hf_index({"w": "model.safetensors.index.json"})), refused="no torch zip file|magic|text"
    ),
    "an index that names a folder": Case(
        folder_of(hf_index({"w": "sub"}) | {"sub/x": b""}), refused="a folder, expected a file"
    ),
    "an index that names an endless file": Case(folder_of(hf_index({"w": "x" * 5000})), refused="not there"),
    "an index of 20,000 files": Case(
        folder_of(hf_index({f"w{i}": f"{i}.safetensors" for i in range(20_000)})), refused="20000 not there"
    ),
    "an index that names one tensor twice": Case(
        folder_of(hf_index('{"weight_map":{"w":"a.safetensors","w":"b"}}')), refused="occurs 2 times"
    ),
    "an index that is a list": Case(folder_of(hf_index("[]")), refused="found a JSON list"),
    "an index with numbers for files": Case(folder_of(hf_index({"w": 7})), refused="expected a file's name"),
    "an index nested 100,000 deep": Case(folder_of(hf_index("[" * 100_000)), refused="no valid JSON"),
    "an index that promises what is not there": Case(
        folder_of(hf_index({"w": "a.safetensors", "x": "a.safetensors"})), refused="hold 1 of them"
    ),
    "a tensor in two files": Case(
        folder_of(hf_index({"w": "a.safetensors", "x": "b.safetensors"}) | {"b.safetensors": SOUND_TENSORS}),
        refused="is in a.safetensors and in b.safetensors",
    ),
    "a file of 99,999 by its name": Case(
        folder_of({"model-00001-of-99999.safetensors": SOUND_TENSORS}), refused="99998 not there"
    ),
    "a link out of a Hugging Face folder": Case(
        beside(folder_of({"config.json": "{}"}, {"model.safetensors": OUT})), refused="a link that leads out"
    ),
    "a shard that is a link out of the folder": Case(
        beside(folder_of(hf_index({"w": "b.safetensors"}), {"b.safetensors": OUT})), refused="a link that leads out"
    ),
    "a link in a circle": Case(
        folder_of(hf_index({"w": "b.safetensors"}), {"b.safetensors": "b.safetensors"}), refused="cannot be opened"
    ),
    "a config that is a link out of the folder": Case(
        beside(folder_of({"model.safetensors": SOUND_TENSORS}, {"config.json": "../outside.pt"})),
        refused="a link that leads out",
    ),
    "the only checkpoint is a link out of the folder": Case(
        beside(folder_of({}, {"x.pt": "../outside.pt"})), refused="a link that leads out"
    ),
    "a part of a step that is a link out of the folder": Case(
        beside(folder_of({}, {"model_sharded": "../outside"})), refused="a link that leads out"
    ),
    "a rank file that is a link out of the folder": Case(
        beside(folder_of({}, {"model_rank00000.pt": "../outside.pt"})), refused="a link that leads out"
    ),
    "an iteration that is a link out of the folder": Case(
        beside(folder_of({}, {"iter_0000001": "../outside"})), refused="a link that leads out"
    ),
    "a rank's folder that is a link out of the folder": Case(
        beside(folder_of({}, {"mp_rank_00": "../rank"})), refused="a link that leads out"
    ),
    "a tracker that names a path": Case(
        folder_of({"latest_checkpointed_iteration.txt": "../../x"}), refused="expected the number of an iteration"
    ),
    "a tracker of 10**30": Case(
        folder_of({"latest_checkpointed_iteration.txt": "1" + "0" * 30}), refused="expected the number of an iteration"
    ),
    "a file called by an escape sequence": Case(folder_of({"\x1b[2J.pt": SOUND_ZIP[:50]}), refused="cut off"),
    "ranks 0 and 99,999": Case(
        folder_of({"model_rank00000.pt": SOUND_ZIP, "model_rank99999.pt": SOUND_ZIP}), reported="2 of 100000 ranks"
    ),
}

DCP = {
    "a path out of the folder in .metadata": Case(beside(dcp_at("../outside/a.distcp")), refused="within its folder"),
    "an absolute path in .metadata": Case(dcp_at("/etc/passwd"), refused="expected one within its folder"),
    "an item beyond its file": Case(dcp_at("a.distcp", 10_000), refused="ends at byte"),
    "an item of 2**62 bytes": Case(dcp_at("a.distcp", 0, 1 << 62), refused="ends at byte 4611686018427387904"),
    "an item at 2**62": Case(dcp_at("a.distcp", 1 << 62), refused="ends at byte"),
    "an item at a negative offset": Case(dcp_at("a.distcp", -1), refused="all whole numbers from 0"),
    "an item of no bytes": Case(dcp_at("a.distcp", 0, 0), refused="empty"),
    "an item that is cut": Case(dcp_at("a.distcp", 0, len(ITEM) - 1), refused="cut off|ends at"),
    "items that overlap": Case(
        dcp(
            {"v": blocks((2, 2), [((0, 0), (2, 2))]), **WHOLE},
            [(AT, place("a.distcp", 0, len(ITEM))), (index("v", (0, 0)), place("a.distcp", 0, len(ITEM)))],
        ),
        refused="the item before it ends at",
    ),
    "an item that belongs to nothing": Case(
        dcp(WHOLE, [(AT, place("a.distcp", 0, len(ITEM)))], {"a.distcp": ITEM + torch_zip(RUN + b".")}),
        reported="belong to no item",
    ),
    "a negative shape in .metadata": Case(dcp_of((-2, 2), ((0, 0), (2, 2))), refused="has the shape"),
    "a shape of 2**60 in .metadata": Case(dcp_of((1 << 60, 2), ((0, 0), (2, 2))), refused="has the shape|elements"),
    "blocks that overlap": Case(dcp_of((2, 2), ((0, 0), (2, 2)), ((0, 1), (2, 1))), refused="some are there twice"),
    "blocks that leave gaps": Case(dcp_of((4, 2), ((0, 0), (2, 2))), refused="some are missing"),
    "a block beyond the shape": Case(dcp_of((2, 2), ((1, 0), (2, 2))), refused="reaches beyond the shape"),
    "blocks of 2**62": Case(dcp_of((2, 2), ((0, 0), (1 << 62, 1 << 62))), refused="reaches beyond the shape"),
    "a block of another shape than its item": Case(dcp_of((4, 1), ((0, 0), (4, 1))), refused=r"is float32 \(2, 2\)"),
    "a block stored twice": Case(
        dcp(WHOLE, [(AT, place("a.distcp", 0, 9)), (AT, place("a", 0, 9))]), refused="stored twice"
    ),
    "a tensor that is stored nowhere": Case(dcp(WHOLE, []), refused="is nowhere in storage_data"),
    "storage that is no dictionary": Case(
        folder_of({".metadata": record(METADATA, "Metadata", state_dict_metadata=b"}", storage_data=RUN) + b"."}),
        refused="Another storage than files",
    ),
    "a path in the state dict 10,000 deep": Case(
        dcp(WHOLE, [(AT, place("a.distcp", 0, len(ITEM)))], planner=items(w=b"(" + text("k") * 10_000 + b"t")),
        reported="",
    ),
    "two items at one place in the state dict": Case(
        dcp(
            {"v": blocks((2, 2), [((0, 0), (2, 2))]), **WHOLE},
            [(AT, place("a.distcp", 0, len(ITEM))), (index("v", (0, 0)), place("a.distcp", len(ITEM), len(ITEM)))],
            {"a.distcp": ITEM * 2},
            items(v=text("k") + b"\x85", w=text("k") + b"\x85"),
        ),
        refused="where something else is",
    ),
    "a link out of a DCP folder": Case(
        beside(
            folder_of(
                {".metadata": metadata(WHOLE, [(AT, place("a.distcp", 0, len(ITEM)))])},
                {"a.distcp": "../outside/a.distcp"},
            )
        ),
        refused="a link that leads out",
    ),
    ".metadata that is a link out of the folder": Case(
        beside(folder_of({"a.distcp": ITEM}, {".metadata": "../outside/.metadata"})), refused="a link that leads out"
    ),
    "a second pickle behind .metadata": Case(
        folder_of(
            {
                ".metadata": metadata(WHOLE, [(AT, place("a.distcp", 0, len(ITEM)))]) + RUN + b".",
                "a.distcp": ITEM,
            }
        ),
        reported="behind",
    ),
}


def rank_file(placements: bytes, sizes: bytes, at: bytes, times: bytes = b"") -> Callable[[Path], Path]:
    """A rank's file with a DTensor of this mesh."""
    home = "torch.distributed.tensor"
    layout = record("torch.distributed._mesh_layout", "_MeshLayout", shape=sizes)
    mesh = record("torch.distributed.device_mesh", "DeviceMesh", _layout=layout, _coordinate_on_dim=at)
    spec = record(f"{home}._dtensor_spec", "DTensorSpec", mesh=mesh, placements=placements)
    kind = name(home, "DTensor")
    args = b"(" + kind + name("torch", "float32") + numbers((2, 2)) + b"t"
    state = items(_local_tensor=tensor(), _spec=spec)
    value = call(
        "torch._tensor", "_rebuild_from_type_v2", name("torch._utils", "_rebuild_wrapper_subclass"), kind, args, state
    )
    data = torch_zip(value + times + b".", WEIGHTS)
    return folder_of({"model_rank00000.pt": data})


REPLICATE = record("torch.distributed.tensor.placement_types", "Replicate")
SHARD = record("torch.distributed.tensor.placement_types", "Shard", dim=b"K\x00")


def repeated(value: bytes, times: int) -> bytes:
    """A tuple of one value many times."""
    return b"(" + value + b"q\x05" + b"h\x05" * (times - 1) + b"t"


RANKS = {
    "a mesh of 2**62 ranks": Case(
        rank_file(REPLICATE + b"\x85", numbers((1 << 62,)), numbers((0,))), refused="of ranks"
    ),
    "a mesh of 20,000 dimensions": Case(
        rank_file(repeated(SHARD, 20_000), repeated(b"K\x01", 20_000), repeated(b"K\x00", 20_000)), refused="of a mesh"
    ),
    "a mesh of 2**62 times 20,000": Case(
        rank_file(repeated(SHARD, 20_000), repeated(number(1 << 62), 20_000), repeated(b"K\x00", 20_000)),
        refused="of a mesh",
    ),
    "a rank outside of its mesh": Case(rank_file(SHARD + b"\x85", numbers((2,)), numbers((2,))), refused="of ranks"),
    "a cut along a dimension that is not there": Case(
        rank_file(SHARD.replace(b"K\x00", b"K\x07") + b"\x85", numbers((2,)), numbers((0,))), refused="is cut along 7"
    ),
    "one DTensor 2**6 times": Case(
        rank_file(REPLICATE + b"\x85", numbers((1,)), numbers((0,)), b"q\x090" + b"(h\x09h\x09lq\x090" * 6 + b"h\x09"),
        reported="",
    ),
}

CASES = {**ZIPS, **TENSORS, **LISTS, **SAFETENSORS, **FOLDERS, **DCP, **RANKS}
