"""The torch-free reader of `.pt` zips, with torch itself as the oracle."""

from __future__ import annotations

import collections
import io
import zipfile

import pytest
import torch

from core.containers.pickles.inert import as_text
from core.containers.spec import ITEM_SIZES
from core.containers.torch_files.storages import TorchArchive
from core.containers.torch_files.zip import open_torch_zip
from tests.makers.torch_files import assert_same_as_torch, example, saved


def opened(data: bytes) -> TorchArchive:
    return open_torch_zip(io.BytesIO(data), "x.pt")


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


def test_only_headers_are_read():
    class Watched(io.BytesIO):
        bytes_read = 0

        def read(self, size=-1):
            data = super().read(size)
            self.bytes_read += len(data)
            return data

    file = Watched(saved({"w": torch.zeros(1_000_000), "v": torch.zeros(1_000_000)}))
    open_torch_zip(file, "x.pt")
    assert file.bytes_read < 5000
