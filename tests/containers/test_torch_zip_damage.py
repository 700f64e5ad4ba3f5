"""Torch zips that are damaged, lie about themselves, or want to run something."""

from __future__ import annotations

import io
import zipfile
import zlib

import pytest
import torch

from core.errors import CheckpointDamaged, CheckpointError
from tests.containers.test_torch_zip import opened
from tests.makers.torch_files import saved


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


REFUSED = {
    "two bytes": (b"PK", "cut off after 2 bytes"),
    "strange byteorder": (repacked(SMALL, byteorder=b"middle"), "byteorder is b'middle'"),
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


def test_truncated_file_names_both_sizes():
    data = saved({"w": torch.zeros(1000), "b": torch.zeros(1000)})
    with pytest.raises(CheckpointDamaged) as caught:
        opened(data[:6000])
    assert str(caught.value) == (
        "x.pt: cut off after 6000 bytes: the directory that ends every zip is missing. "
        "Its tensors alone need 8000 bytes."
    )
