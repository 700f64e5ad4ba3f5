"""DCP folders that lead out of themselves, lie about sizes, or want to run something."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from core.containers.dcp.folder import open_dcp
from core.errors import CheckpointError, CheckpointNotFound
from tests.makers.dcp_folders import ROWS, Writer, write_rows
from tests.makers.limits import processor_seconds
from tests.makers.torch_files import saved


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows")


def test_a_pipe_is_not_waited_for(rows):
    (rows / "__0_0.distcp").unlink()
    os.mkfifo(rows / "__0_0.distcp")
    with pytest.raises(CheckpointNotFound, match="a device or a pipe"):
        open_dcp(rows)


def hostile(tmp_path, change) -> str:
    writer = Writer(tmp_path, files=1)
    writer.tensor("w", torch.arange(28.0).reshape(7, 4), ROWS)
    writer.tensor("v", torch.zeros(5))
    change(writer)
    with pytest.raises(CheckpointError) as caught:
        open_dcp(writer.close())
    assert str(tmp_path) in str(caught.value)
    return str(caught.value).removeprefix(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("offset", 1.5, "an item "),
        ("offset", True, "an item "),
        ("offset", 1 << 8000, "an item "),
        ("relative_path", 5, "v is in a file called 5"),
        ("transform_descriptors", ["stream.zstd"], 'v was written through ["stream.zstd"]'),
    ],
)
def test_places_that_cannot_be_are_refused(tmp_path, field, value, said):
    assert said in hostile(tmp_path, lambda writer: setattr(writer.info("v"), field, value))


@pytest.mark.parametrize(
    ("size", "chunk", "said"),
    [
        ((1 << 62, 1 << 62), None, "v has the shape (46116"),
        ((5,) * 65, None, "v has the shape (5, 5"),
        ((5, 5), None, "v has a block"),
        (("5",), None, 'v has the shape ("5",)'),
        ((5,), ((-1,), (5,)), "v has a block"),
        ((5,), ((0,), (1 << 70,)), "v has a block"),
        ((5,), ((0, 0), (5, 1)), "v has a block"),
    ],
)
def test_shapes_that_cannot_be_are_refused(tmp_path, size, chunk, said):
    def change(writer):
        item = writer.metadata.state_dict_metadata["v"]
        item.size = torch.Size(size) if all(type(n) is int and abs(n) < 1 << 63 for n in size) else size
        if chunk:
            item.chunks = [ChunkStorageMetadata(*chunk)]

    assert said in hostile(tmp_path, change)


def test_a_tensor_cut_along_many_dimensions_is_refused_at_once(tmp_path):
    writer = Writer(tmp_path)
    shape = (2,) * 40
    boxes = [((0,) * 40, tuple(1 if d == i else 2 for d in range(40))) for i in range(40)]
    writer.tensor("w", torch.zeros(1))
    item = writer.metadata.state_dict_metadata["w"]
    item.size, item.chunks = torch.Size(shape), [ChunkStorageMetadata(*box) for box in boxes[:2]]
    writer.metadata.storage_data = {MetadataIndex("w", (0,) * 40): writer.info("w")}
    with (
        processor_seconds(10),
        pytest.raises(CheckpointError, match=r"\.metadata: w has two blocks at \(0, 0, .*\) and \(2, 1, 2, "),
    ):
        open_dcp(writer.close())


@pytest.mark.parametrize("path", [("a",), ("a", "b", "c")])
def test_two_things_at_one_place_are_refused(tmp_path, path):
    def change(writer):
        writer.metadata.planner_data |= {"w": ("a", "b"), "v": path}

    assert "/.metadata: v belongs at" in hostile(tmp_path, change)


@pytest.mark.parametrize("planner", [None, [], {"w": "w"}, {"w": (0, 1.5)}, {"w": ()}, {"w": ("x",) * 99}])
def test_without_nesting_names_are_flat(rows, planner):
    metadata = pickle.loads((rows / ".metadata").read_bytes())
    metadata.planner_data = planner
    (rows / ".metadata").write_bytes(pickle.dumps(metadata))
    assert open_dcp(rows).content.keys() == {"w", "lr"}


def test_a_tensor_of_another_class_is_noted_and_left_out(tmp_path):
    writer = Writer(tmp_path)
    writer.tensor("w", torch.zeros(3))
    writer.tensor("q", torch.zeros(3))
    sparse = saved(torch.eye(3).to_sparse())
    writer.info("q").length = len(sparse)
    writer.data[1] = bytearray(sparse)
    container = open_dcp(writer.close())
    assert list(container.tensors) == ["w"]
    (note,) = container.notes
    assert note.startswith("q is torch._utils._rebuild_sparse_tensor(")
    assert note.endswith("not a plain tensor: left out.")
    assert container.foreign[0].startswith("torch._utils._rebuild_sparse_tensor(")


@pytest.mark.parametrize("value", [{"state_dict_metadata": {}}, [1], 5, os.system])
def test_another_pickle_is_called_what_it_is(tmp_path, value):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(CheckpointError, match=r"\.metadata: a pickle of .*, expected a Metadata of torch\.distributed"):
        open_dcp(tmp_path)
