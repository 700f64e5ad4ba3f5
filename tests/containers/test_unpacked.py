"""Tensors that a file holds packed: deflated records, and NumPy arrays in the pickle, as XLA, HPU and old MPS have."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import inspect_model
from core.containers.open import open_container
from core.errors import CheckpointDamaged, CheckpointError
from core.inspection.verification import verify_container
from tests.makers.conversions import converted, tensors_of
from tests.makers.nanogpt_files import TODAY, ckpt


def deflate(source: Path, target: Path, but: str = " ", **changes: bytes) -> Path:
    """The zip as it is after it was unpacked and zipped again."""
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        for name in whole.namelist():
            kind = zipfile.ZIP_STORED if but in name else zipfile.ZIP_DEFLATED
            made.writestr(name, changes.get(name.rpartition("/")[2], whole.read(name)), kind)
    return target


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("but", [" ", "data.pkl", "data/0", "byteorder"])
def test_a_deflated_file_is_read_verified_and_converted_bit_for_bit(tmp_path, but, capsys):
    shared = torch.randn(8, 8)
    content = {"a": shared, "b": shared[2:4].T, "c": torch.randn(3, 5).to(torch.bfloat16), "n": torch.arange(9), "k": 3}
    torch.save(content, tmp_path / "whole.pt")
    path = deflate(tmp_path / "whole.pt", tmp_path / "x.pt", but)
    expected = bits({name: t for name, t in torch.load(path).items() if name != "k"})
    assert tensors_of(path) == expected
    found = verify_container(open_container(path))
    assert found.damaged == [] and found.checked_bytes >= 8 * 8 * 4
    converted(path, tmp_path / "out.pt", "pt")
    assert tensors_of(tmp_path / "out.pt") == expected
    assert inspect_model.main([str(path), "--verify", "--stats"]) == 0
    assert "nothing is damaged" in capsys.readouterr().out


def test_a_deflated_checkpoint_of_nanogpt_becomes_a_bundle(tmp_path):
    ckpt(tmp_path / "whole.pt", order=TODAY)
    deflate(tmp_path / "whole.pt", tmp_path / "ckpt.pt")
    for name in ("whole", "ckpt"):
        converted(tmp_path / f"{name}.pt", tmp_path / name, "bundle")
    for file in ("model.pt", "optimizer.pt", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "ckpt" / file).read_bytes()


def test_deflated_weights_of_a_folder_of_hugging_face_are_read(tmp_path):
    made = {"wte.weight": torch.randn(4, 4), "other": torch.arange(3.0)}
    torch.save(made, tmp_path / "whole.pt")
    folder = tmp_path / "hf"
    folder.mkdir()
    deflate(tmp_path / "whole.pt", folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    assert tensors_of(folder) == bits(made)
    assert verify_container(open_container(folder)).damaged == []


def damaged(path: Path, name: str, change: int) -> Path:
    """A file with one byte of a deflated record changed."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as whole:
        info = next(info for info in whole.infolist() if info.filename.endswith(name))
        start = info.header_offset + 30 + len(info.filename) + len(info.extra)
    data[start + change] ^= 0x55
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("change", [0, 30, 200])
def test_a_flipped_byte_of_a_deflated_tensor_is_found(tmp_path, change):
    torch.save({"w": torch.randn(40, 40)}, tmp_path / "whole.pt")
    path = damaged(deflate(tmp_path / "whole.pt", tmp_path / "x.pt"), "data/0", change)
    (said,) = verify_container(open_container(path)).damaged
    assert said.startswith(str(path)) and ("inflate" in said or "CRC32" in said)
    with pytest.raises(CheckpointDamaged, match=r"inflate|is damaged \(CRC32"):
        converted(path, tmp_path / "out.pt", "pt")
    assert not (tmp_path / "out.pt").exists()


def test_a_small_file_that_unfolds_to_much_is_refused_with_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr("core.containers.torch_files.zip._MUCH", 1 << 20)
    torch.save({"w": torch.zeros(1), "x": torch.zeros(2_800_000, dtype=torch.uint8)}, tmp_path / "whole.pt")
    path = deflate(tmp_path / "whole.pt", tmp_path / "x.pt")
    size = path.stat().st_size
    with pytest.raises(CheckpointError) as caught:
        open_container(path)
    assert str(caught.value) == f"{path}: its tensors unfold to 2800004 bytes, the file has {size}; not read."


def test_a_method_that_torch_cannot_read_is_refused(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "x.pt", "w") as made:
        for name in whole.namelist():
            made.writestr(name, whole.read(name), zipfile.ZIP_BZIP2)
    with pytest.raises(CheckpointDamaged, match=r"whole/byteorder is compressed; torch stores it plainly"):
        open_container(tmp_path / "x.pt")


