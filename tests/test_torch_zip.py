"""The torch-free reader of `.pt` zips, with torch itself as the oracle."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.containers.inert import as_text
from core.containers.spec import ITEM_SIZES, TensorSpec
from core.containers.torch_zip import TorchZip
from core.errors import CheckpointDamaged, CheckpointError


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def opened(data: bytes) -> TorchZip:
    return TorchZip.open(io.BytesIO(data), "x.pt")


def rebuilt(spec: TensorSpec, data: bytes) -> torch.Tensor:
    """The tensor of a spec, from the bytes of the file alone."""
    raw = torch.frombuffer(bytearray(data[spec.offset : spec.offset + spec.extent]) or bytearray(1), dtype=torch.uint8)
    flat = raw[: spec.extent].clone().view(getattr(torch, spec.dtype))
    return flat.as_strided(spec.shape, spec.strides)


def flattened(content, path="") -> dict[str, torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return {path: content}
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, (list, tuple))
        else ()
    )
    found = {}
    for key, item in items:
        found.update(flattened(item, f"{path}.{key}" if path else str(key)))
    return found


def assert_same_as_torch(data: bytes, archive: TorchZip):
    expected = flattened(torch.load(io.BytesIO(data), weights_only=False))
    assert list(archive.tensors) == list(expected)
    for name, tensor in expected.items():
        spec = archive.tensors[name]
        assert (spec.name, spec.shape, spec.strides) == (name, tuple(tensor.shape), tensor.stride())
        assert f"torch.{spec.dtype}" == str(tensor.dtype)
        assert spec.nbytes == tensor.numel() * tensor.element_size()
        assert spec.contiguous == tensor.is_contiguous()
        found = rebuilt(spec, data)
        assert torch.equal(bits(found), bits(tensor))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def example() -> dict:
    torch.manual_seed(1)
    base = torch.randn(6, 8)
    tied = torch.randn(5, 3)
    parameter = torch.nn.Parameter(torch.randn(3))
    return {
        "plain": base,
        "view": base[1:3, ::2],
        "transposed": base.t(),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "one": torch.zeros(1, 1, 5),
        "wte": tied,
        "lm_head": tied,
        "tied_view": tied.view(15),
        "parameter": parameter,
        "bf16": torch.randn(4).bfloat16(),
        "nested": {"state": {0: {"exp_avg": torch.randn(2, 2), "step": torch.tensor(4.0)}}, "list": [torch.arange(3)]},
    }


def test_names_types_shapes_strides_and_bytes_equal_those_of_torch():
    data = saved(example())
    assert_same_as_torch(data, opened(data))


@pytest.mark.parametrize("dtype", ITEM_SIZES)
def test_every_dtype_has_torchs_item_size_and_bytes(dtype):
    kind = getattr(torch, dtype)
    assert ITEM_SIZES[dtype] == kind.itemsize
    content = {"t": torch.arange(12 * kind.itemsize, dtype=torch.uint8).view(kind)}
    data = saved(content)
    archive = opened(data)
    spec = archive.tensors["t"]
    assert (spec.dtype, spec.shape) == (dtype, (12,))
    assert data[spec.offset : spec.offset + spec.nbytes] == bytes(range(12 * kind.itemsize))


def test_tied_tensors_share_a_storage_and_views_point_into_it():
    archive = opened(saved(example()))
    tensors = archive.tensors
    assert tensors["wte"].storage == tensors["lm_head"].storage == tensors["tied_view"].storage
    assert tensors["view"].storage == tensors["plain"].storage
    assert tensors["view"].offset == tensors["plain"].offset + 8 * 4
    assert len(archive.records) == len({t.storage for t in tensors.values()}) + 6


def test_optimizer_state_is_read_with_its_plain_values():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    data = saved(optimizer.state_dict())
    archive = opened(data)
    assert_same_as_torch(data, archive)
    assert archive.content["param_groups"] == optimizer.state_dict()["param_groups"]


def test_plain_content_comes_back_as_values():
    content = {
        "step": 7,
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "ordered": collections.OrderedDict(a=1),
        "text": "é",
        "none": None,
    }
    assert opened(saved(content)).content == {**content, "size": (2, 3), "dtype": "torch.bfloat16"}


def test_module_state_dict_loses_only_its_metadata():
    module = torch.nn.Linear(2, 2)
    assert list(opened(saved(module.state_dict())).content) == ["weight", "bias"]


def test_tensors_whose_bytes_are_not_their_values_stay_records():
    content = {"conj": torch.zeros(2, dtype=torch.complex64).conj(), "plain": torch.zeros(2, dtype=torch.complex64)}
    archive = opened(saved(content))
    assert list(archive.tensors) == ["plain"]
    assert "_rebuild_tensor_v2" in as_text(archive.content["conj"])


def test_a_storage_without_tensor_is_a_record_that_can_be_shown():
    archive = opened(saved({"storage": torch.zeros(3).untyped_storage()}))
    assert as_text(archive.content) == '{"storage": torch.storage.UntypedStorage("0", 12)}'


def test_whole_pickled_module_shows_its_class_and_tensors():
    archive = opened(saved(torch.nn.Sequential(torch.nn.Linear(2, 3))))
    assert "torch.nn.modules.container.Sequential" in as_text(archive.content)
    assert [t.shape for t in archive.tensors.values()] == [(3, 2), (3,)]


def test_parameter_with_attributes_is_a_tensor():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.label = "x"
    spec = opened(saved({"p": parameter})).tensors["p"]
    assert (spec.dtype, spec.shape) == ("float32", (2,))


def test_upstream_fixtures_equal_torch(shared):
    paths = sorted((shared / "fixtures").rglob("*.pt"))
    assert len(paths) >= 20
    for path in paths:
        data = path.read_bytes()
        archive = opened(data)
        assert archive.tensors
        if "rank" not in path.name:  # these hold DTensors, which torch rebuilds only inside a process group
            assert_same_as_torch(data, archive)


def test_records_are_those_of_zipfile():
    data = saved(example())
    archive = opened(data)
    with zipfile.ZipFile(io.BytesIO(data)) as peer:
        for info in peer.infolist():
            record = archive.records[info.filename.partition("/")[2]]
            assert (record.name, record.size, record.crc32) == (info.filename, info.file_size, info.CRC)
            assert data[record.offset : record.offset + record.size] == peer.read(info)
        assert len(peer.infolist()) == len(archive.records)


def test_64_bit_directory_is_read(tmp_path):
    from core.containers import torch_zip_writer

    class Sink(io.BytesIO):
        size = 0

        def write(self, data):
            self.size += len(data)
            super().write(data)
            return zlib.crc32(data)

    sink = Sink()
    limit, torch_zip_writer.ZIP64_FROM = torch_zip_writer.ZIP64_FROM, 100
    try:
        torch_zip_writer.write_torch_zip(sink, example())
    finally:
        torch_zip_writer.ZIP64_FROM = limit
    data = sink.getvalue()
    assert b"PK\6\6" in data
    assert_same_as_torch(data, opened(data))


def test_only_headers_are_read():
    class Watched(io.BytesIO):
        bytes_read = 0

        def read(self, size=-1):
            data = super().read(size)
            self.bytes_read += len(data)
            return data

    file = Watched(saved({"w": torch.zeros(1_000_000), "v": torch.zeros(1_000_000)}))
    TorchZip.open(file, "x.pt")
    assert file.bytes_read < 5000


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


class Reference:
    """Stands for a storage in a pickle that is written by hand."""

    def __init__(self, *identity):
        self.identity = identity or ("storage", torch.FloatStorage, "0", "cpu", 40)


class Tensor:
    """Pickles as a tensor with any numbers at all."""

    def __init__(self, offset, shape, strides, reference=None):
        self.args = (reference or Reference(), offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Reference) else None


def with_tensor(*args) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Tensor(*args)})
    return repacked(SMALL, **{"data.pkl": buffer.getvalue()})


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


STORAGES = torch.FloatStorage, "0", "cpu"
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
    "other storage size": (
        with_tensor(0, (1,), (1,), Reference("storage", *STORAGES, 41)),
        "160 bytes, data.pkl says 164",
    ),
    "negative storage": (with_tensor(0, (1,), (1,), Reference("storage", *STORAGES, -1)), "malformed reference"),
    "storage by path": (
        with_tensor(0, (1,), (1,), Reference("storage", torch.FloatStorage, "../../etc/passwd", "cpu", 40)),
        "data/../../etc/passwd is missing",
    ),
    "module": (with_tensor(0, (1,), (1,), Reference("module", "os", "x", "y", 1)), "expected one to a storage"),
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


def test_containers_import_neither_torch_nor_numpy_nor_pickle():
    code = (
        "import sys; before = set(sys.modules)\n"
        "import core.containers.torch_zip\n"
        "print(sorted({'torch', 'numpy', 'pickle', 'zipfile'} & (set(sys.modules) - before)))"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
