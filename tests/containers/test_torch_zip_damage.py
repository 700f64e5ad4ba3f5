"""Torch zips that are damaged, lie about themselves, or want to run something."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import pytest
import torch

from core.containers.pickles.inert import as_text
from core.errors import CheckpointDamaged, CheckpointError
from tests.containers.test_torch_zip import opened
from tests.makers.torch_files import Reference, Tensor, pickled, saved


def repacked(data: bytes, **changes) -> bytes:
    """The same torch zip with records replaced (bytes) or left out (None)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
        folder = source.namelist()[0].partition("/")[0]
        records = {n.partition("/")[2]: source.read(n) for n in source.namelist()} | changes
        for name, content in records.items():
            if content is not None:
                target.writestr(f"{folder}/{name}", content)
    return buffer.getvalue()


SMALL = saved({"w": torch.arange(40, dtype=torch.float32), "b": torch.zeros(3)})


def with_tensor(shape, strides) -> bytes:
    """SMALL with one tensor of any numbers at all."""
    storage = Reference("storage", torch.FloatStorage, "0", "cpu", 40)
    return repacked(SMALL, **{"data.pkl": pickled({"w": Tensor(storage, 0, shape, strides)})})


def with_entry(name: str, at: int, layout: str, value: int) -> bytes:
    """SMALL with one number changed in the directory's entry for a record."""
    entry = SMALL.rindex(f"archive/{name}".encode()) - 46
    assert SMALL[entry : entry + 4] == b"PK\1\2"
    data = bytearray(SMALL)
    struct.pack_into(layout, data, entry + at, value)
    return bytes(data)


def local(name: str) -> int:
    return SMALL.index(f"archive/{name}".encode()) - 30


REFUSED = {
    "two bytes": (b"PK", "cut off after 2 bytes"),
    "strange byteorder": (repacked(SMALL, byteorder=b"middle"), "byteorder is b'middle'"),
    "shape of text": (with_tensor(("4",), (1,)), 'shape ("4",)'),
    "overflowing shape": (with_tensor((2**31, 2**31, 2), (0, 0, 0)), "shape (2147483648, 2147483648, 2)"),
    "huge size": (with_tensor((2**70,), (0,)), "shape (1180591620717411303424,)"),
    "overlap": (with_entry("data/0", 42, "<I", local("data/1")), "and the next part at"),
    "no record there": (with_entry("data/0", 42, "<I", local("data/0") + 1), "no record at byte"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_malformed_file_is_refused_in_one_sentence(kind):
    data, message = REFUSED[kind]
    with pytest.raises(CheckpointError) as caught:
        opened(data)
    assert str(caught.value).startswith("x.pt: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["data.pkl", "byteorder"])
def test_a_record_whose_checksum_differs_is_named_with_both_checksums(name):
    recorded = zipfile.ZipFile(io.BytesIO(SMALL)).getinfo(f"archive/{name}").CRC
    data = bytearray(SMALL)
    start = opened(SMALL).records[name].offset
    data[start] ^= 1
    found = zlib.crc32(data[start : start + opened(SMALL).records[name].size])
    with pytest.raises(CheckpointDamaged) as caught:
        opened(bytes(data))
    assert str(caught.value) == f"x.pt: {name} is damaged (CRC32 {found:08x}, recorded {recorded:08x})."


def test_a_checksum_that_was_not_recorded_is_not_checked():
    assert list(opened(with_entry("data.pkl", 16, "<I", 0)).tensors) == ["w", "b"]


def test_calls_that_the_content_does_not_hold_are_kept_apart():
    pickled = zipfile.ZipFile(io.BytesIO(SMALL)).read("archive/data.pkl")
    injected = b"cposix\nsystem\nX\x02\x00\x00\x00ls\x85R0"
    archive = opened(repacked(SMALL, **{"data.pkl": pickled[:2] + injected + pickled[2:]}))
    assert list(archive.tensors) == ["w", "b"]
    assert [as_text(call) for call in archive.unused] == ['posix.system("ls")']
    assert opened(SMALL).unused == []


def test_record_that_claims_more_bytes_than_the_file_has_is_refused():
    data = bytearray(with_entry("version", 24, "<I", 1 << 30))
    struct.pack_into("<I", data, data.rindex(b"archive/version") - 46 + 20, 1 << 30)
    with pytest.raises(CheckpointDamaged, match=r"claims 1073741824 bytes from byte \d+, and the next part begins"):
        opened(bytes(data))


def test_truncated_file_names_both_sizes():
    data = saved({"w": torch.zeros(1000), "b": torch.zeros(1000)})
    with pytest.raises(CheckpointDamaged) as caught:
        opened(data[:6000])
    assert str(caught.value) == (
        "x.pt: cut off after 6000 bytes: the directory that ends every zip is missing. "
        "Its tensors alone need 8000 bytes."
    )
