"""Torch's reader beside ours: every way in which the two differ, and hundreds of changed files that both may load.

What torch does with each file of the table is tested too, so that a new version of it which reads another way is seen.
"""

from __future__ import annotations

import dataclasses
import random
import re
import struct
import zlib
from collections.abc import Callable

import pytest
import torch

from core.errors import CheckpointDamaged, CheckpointError
from tests.fuzz.mutations import mutate
from tests.fuzz.side_by_side import compare, difference, ours, seeds, torchs
from tests.hostile.assemble import (
    FOUR,
    Record,
    call,
    items,
    name,
    number,
    numbers,
    storage,
    tensor,
    text,
    torch_records,
    torch_stream,
    torch_zip,
    zipped,
)

EVIL = struct.pack("<4f", 5, 6, 7, 8)
WEIGHTS = {"0": FOUR}
SOUND = items(w=tensor()) + b"."
RECORDS = torch_records(SOUND, WEIGHTS)
PLAIN = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def changed(which: int, **fields: object) -> bytes:
    """A sound zip but for one record: 0 is data.pkl, 1 byteorder, 2 data/0, 3 version."""
    return zipped([dataclasses.replace(r, **fields) if i == which else r for i, r in enumerate(RECORDS)])


def renamed(old: str, new: str) -> bytes:
    return zipped([dataclasses.replace(r, name=r.name.replace(old, new)) for r in RECORDS])


def beside(*records: Record, first: bool = False) -> bytes:
    """A sound zip with other records before or behind its own."""
    return zipped([*records, *RECORDS] if first else [*RECORDS, *records])


def two(first: bytes, second: bytes) -> bytes:
    return items(v=first, w=second) + b"."


def wide() -> bytes:
    """A record whose sizes and offset are in the 64-bit field."""
    at = zipped(RECORDS[:2]).index(b"PK\1\2")
    extra = struct.pack("<HHQQQ", 1, 24, 16, 16, at)
    return changed(2, packed=0xFFFFFFFF, size=0xFFFFFFFF, offset=0xFFFFFFFF, extra=extra).replace(
        struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF), struct.pack("<II", 16, 16), 1
    )


def in_comment() -> bytes:
    """Another whole zip as the comment of the first, its offsets true."""
    outer = torch_zip(SOUND, {"0": EVIL})
    inner = zipped(RECORDS, base=len(outer))
    return outer[:-2] + struct.pack("<H", len(inner)) + inner


def view(key: str, first: int, count: int, root: str = "0") -> bytes:
    """A reference of the old format to a part of a storage of eight numbers."""
    part = b"(" + text(key) + number(first) + number(count) + b"t"
    return b"(" + text("storage") + name("torch", "FloatStorage") + text(root) + text("cpu") + number(8) + part + b"tQ"


def whole(key: str = "0", kind: str = "FloatStorage", numel: int = 8) -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(numel) + b"NtQ"


def of(memory: bytes, *, shape: tuple[int, ...] = (2, 2), strides: tuple[int, ...] = (2, 1)) -> bytes:
    """A tensor in a storage that is given."""
    hooks = b"ccollections\nOrderedDict\n)R"
    return call(
        "torch._utils", "_rebuild_tensor_v2", memory, number(0), numbers(shape), numbers(strides), b"\x89", hooks
    )


