from __future__ import annotations

import shutil
import struct
import subprocess
import zipfile
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.bundle.storage import DISK
from core.containers.torch_files import layout as torch_zip_layout
from core.containers.torch_files.zip import open_torch_zip
from core.saving.torch_file import write_torch_zip

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool, torch.complex64,
]  # fmt: skip


def write(path, content):
    with DISK.create(path) as output:
        write_torch_zip(output, content)
    return output


def same_bits(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().view(-1).untyped_storage().tolist() == (b.contiguous().view(-1).untyped_storage().tolist())
    )


def example():
    weight = torch.randn(33, 7)
    tensors = {str(t).removeprefix("torch."): torch.arange(6).reshape(2, 3).to(torch.float32).to(t) for t in DTYPES}
    return {
        **tensors,
        "weight": weight,
        "tied": weight,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(3, 5).t(),
        "plain": {"list": [1, -2.5, None, "text", True], "tuple": (1, 2), 3: "integer key"},
    }


@pytest.mark.parametrize("mapped", [True, False])
def test_plain_torch_load_reads_equal_bits(tmp_path, mapped):
    content = example()
    write(tmp_path / "a.pt", content)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mapped)
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            assert same_bits(loaded[name], value) and loaded[name].stride() == value.stride(), name
    assert loaded["plain"] == content["plain"]
    assert loaded["weight"].data_ptr() == loaded["tied"].data_ptr()
    assert (
        all(v.data_ptr() % 64 == 0 for v in loaded.values() if isinstance(v, torch.Tensor) and v.numel()) or not mapped
    )


def test_size_and_crc_of_the_output_are_those_of_the_file(tmp_path):
    output = write(tmp_path / "a.pt", example())
    data = (tmp_path / "a.pt").read_bytes()
    assert (output.size, output.crc32) == (len(data), zlib.crc32(data))


def test_equal_objects_give_equal_bytes(tmp_path):
    content = example()
    write(tmp_path / "a.pt", content)
    write(tmp_path / "b.pt", content)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("zip64_from", [0xFFFFFFFF, 100], ids=["32-bit", "64-bit"])
def test_zip_programs_find_every_record_whole(tmp_path, monkeypatch, zip64_from):
    monkeypatch.setattr(torch_zip_layout, "ZIP64_FROM", zip64_from)
    path = tmp_path / "a.pt"
    write(path, example())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert all(info.header_offset < path.stat().st_size for info in archive.infolist())
    assert torch.load(path, weights_only=True, mmap=True)["scalar"] == 2.5
    if shutil.which("unzip"):
        done = subprocess.run(["unzip", "-t", path], capture_output=True, text=True)
        assert done.returncode == 0 and "No errors detected" in done.stdout


@pytest.mark.parametrize("zip64_from", [0xFFFFFFFF, 100], ids=["32-bit", "64-bit"])
def test_our_own_reader_agrees_with_torch_on_names_shapes_and_bytes(tmp_path, monkeypatch, zip64_from):
    monkeypatch.setattr(torch_zip_layout, "ZIP64_FROM", zip64_from)
    content = example()
    write(tmp_path / "a.pt", content)
    with (tmp_path / "a.pt").open("rb") as file:
        archive = open_torch_zip(file, "a.pt")
        for name, spec in archive.tensors.items():
            value = content[name]
            assert spec.shape == tuple(value.shape) and spec.dtype == str(value.dtype).removeprefix("torch.")
            file.seek(spec.offset)
            assert file.read(spec.nbytes) == bytes(value.untyped_storage().tolist())
    assert set(archive.tensors) == {k for k, v in content.items() if isinstance(v, torch.Tensor)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=6))
def test_any_list_of_tensors_comes_back(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("zip") / "a.pt"
    content = [torch.ones(shape).to(dtype) for dtype, shape in shapes]
    write(path, content)
    for found, value in zip(torch.load(path, weights_only=True), content, strict=True):
        assert same_bits(found, value)


def test_local_headers_carry_no_checksum_and_a_descriptor_follows(tmp_path):
    path = tmp_path / "a.pt"
    write(path, {"a": torch.ones(2)})
    data = path.read_bytes()
    signature, _, flags, _, _, _, crc = struct.unpack("<4s5HI", data[:18])
    assert (signature, flags & 8, crc) == (b"PK\3\4", 8, 0)
    assert data.count(b"PK\7\10") == 4
