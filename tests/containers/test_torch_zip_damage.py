"""Torch zips that are damaged, lie about themselves, or want to run something."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


def reference(key: str = "0", numel: int = 40, kind: str = "storage") -> Reference:
    return Reference(kind, torch.FloatStorage, key, "cpu", numel)


def with_tensor(offset, shape, strides, storage=None) -> bytes:
    """SMALL with one tensor of any numbers at all."""
    tensor = Tensor(storage or reference(), offset, shape, strides)
    return repacked(SMALL, **{"data.pkl": pickled({"w": tensor})})


def compressed() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(SMALL)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return buffer.getvalue()


def with_entry(name: str, at: int, layout: str, value: int) -> bytes:
    """SMALL with one number changed in the directory's entry for a record."""
    entry = SMALL.rindex(f"archive/{name}".encode()) - 46
    assert SMALL[entry : entry + 4] == b"PK\1\2"
    data = bytearray(SMALL)
    struct.pack_into(layout, data, entry + at, value)
    return bytes(data)


def with_end(at: int, layout: str, value: int) -> bytes:
    """SMALL with one number changed in the last 22 bytes."""
    data = bytearray(SMALL)
    struct.pack_into(layout, data, len(data) - 22 + at, value)
    # without the 64-bit record, the narrow one counts
    return bytes(data).replace(b"PK\6\7", b"PK\6\0")


def local(name: str) -> int:
    return SMALL.index(f"archive/{name}".encode()) - 30


REFUSED = {
    "empty": (b"", "empty (0 bytes)"),
    "json": (b'{"a": 1}', "begins with b'{\"a\"'"),
    "stream": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "no torch zip file: it begins with b'\\x80\\x02"),
    "two bytes": (b"PK", "cut off after 2 bytes"),
    "no data.pkl": (repacked(SMALL, **{"data.pkl": None}), "a zip without data.pkl"),
    "big endian": (repacked(SMALL, byteorder=b"big"), "big-endian"),
    "strange byteorder": (repacked(SMALL, byteorder=b"middle"), "byteorder is b'middle'"),
    "missing storage": (repacked(SMALL, **{"data/0": None}), "data/0 is missing"),
    "short storage": (repacked(SMALL, **{"data/0": bytes(100)}), "data/0 has 100 bytes, data.pkl says 160"),
    "compressed": (compressed(), "is compressed"),
    "shape beyond storage": (with_tensor(0, (41,), (1,)), "ends at byte 164 of data/0, which has 160"),
    "offset beyond storage": (with_tensor(1, (40,), (1,)), "ends at byte 164 of data/0, which has 160"),
    "stride beyond storage": (with_tensor(0, (2,), (40,)), "ends at byte 164 of data/0, which has 160"),
    "empty tensor beyond storage": (with_tensor(41, (0,), (1,)), "ends at byte 164 of data/0, which has 160"),
    "negative shape": (with_tensor(0, (-1,), (1,)), "shape (-1,)"),
    "negative stride": (with_tensor(39, (40,), (-1,)), "strides (-1,)"),
    "negative offset": (with_tensor(-1, (1,), (1,)), "offset -1"),
    "shape of text": (with_tensor(0, ("4",), (1,)), 'shape ("4",)'),
    "shape without strides": (with_tensor(0, (4,), ()), "as many strides as sizes"),
    "overflowing shape": (with_tensor(0, (2**31, 2**31, 2), (0, 0, 0)), "shape (2147483648, 2147483648, 2)"),
    "huge size": (with_tensor(0, (2**70,), (0,)), "shape (1180591620717411303424,)"),
    "many dimensions": (with_tensor(0, (1,) * 65, (1,) * 65), "shape (1, 1, "),
    "other storage size": (with_tensor(0, (1,), (1,), reference(numel=41)), "160 bytes, data.pkl says 164"),
    "negative storage": (with_tensor(0, (1,), (1,), reference(numel=-1)), "malformed reference"),
    "storage by path": (with_tensor(0, (1,), (1,), reference("../../etc/passwd")), "data/../../etc/passwd is missing"),
    "module": (with_tensor(0, (1,), (1,), reference(kind="module")), "expected one to a storage"),
    "duplicate": (SMALL.replace(b"archive/data/1", b"archive/data/0"), 'two records are called "archive/data/0"'),
    "other folder": (SMALL.replace(b"archive/data/1", b"brchive/data/1"), "a torch file is one folder"),
    "lying name": (SMALL.replace(b"archive/data/1", b"archive/data/2", 1), "calls itself b'archive/data/2'"),
    "overlap": (with_entry("data/0", 42, "<I", local("data/1")), "and the next part at"),
    "no record there": (with_entry("data/0", 42, "<I", local("data/0") + 1), "no record at byte"),
    "two sizes": (with_entry("version", 24, "<I", 1 << 20), "has 2 bytes and claims 1048576"),
    "encrypted": (with_entry("data/0", 8, "<H", 1), "is encrypted"),
    "directory too far": (with_end(16, "<I", len(SMALL)), f"the file has {len(SMALL)} bytes"),
    "too many records": (with_end(10, "<H", 60000), "directory of 60000 records"),
    "fewer records than said": (with_end(10, "<H", 10), "its directory"),
    "no utf-8": (SMALL.replace(b"archive/data/1", b"archive/data/\xff"), "which is no UTF-8"),
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


def test_every_truncation_is_damage():
    for length in range(len(SMALL)):
        with pytest.raises(CheckpointDamaged, match=r"^x\.pt: "):
            opened(SMALL[:length])


@given(
    st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 8)
)
@settings(max_examples=300, deadline=None)
def test_flipped_bytes_never_raise_anything_but_checkpoint_errors(flips, where):
    data = bytearray(SMALL)
    start = (0, SMALL.rindex(b"PK\1\2"))[where % 2]  # half of them in the directory
    for position, value in flips:
        data[start + position % (len(data) - start)] = value
    try:
        archive = opened(bytes(data))
    except CheckpointError as error:
        assert str(error).startswith("x.pt: ")
    else:
        for spec in archive.tensors.values():
            assert spec.offset >= 0 and spec.offset + spec.extent <= len(data)


@given(st.binary(max_size=120))
@settings(max_examples=200, deadline=None)
def test_any_pickle_inside_a_sound_zip_gives_specs_inside_the_file_or_an_error(noise):
    pickled = zipfile.ZipFile(io.BytesIO(SMALL)).read("archive/data.pkl")
    data = repacked(SMALL, **{"data.pkl": pickled[: len(noise)] + noise + pickled[2 * len(noise) :]})
    try:
        archive = opened(data)
    except CheckpointError as error:
        assert str(error).startswith("x.pt: ")
    else:
        assert all(spec.offset + spec.extent <= len(data) for spec in archive.tensors.values())


def test_hostile_torch_file_is_shown_and_not_run(tmp_path):
    class Shell:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    archive = opened(saved({"w": torch.ones(2), "code": Shell()}))
    assert as_text(archive.content["code"]) == f'posix.system("touch {tmp_path / "executed"}")'
    assert archive.tensors["w"].shape == (2,)
    assert list(tmp_path.iterdir()) == []