def stream(pickle: bytes, **storages: bytes) -> bytes:
    """A file of the old format with storages of numbers of four bytes."""
    keys = b"](" + b"".join(text(key[1:]) for key in storages) + b"e."
    tail = b"".join((len(data) // 4).to_bytes(8, "little") + data for data in storages.values())
    return torch_stream(pickle, keys, tail)


PARAMETER = ("torch._utils", "_rebuild_parameter_with_state")
HOOKS = b"ccollections\nOrderedDict\n)R"
BYTES = b"](" + b"".join(b"K" + bytes([b]) for b in EVIL) + b"e"
OTHER_MEMORY = call("torch.storage", "UntypedStorage", BYTES)

OTHER, SAME, REFUSES, ANY = "other values", "the same values", "refuses", "anything"

DIFFERENCES: dict[str, tuple[bytes, str, str]] = {
    # names of records
    "DATA/0 behind data/0": (beside(Record("x/DATA/0", EVIL)), "have one name for torch", ANY),
    "DATA/0 before data/0": (
        zipped([RECORDS[0], Record("x/DATA/0", EVIL), *RECORDS[1:]]),
        'its records "x/D.*/0" and "x/d.*/0" have one|its records "x/d.*/0" and "x/D.*/0" have one',
        ANY,
    ),
    "DATA.PKL behind data.pkl": (
        beside(Record("x/DATA.PKL", items(w=tensor(offset=0, strides=(1, 2))) + b".")),
        "have one name for torch",
        ANY,
    ),
    "only DATA.PKL": (renamed("data.pkl", "DATA.PKL"), "a zip without data.pkl", SAME),
    "only DATA/0": (renamed("data/0", "DATA/0"), "data/0 is missing", SAME),
    "BYTEORDER": (
        zipped([dataclasses.replace(RECORDS[1], name="x/BYTEORDER", data=b"big"), *RECORDS[:1], *RECORDS[2:]]),
        'a record is called "BYTEORDER", which torch, without case, reads as "byteorder"',
        OTHER,
    ),
    ".Format_Version": (beside(Record("x/.Format_Version", b"1")), 'reads as ".format_version"', SAME),
    ".STORAGE_ALIGNMENT": (beside(Record("x/.STORAGE_ALIGNMENT", b"1")), 'reads as ".storage_alignment"', SAME),
    "VERSION": (renamed("version", "VERSION"), 'reads as "version"', SAME),
    "CONSTANTS.PKL": (beside(Record("x/CONSTANTS.PKL", b"N.")), 'reads as "constants.pkl"', SAME),
    "a key with a NUL": (
        torch_zip(items(w=tensor("0\0x")) + b".", {"0": EVIL, "0\0x": FOUR}),
        r"data/0\\u0000x",
        OTHER,
    ),
    "a record with a NUL": (beside(Record("x/data/1\0", b"")), r"which torch reads as \"x/data/1\"", SAME),
    "a folder with a NUL": (renamed("x/", "x\0y/"), "which torch reads as", REFUSES),
    "two records of one name": (beside(Record("x/data/0", EVIL)), "two records are called", ANY),
    "two folders": (beside(Record("y/data/0", EVIL)), "a torch file is one folder", REFUSES),
    "two folders that differ in case": (beside(Record("X/data/0", EVIL)), "a torch file is one folder", REFUSES),
    "another folder first": (beside(Record("y/data/0", EVIL), first=True), "a torch file is one folder", REFUSES),
    "a name that leads out": (beside(Record("x/../evil", b"x")), "leads out of the archive's folder", SAME),
    "a name that leads out, with backslashes": (beside(Record("x/..\\evil", b"x")), "leads out of the", SAME),
    "no folder": (
        zipped([dataclasses.replace(r, name=r.name[2:]) for r in RECORDS]),
        "without data.pkl|one f",
        REFUSES,
    ),
    # what of a record counts
    "another name in front of the bytes": (changed(2, local_name="x/data/1"), "calls itself", SAME),
    "a checksum of data/0 that is wrong": (changed(2, crc=1), "", SAME),  # verification finds it, a load alone does not
    "a checksum of data.pkl that is wrong": (changed(0, crc=1), "data.pkl is damaged", SAME),
    "no checksum of data.pkl": (changed(0, crc=0), "", SAME),
    "a compressed data.pkl": (changed(0, stored=False), "is compressed", SAME),
    "compressed weights": (changed(2, stored=False), "data.pkl says 16", ANY),
    "a record that is a folder": (changed(2, attributes=0x10), '"x/data/0" is a folder with 16 bytes', ANY),
    "an encrypted record": (changed(2, flags=1), "is encrypted", REFUSES),
    "a record shorter than its storage": (
        zipped([*RECORDS[:2], Record("x/data/0", FOUR[:12]), Record("x/more", EVIL)]),
        "has 12 bytes, data.pkl says 16",
        REFUSES,
    ),
    "a record longer than its storage": (
        zipped([*RECORDS[:2], Record("x/data/0", FOUR + EVIL), *RECORDS[3:]]),
        "has 32 bytes, data.pkl says 16",
        ANY,
    ),
    "records that overlap": (changed(0, packed=300, size=300), "claims 300 bytes", SAME),
    "64-bit fields": (wide(), "", SAME),
    "64-bit fields that lie": (
        changed(2, offset=0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 1 << 62)),
        "begins at byte 4611686018427387904",
        REFUSES,
    ),
    # where the directory is
    "another zip in the comment": (in_comment(), "", SAME),
    "bytes behind the zip": (torch_zip(SOUND, WEIGHTS) + b"x" * 99, "", SAME),
    "bytes before the zip": (b"#!/bin/sh\n" + torch_zip(SOUND, WEIGHTS), "not a torch zip file", REFUSES),
    "bytes before the zip, its offsets true": (zipped(RECORDS, prefix=b"#!/bin/sh\n"), "not a torch zip file", REFUSES),
    "PK and a pickle before the zip": (zipped(RECORDS, prefix=b"PK\x80\x02N."), "not a torch zip file", REFUSES),
    "another zip before it": (zipped(RECORDS, prefix=torch_zip(SOUND, {"0": EVIL})), "", SAME),
    "a directory of fewer records": (zipped(RECORDS, count=3), "", REFUSES),
    "an archive of two disks": (
        torch_zip(SOUND, WEIGHTS)[:-18] + b"\1\0\1\0" + torch_zip(SOUND, WEIGHTS)[-14:],
        "its directory of",
        REFUSES,
    ),
    # torch's own records
    "a version of the future": (zipped([*RECORDS[:3], Record("x/version", b"99\n")]), "", REFUSES),
    "no version": (zipped(RECORDS[:3]), "", REFUSES),
    "no byteorder": (zipped([RECORDS[0], *RECORDS[2:]]), "", SAME),
    "big-endian": (changed(1, data=b"big"), "big-endian", OTHER),
    "another byteorder": (changed(1, data=b"middle"), "expected little or big", REFUSES),
    "any serialization_id": (beside(Record("x/.data/serialization_id", b"?")), "", SAME),
    "alignment of 1": (
        beside(Record("x/.format_version", b"1"), Record("x/.storage_alignment", b"1")),
        "",
        SAME,
    ),
    "an alignment that is no number": (beside(Record("x/.storage_alignment", b"?")), "", REFUSES),
    "code of TorchScript": (beside(Record("x/constants.pkl", b"N.")), "", REFUSES),
    # values
    "a storage of two dtypes": (
        torch_zip(two(tensor(), of(storage("0", 4, "IntStorage"))), WEIGHTS),
        "data/0 both the dtype float32 and int32",
        SAME,
    ),
    "a storage of two sizes": (
        torch_zip(two(tensor(), tensor(numel=2, shape=(2,), strides=(1,))), WEIGHTS),
        "both 16 and 8",
        OTHER,
    ),
    "a storage that gets other memory": (
        torch_zip(items(w=of(storage("0", 4) + items(_untyped_storage=OTHER_MEMORY) + b"b")) + b".", WEIGHTS),
        "a state for a Storage",
        OTHER,
    ),
    "a parameter that gets other data": (
        torch_zip(
            items(w=call(*PARAMETER, tensor(), b"\x89", HOOKS, items(data=tensor("1")))) + b".",
            {"0": FOUR, "1": EVIL},
        ),
        "the attribute data, which replaces its values",
        OTHER,
    ),
    "a tensor that gets other data in slots": (
        torch_zip(
            items(
                w=call(
                    *("torch._tensor", "_rebuild_from_type_v2"),
                    name("torch._utils", "_rebuild_tensor_v2"),
                    name("torch", "Tensor"),
                    b"(" + storage("0", 4) + number(0) + numbers((2, 2)) + numbers((2, 1)) + b"\x89" + HOOKS + b"t",
                    b"(N" + items(data=tensor("1")) + b"t",
                )
            )
            + b".",
            {"0": FOUR, "1": EVIL},
        ),
        "the attribute data, which replaces its values",
        OTHER,
    ),
    "a parameter with an attribute": (
        torch_zip(items(w=call(*PARAMETER, tensor(), b"\x89", HOOKS, items(said=text("a")))) + b".", WEIGHTS),
        "",
        SAME,
    ),
    "a tensor that gets other memory": (torch_zip(items(w=tensor() + b"Nb") + b".", WEIGHTS), "a state for a", REFUSES),
    "a set that its constructor did not fill": (
        torch_zip(items(w=tensor(), s=name("__builtin__", "set") + b"](K\1K\2e\x85\x81") + b".", WEIGHTS),
        "",
        SAME,
    ),
    "bytes of a text in the default encoding": (
        torch_zip(items(w=tensor(), b=call("_codecs", "encode", text("\xe9"))) + b".", WEIGHTS),
        "names _codecs.encode",
        SAME,
    ),
    # the format before torch 1.6
    "a stream": (stream(items(w=of(whole("0", numel=4))) + b".", _0=FOUR), "", SAME),
    "a stream with a storage of two dtypes": (
        stream(two(of(whole()), of(whole(kind="IntStorage"))), _0=FOUR + EVIL),
        "storage 0 both the dtype float32 and int32",
        SAME,
    ),
    "a view twice, in two places": (
        stream(two(of(view("9", 4, 4)), of(view("9", 0, 4))), _0=FOUR + EVIL),
        'the view "9" is',
        OTHER,
    ),
    "a view with the name of a storage": (
        stream(two(of(whole("1", numel=4)), of(view("1", 0, 4))), _1=EVIL, _0=FOUR + EVIL),
        "storage 1 is also the name of a view",
        OTHER,
    ),
}
"""By name: a file, what our refusal says ("" where it loads `w` as PLAIN), and what torch makes of `w`.

ANY stands for what is not the same mapped and unmapped, or depends on how torch's reader sorts names.
"""


@pytest.mark.parametrize("which", DIFFERENCES)
def test_a_difference_between_the_readers_is_refused_or_changes_no_value(which, tmp_path):
    data, said, torch_does = DIFFERENCES[which]
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    if said:
        with pytest.raises(CheckpointError, match=said) as caught:
            ours(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    else:
        assert difference(ours(path)["w"], PLAIN) == ""
    found = {theirs(lambda mmap=mmap: torchs(path, mmap)) for mmap in (False, True)}
    found -= {REFUSES} if len(found) > 1 else set()  # torch cannot map a stream
    assert torch_does == ANY or found == {torch_does}
    assert said or OTHER not in found


def theirs(load: Callable[[], dict]) -> str:
    try:
        return SAME if difference(load()["w"], PLAIN) == "" else OTHER
    except Exception:  # whatever the parts of torch raise
        return REFUSES


@pytest.mark.parametrize("other", ["DATA/0", "Data/0", "data/0", "DATA.PKL", "Byteorder"])
@pytest.mark.parametrize("first", [False, True])
def test_names_that_torch_does_not_tell_apart_are_damage_that_names_both(other, first, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(beside(Record(f"x/{other}", EVIL), first=first))
    with pytest.raises(CheckpointDamaged) as caught:
        ours(path)
    assert f'"x/{other}"' in str(caught.value)
    assert other == "data/0" or f'"x/{other.lower()}"' in str(caught.value)


@pytest.mark.parametrize("seed", range(4))
def test_of_a_hundred_changed_files_none_is_loaded_as_something_else(seed, tmp_path):
    examples, verdicts = seeds(), []
    for i in range(100):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(mutate(examples[i % len(examples)], random.Random(f"{seed}/{i}"), examples))
        verdicts.append(compare(path))
    assert [verdict for verdict in verdicts if verdict.startswith("difference")] == []
    assert len(set(verdicts)) > 2


def test_the_comparison_finds_a_difference():
    assert "'w' is" in difference({"w": PLAIN}, {"w": PLAIN.t()})
    assert difference({"a": [1, (2.0,)]}, {"a": [1, (2,)]}) == ".'a'.1.0 is 2.0, and 2"
    assert difference({"a": 1}, {"b": 1}) == "the content has other keys"
    assert difference([1], [1, 2]) and difference({"a": float("nan")}, {"a": float("nan")}) == ""
    assert re.search("w", difference({"w": PLAIN}, {"w": 1})) and zlib.crc32(FOUR) != zlib.crc32(EVIL)


def test_a_size_of_true_is_a_one_to_both(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(torch_zip(items(size=call("torch", "Size", b"(" + number(2) + b"\x88t")) + b"."))
    assert ours(path) == {"size": torch.Size((2, 1))}
    assert difference(ours(path), torchs(path, False)) == ""
