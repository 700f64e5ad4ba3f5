"""Hostile pickles in every place where a pickle can be: each finds its way into the report, none runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core.containers.container import Container
from core.containers.open import open_container
from core.errors import CheckpointError
from tests.hostile.assemble import (
    FOUR,
    blocks,
    call,
    index,
    metadata,
    place,
    tensor,
    text,
    torch_stream,
    torch_zip,
)
from tests.hostile.pickles import NAMES, PAYLOADS, runs


def in_zip(data: bytes, folder: Path) -> Path:
    path = folder / "x.pt"
    path.write_bytes(torch_zip(data))
    return path


def in_stream(data: bytes, folder: Path) -> Path:
    path = folder / "x.pt"
    path.write_bytes(torch_stream(data))
    return path


def in_rank_file(data: bytes, folder: Path) -> Path:
    """In the file of the second rank."""
    (folder / "model_rank00000.pt").write_bytes(torch_zip(b"}."))
    (folder / "model_rank00001.pt").write_bytes(torch_zip(data))
    return folder


def in_shard(data: bytes, folder: Path) -> Path:
    (folder / "pytorch_model.bin").write_bytes(torch_zip(data))
    return folder


def in_value_of_dcp(data: bytes, folder: Path) -> Path:
    item = torch_zip(data)
    (folder / "__0_0.distcp").write_bytes(item)
    value = call("torch.distributed.checkpoint.metadata", "BytesStorageMetadata")
    (folder / ".metadata").write_bytes(metadata({"w": value}, [(index("w"), place("__0_0.distcp", 0, len(item)))]))
    return folder


def in_tensor_of_dcp(data: bytes, folder: Path) -> Path:
    """The payload runs, is thrown away, and a tensor follows."""
    item = torch_zip(data.removesuffix(b".") + b"0" + tensor() + b".", {"0": FOUR})
    (folder / "__0_0.distcp").write_bytes(item)
    says = blocks((2, 2), [((0, 0), (2, 2))])
    places = [(index("w", (0, 0)), place("__0_0.distcp", 0, len(item)))]
    (folder / ".metadata").write_bytes(metadata({"w": says}, places))
    return folder


def in_metadata_of_dcp(data: bytes, folder: Path) -> Path:
    """The payload runs, is thrown away, and a sound .metadata follows."""
    in_tensor_of_dcp(b"N.", folder)
    sound = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data.removesuffix(b".") + b"0" + sound)
    return folder


def in_common_of_megatron(data: bytes, folder: Path) -> Path:
    in_tensor_of_dcp(b"N.", folder)
    (folder / "common.pt").write_bytes(torch_zip(data))
    return folder


DOORS: dict[str, Callable[[bytes, Path], Path]] = {
    "zip": in_zip,
    "stream": in_stream,
    "rank file": in_rank_file,
    "shard of Hugging Face": in_shard,
    "value of DCP": in_value_of_dcp,
    "tensor of DCP": in_tensor_of_dcp,
    "metadata of DCP": in_metadata_of_dcp,
    "common.pt of Megatron": in_common_of_megatron,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, in which nothing is ever executed."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    return folder


def opened(path: Path) -> Container | str:
    """The container, or the one line that refuses it; nothing was imported or run."""
    before = set(sys.modules)
    try:
        found: Container | str = open_container(path)
    except CheckpointError as error:
        found = str(error)
        assert "\n" not in found
    assert {name for name in set(sys.modules) - before if not name.startswith("core.")} <= {"torch_items"}
    assert not Path("executed").exists()
    return found


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("trick", PAYLOADS)
def test_a_trick_is_reported_in_every_place_and_never_run(trick, door, folder):
    payload = PAYLOADS[trick]
    found = opened(DOORS[door](payload.data, folder))
    if isinstance(found, str):
        assert "damaged pickle at byte" in found or "a reference" in found or "persistent id" in found, found
        assert payload.refused and (payload.said in found or "persistent id" in found)
    else:
        assert not payload.refused
        assert any(payload.said in line for line in found.foreign), found.foreign
        assert not all(line.is_record for line in found.foreign), found.foreign  # or a conversion would go on


@pytest.mark.parametrize("trick", [trick for trick, payload in PAYLOADS.items() if payload.runs])
def test_python_itself_would_run_what_is_meant_to_run(trick):
    runs(PAYLOADS[trick].data)
    assert Path("executed").exists()


@pytest.mark.parametrize("full_name", NAMES)
def test_a_function_that_is_known_to_be_dangerous_is_named_with_its_arguments(full_name, folder):
    module, _, attribute = full_name.rpartition(".")
    found = opened(in_zip(call(module, attribute, text("x")) + b".", folder))
    assert isinstance(found, Container)
    assert found.foreign == [f'{full_name}("x")']
    assert not found.foreign[0].is_record