class OfDevice:
    """A tensor of a device without storages, as torch pickles it there."""

    def __init__(self, tensor: torch.Tensor, device: str = "xla:0", builder: str = "_rebuild_device_tensor_from_numpy"):
        self.tensor, self.device, self.builder = tensor, device, getattr(torch._utils, builder)

    def __reduce__(self) -> Any:
        held: Any = self.tensor
        if self.builder is not torch._utils._rebuild_device_tensor_from_cpu_tensor:
            held = (held.float() if held.dtype == torch.bfloat16 else held).numpy()
        return self.builder, (held, self.tensor.dtype, self.device, False)


def upstream(path: Path) -> dict[str, torch.Tensor]:
    """What torch makes of the file where the device is not there."""
    return torch.load(path, map_location="cpu", weights_only=False)


TENSORS = {
    "matrix": torch.randn(3, 5),
    "transposed": torch.randn(3, 5).T,
    "number": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "bfloat16": torch.tensor([1.0, -0.0, 3.14159, float("inf"), 1e-40]).to(torch.bfloat16),
    "bool": torch.tensor([True, False]),
    "int64": torch.arange(-2, 3),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "half": torch.randn(4).half(),
    "complex": torch.randn(2, dtype=torch.complex64),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("stream", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize("builder", ["_rebuild_device_tensor_from_numpy", "_rebuild_device_tensor_from_cpu_tensor"])
def test_tensors_of_devices_without_storages_are_those_of_torch(tmp_path, stream, builder, protocol):
    path = tmp_path / "x.pt"
    device = "cpu" if stream else "xla:0"  # torch maps no device of a stream to another
    content = {name: OfDevice(t, device, builder) for name, t in TENSORS.items()} | {"plain": torch.ones(2)}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not stream)
    expected = bits(upstream(path))
    assert tensors_of(path) == expected
    assert open_container(path).foreign == []
    converted(path, tmp_path / "out.pt", "pt")
    assert tensors_of(tmp_path / "out.pt") == expected


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from(["float32", "float64", "int16", "bool", "bfloat16"]),
    st.permutations(range(4)),
)
def test_arrays_of_any_shape_and_order_are_those_of_torch(tmp_path_factory, shape, dtype, order):
    path = tmp_path_factory.mktemp("xla") / "x.pt"
    axes = [axis for axis in order if axis < len(shape)]
    tensor = (torch.randn(shape) * 100).to(getattr(torch, dtype)).permute(axes)
    torch.save({"w": OfDevice(tensor), "again": OfDevice(tensor)}, path)
    assert tensors_of(path) == bits(upstream(path))


def test_an_xla_checkpoint_of_nanogpt_becomes_the_bundle_of_the_plain_one(tmp_path):
    ckpt(tmp_path / "plain.pt", order=TODAY)
    content = torch.load(tmp_path / "plain.pt", weights_only=True)
    table = OfDevice(content["model"]["transformer.wte.weight"])
    content["model"] = {
        name: table if name in ("transformer.wte.weight", "lm_head.weight") else OfDevice(t)
        for name, t in content["model"].items()
    }
    torch.save(content, tmp_path / "xla.pt")
    for name in ("plain", "xla"):
        converted(tmp_path / f"{name}.pt", tmp_path / name, "bundle")
    for file in ("model.pt", "optimizer.pt", "config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "xla" / file).read_bytes()


@pytest.mark.parametrize(
    "array", [np.arange(3, dtype=">f4"), np.array([None, 1]), np.array(["a"]), np.zeros(3, [("x", "f4")])]
)
def test_an_array_that_is_no_tensor_stays_a_record_and_is_refused_among_weights(tmp_path, array):
    class Made:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_device_tensor_from_numpy, (array, torch.float32, "xla:0", False)

    torch.save({"w": Made(), "b": torch.zeros(2)}, tmp_path / "x.pt")
    assert set(tensors_of(tmp_path / "x.pt")) == {"b"}
    with pytest.raises(CheckpointError, match=r"x\.pt: w is torch\._utils\._rebuild_device_tensor_from_numpy\("):
        converted(tmp_path / "x.pt", tmp_path / "out.pt", "pt")


def test_what_is_opened_of_a_pickle_is_gone_when_it_is_closed(tmp_path):
    torch.save({"w": OfDevice(torch.randn(3))}, tmp_path / "x.pt")
    container = open_container(tmp_path / "x.pt")
    with container.open("data.pkl/0") as file:
        assert isinstance(file, io.IOBase) and file.seek(0, io.SEEK_END) == 12
    assert container.files == {"x.pt": (tmp_path / "x.pt").stat().st_size}
