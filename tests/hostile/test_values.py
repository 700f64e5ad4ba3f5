"""Calls that count as data: what a load makes of them is no larger than the file, and torch is asked nothing."""

from __future__ import annotations

import collections
import resource
import struct
import time
from pathlib import Path

import pytest
import torch

from core.containers.pickles.inert import Call
from core.errors import CheckpointDamaged, CheckpointError
from tests.fuzz.side_by_side import ours
from tests.hostile.assemble import call, items, name, number, numbers, storage, tensor, text, torch_zip
from tests.hostile.case import WEIGHTS
from tests.hostile.values import clashing


def loaded(tmp_path: Path, value: bytes) -> object:
    """A value beside a tensor, as a load gives it."""
    (tmp_path / "x.pt").write_bytes(torch_zip(items(w=tensor(), x=value) + b".", WEIGHTS))
    return ours(tmp_path / "x.pt")["x"]


def real(value: float) -> bytes:
    return b"G" + struct.pack(">d", value)


RECORDS = {
    "bytearray of 6 GB": call("builtins", "bytearray", number(6 * 10**9)),
    "bytearray of 2**62": call("builtins", "bytearray", number(1 << 62)),
    "bytearray of a text": call("builtins", "bytearray", text("abc")),
    "bytes of 6 GB": call("builtins", "bytes", number(6 * 10**9)),
    "Counter of a number": call("collections", "Counter", number(5)),
    "Counter of texts": call("collections", "Counter", items(a=text("b"))),
    "Counter that its constructor did not fill": name("collections", "Counter") + items(a=number(2)) + b"\x85\x81",
    "Size of a number": call("torch", "Size", number(5)),
    "device of numbers": call("torch", "device", number(5), number(5), number(5)),
    "device of no name": call("torch", "device", text("nonsense")),
    "device of 10,000 characters": call("torch", "device", text("c" * 10_000)),
    "device of a huge number": call("torch", "device", text("cuda"), number(1 << 40)),
    "device of a negative number": call("torch", "device", text("cuda"), number(-7)),
    "device with attributes": call("torch", "device", text("cpu")) + items(a=number(1)) + b"b",
    "complex of a text": call("builtins", "complex", text("x" * 1000)),
    "set of a number": call("builtins", "set", number(5)),
    "layout of a word": call("torch.serialization", "_get_layout", text("nope")),
    "layout of a function": call("torch.serialization", "_get_layout", text("torch.load")),
    "layout of a list": call("torch.serialization", "_get_layout", b"]"),
    "list of a range": call("builtins", "list", call("builtins", "range", number(10**12))),
}
"""Values that stay records, by name."""


@pytest.mark.parametrize("which", RECORDS)
def test_a_call_with_arguments_of_another_kind_stays_a_record_and_takes_nothing(which, tmp_path):
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert isinstance(loaded(tmp_path, RECORDS[which]), Call)
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


MADE = {
    "complex": (call("builtins", "complex", real(1.0), real(-2.0)), complex(1, -2)),
    "device": (call("torch", "device", text("cuda:3")), torch.device("cuda", 3)),
    "device and number": (call("torch", "device", text("cpu"), number(0)), torch.device("cpu", 0)),
    "layout": (call("torch.serialization", "_get_layout", text("torch.sparse_coo")), torch.sparse_coo),
    "Counter": (call("collections", "Counter", items(a=number(2))), collections.Counter(a=2)),
    "dtype": (name("torch", "bfloat16"), torch.bfloat16),
    "Size": (call("torch", "Size", numbers((2, 3))), torch.Size((2, 3))),
    "sizes that are no numbers": (call("torch", "Size", b"(" + text("a") + b"t"), ("a",)),
    "bytearray": (call("builtins", "bytearray", b"C\3abc"), bytearray(b"abc")),
    "nested key": (b"}" + numbers((1, 2)) + b"\x85N\x86Ns", {((((1, 2),), None)): None}),
    "long key": (b"}" + number(1 << 70) + b"Ns", {1 << 70: None}),
    "keys of a set": (b"\x8f(" + name("torch", "int8") + numbers((1, 2)) + b"\x90", {torch.int8, (1, 2)}),
}


@pytest.mark.parametrize("which", MADE)
def test_a_value_of_the_kinds_that_are_saved_is_made(which, tmp_path):
    data, expected = MADE[which]
    found = loaded(tmp_path, data)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("whole", [b"}(%su", b"\x8f(%s\x90"])
def test_keys_of_one_hash_are_not_put_into_a_dictionary(whole, tmp_path):
    pairs = [clashing(i) for i in range(1500)]
    inside = b"".join(pairs if whole[:1] == b"}" else [pair[:-1] for pair in pairs])
    with pytest.raises(CheckpointDamaged, match="its keys were made to collide in a dictionary or set"):
        loaded(tmp_path, whole % inside)


TENSORS = {
    "19 G parameters of one number": (tensor(shape=(138_000, 138_000), strides=(0, 0)), "unfold to 76176000"),
    "windows": (tensor(numel=4, shape=(1 << 20, 2, 1 << 10), strides=(0, 1, 0)), "unfold to 858993"),
    "a storage of 2**62": (
        call("torch._utils", "_rebuild_tensor_v2", storage("0", 1 << 62)),
        "both 16 and 18446744073709551616 bytes",
    ),
    "a negative size": (tensor(shape=(-1, 2)), "all whole numbers of at least 0"),
    "a negative stride": (tensor(strides=(-1, 2)), "all whole numbers of at least 0"),
    "strides beyond the storage": (tensor(strides=(1 << 40, 1)), "ends at byte"),
}


@pytest.mark.parametrize("which", TENSORS)
def test_a_tensor_of_any_size_is_refused_by_the_size_of_its_file(which, tmp_path):
    data, said = TENSORS[which]
    with pytest.raises(CheckpointError, match=said) as caught:
        loaded(tmp_path, data)
    assert str(caught.value).startswith(str(tmp_path / "x.pt"))


def test_expanded_tensors_of_a_usual_size_are_loaded(tmp_path):
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).expand(8, 12, 64, 64)
    torch.save({"mask": mask, "tied": [mask] * 3}, tmp_path / "x.pt")
    assert torch.equal(ours(tmp_path / "x.pt")["mask"], mask)
