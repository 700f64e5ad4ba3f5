"""Torch files for tests: what torch writes, pickles written by hand, and what torch itself reads as the oracle."""

from __future__ import annotations

import collections
import io
import pickle

import pytest
import torch

from core.containers.spec import TensorSpec
from core.containers.torch_files.file import open_torch_file
from core.containers.torch_files.storages import TorchArchive
from core.errors import CheckpointDamaged, CheckpointError


def saved(content, **how) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def example() -> dict:
    """Tensors as checkpoints have them: views of all kinds, tied ones, nested ones."""
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


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of the elements, by which NaN equals itself."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def flattened(content, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a nested content, by their keys with dots between."""
    if isinstance(content, torch.Tensor):
        return {path: content}
    if not isinstance(content, (dict, list, tuple)):
        return {}
    found = {}
    for key, item in content.items() if isinstance(content, dict) else enumerate(content):
        found |= flattened(item, f"{path}.{key}" if path else str(key))
    return found


def rebuilt(spec: TensorSpec, data: bytes) -> torch.Tensor:
    """The tensor of a spec, from the bytes of the file alone."""
    raw = torch.frombuffer(bytearray(data[spec.offset : spec.offset + spec.extent]) or bytearray(1), dtype=torch.uint8)
    flat = raw[: spec.extent].clone().view(getattr(torch, spec.dtype))
    return flat.as_strided(spec.shape, spec.strides)


def assert_same_as_torch(data: bytes, archive: TorchArchive) -> None:
    """Names, types, shapes, strides and bytes are those that torch reads."""
    expected = flattened(torch.load(io.BytesIO(data), weights_only=False))
    assert list(archive.tensors) == list(expected)
    for name, tensor in expected.items():
        spec = archive.tensors[name]
        assert (spec.name, spec.shape, spec.strides) == (name, tuple(tensor.shape), tensor.stride())
        assert f"torch.{spec.dtype}" == str(tensor.dtype)
        assert spec.nbytes == tensor.numel() * tensor.element_size()
        assert spec.contiguous == tensor.is_contiguous()
        assert torch.equal(bits(rebuilt(spec, data)), bits(tensor))


def opened(data: bytes) -> TorchArchive:
    return open_torch_file(io.BytesIO(data), "x.pt")


def failure(data: bytes) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        opened(data)
    assert str(caught.value).startswith("x.pt: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def damage(data: bytes) -> str:
    """The sentence with which a file is called damaged."""
    with pytest.raises(CheckpointDamaged):
        opened(data)
    return failure(data)


class Reference:
    """Stands for a storage in a pickle."""

    def __init__(self, *identity):
        self.identity = identity


class Tensor:
    """Pickles as a tensor in a storage."""

    def __init__(self, reference, offset, shape, strides):
        self.args = (reference, offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.identity if isinstance(value, Reference) else None


def pickled(value) -> bytes:
    """A pickle that may have references and tensors of any kind in it."""
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(value)
    return buffer.getvalue()
