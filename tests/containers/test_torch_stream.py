"""The torch-free reader of torch's old stream files, with torch itself as the oracle."""

from __future__ import annotations

import collections
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from core.containers.pickles.inert import as_text
from core.containers.spec import ITEM_SIZES
from core.containers.torch_files.stream import MAGIC, open_torch_stream
from tests.makers import torch_files
from tests.makers.torch_files import (
    Reference,
    Tensor,
    assert_same_as_torch,
    bits,
    damage,
    example,
    failure,
    opened,
    pickled,
    rebuilt,
)


def saved(content, protocol: int = 2) -> bytes:
    return torch_files.saved(content, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_names_types_shapes_strides_and_bytes_equal_those_of_torch(protocol):
    data = saved(example(), protocol)
    archive = opened(data)
    assert (archive.container, archive.where, archive.records, archive.unused) == ("stream", "x.pt", {}, [])
    assert_same_as_torch(data, archive)


@pytest.mark.parametrize("dtype", ITEM_SIZES)
def test_every_dtype_has_its_bytes(dtype):
    # torch itself writes the types that came after typed storages, and cannot read them from a stream
    content = {"t": torch.arange(48, dtype=torch.uint8).view(getattr(torch, dtype)), "after": torch.ones(3)}
    data = saved(content)
    tensors = opened(data).tensors
    assert tensors["t"].dtype == dtype
    for name, tensor in content.items():
        assert torch.equal(bits(rebuilt(tensors[name], data)), bits(tensor))


@pytest.mark.parametrize("content", [{}, {"step": 3}, [], None, {"empty": torch.zeros(0)}, torch.tensor(2.5)], ids=str)
def test_small_files_equal_torch(content):
    data = saved(content)
    assert_same_as_torch(data, opened(data))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_stay_records_and_hide_no_other():
    content = {
        "quantized": torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint32),
        "plain": [torch.arange(4.0), torch.arange(3)],
    }
    data = saved(content)
    archive = opened(data)
    assert "_rebuild_qtensor" in as_text(archive.content["quantized"])
    assert torch.equal(rebuilt(archive.tensors["plain.0"], data), content["plain"][0])
    assert torch.equal(rebuilt(archive.tensors["plain.1"], data), content["plain"][1])


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_whole_pickled_module_shows_its_class_and_tensors():
    archive = opened(saved(torch.nn.Sequential(torch.nn.Linear(2, 3))))
    assert as_text(archive.content).startswith("torch.nn.modules.container.Sequential() with ")
    assert [t.shape for t in archive.tensors.values()] == [(3, 2), (3,)]


# files written by hand, as no torch of today writes them


SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
VALUES = np.arange(10, dtype="<f4")


def stream(content, keys=("7",), magic=MAGIC, protocol=1001, system=SYSTEM, counts=(10,)):
    data = b"".join(pickle.dumps(value, 2) for value in (magic, protocol, system)) + pickled(content)
    data += pickle.dumps(keys if not isinstance(keys, tuple) else list(keys), 2)
    return data + b"".join(struct.pack("<q", count) + VALUES.tobytes() for count in counts)


def storage(key="7", numel=10, view=None, kind=torch.FloatStorage):
    return Reference("storage", kind, key, "cpu", numel, view)


WHOLE = {"w": Tensor(storage(), 0, (10,), (1,))}


def test_a_storage_that_is_a_view_of_another_is_read_as_torch_reads_it():
    content = {
        "view": Tensor(storage(view=("8", 4, 6)), 1, (2, 2), (2, 1)),
        "whole": Tensor(storage(), 0, (10,), (1,)),
        "empty": Tensor(storage(view=("9", 10, 0)), 0, (0,), (1,)),
    }
    data = stream(content)
    archive = opened(data)
    assert_same_as_torch(data, archive)
    assert rebuilt(archive.tensors["view"], data).tolist() == [[5, 6], [7, 8]]


REFUSED = {
    "another magic": (stream(WHOLE, magic=MAGIC + 1), "magic number is 0x1950a86a20f9469cfc6d, expected 0x1950a86a2"),
    "another version": (stream(WHOLE, protocol=1002), "version 1002, this program reads 1001"),
    "version of text": (stream(WHOLE, protocol="x" * 500), 'version "xxx'),
    "big endian": (stream(WHOLE, system={**SYSTEM, "little_endian": False}), "big-endian machine"),
    "no byte order": (stream(WHOLE, system={"protocol_version": 1001}), "does not say the order of bytes"),
    "no facts": (stream(WHOLE, system=[1]), "[1] does not say the order of bytes"),
    "keys of numbers": (stream(WHOLE, keys=(7,)), "list of storages is [7]"),
    "keys no list": (stream(WHOLE, keys="7"), 'list of storages is "7"'),
    "key twice": (stream(WHOLE, keys=("7", "7"), counts=(10, 10)), "one of them twice"),
    "key without tensor": (stream(WHOLE, keys=("7", "8"), counts=(10, 10)), "no tensor is in storage 8"),
    "missing key": (stream(WHOLE, keys=(), counts=()), "storage 7 is missing"),
    "another count": (stream(WHOLE, counts=(9,)), "storage 7 has 9 elements by the count at byte"),
    "negative count": (stream(WHOLE, counts=(-1,)), "storage 7 has -1 elements"),
    "surplus": (stream(WHOLE) + b"123", "3 bytes belong to nothing"),
    "tensor too long": (stream({"w": Tensor(storage(), 1, (10,), (1,))}), "ends at byte 44 of storage 7, which has 40"),
    "tensor beyond its view": (
        stream({"w": Tensor(storage(view=("8", 4, 2)), 0, (3,), (1,))}),
        "ends at byte 12 of storage 7, which has 8",
    ),
    "shape of text": (stream({"w": Tensor(storage(), 0, ("4",), (1,))}), 'shape ("4",)'),
    "view too long": (stream({"w": Tensor(storage(view=("8", 5, 6)), 0, (1,), (1,))}), 'view ("8", 5, 6) of storage 7'),
    "view malformed": (stream({"w": Tensor(storage(view=("8", -1, 2)), 0, (1,), (1,))}), 'view ("8", -1, 2)'),
    "view of text": (stream({"w": Tensor(storage(view="8"), 0, (1,), (1,))}), 'view "8" of storage 7'),
    "two sizes": (stream([storage(), storage(numel=11)]), "content gives storage 7 both 40 and 44 bytes"),
    "negative size": (stream([storage(numel=-1)]), "malformed reference"),
    "endless size": (stream([storage(numel=1 << 63)]), "malformed reference"),
    "unknown type": (stream([storage(kind=collections.OrderedDict)]), "type collections.OrderedDict, whose size"),
    "other reference": (
        stream([Reference("storage", torch.FloatStorage, "7", "cpu", 10)]),
        "expected one to a storage",
    ),
    "reference of text": (stream([Reference("7")]), 'a reference ("7",), expected one to a storage'),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_malformed_file_is_refused_in_one_sentence(kind):
    data, message = REFUSED[kind]
    assert message in failure(data)
    if kind not in ("another version", "version of text", "big endian", "unknown type"):
        damage(data)


def test_surplus_bytes_name_both_sizes():
    data = stream(WHOLE)
    assert damage(data + bytes(7)) == (
        f"x.pt: has {len(data) + 7} bytes, and its tensors end at byte {len(data)}: 7 bytes belong to nothing."
    )


def test_truncated_file_names_both_sizes():
    data = saved({"w": torch.zeros(1000), "b": torch.zeros(1000)})
    for length in (len(data) - 1, len(data) - 4000, len(data) - 8000):
        assert damage(data[:length]) == f"x.pt: cut off after {length} bytes; its tensors end at byte {len(data)}."


def test_truncation_within_the_pickles_names_what_the_tensors_need():
    data = saved({"w": torch.zeros(1000), "b": torch.zeros(1000)})
    end = data.index(b"]q\x00(X") + 3  # within the list of keys
    assert damage(data[:end]) == (
        f"x.pt: cut off after {end} bytes: the pickle of its list of storages does not end. "
        "Its tensors alone need 8000 bytes."
    )


SMALL = saved({"w": torch.arange(6.0).view(2, 3), "n": {"lr": 0.1, "k": (1, None)}, "b": torch.arange(3)})


def test_a_call_hidden_in_any_of_the_pickles_is_kept_apart():
    call = b"cposix\nsystem\nX\x02\x00\x00\x00ls\x85R0"
    for part in range(1, 5):
        start = [i for i in range(len(SMALL)) if SMALL.startswith(b"\x80\x02", i)][part]
        archive = opened(SMALL[: start + 2] + call + SMALL[start + 2 :])
        assert list(archive.tensors) == ["w", "b"]
        assert [as_text(c) for c in archive.unused] == ['posix.system("ls")']


def test_only_the_beginning_and_the_counts_of_a_large_file_are_read(tmp_path):
    numel = 750_000_000
    data = stream({"w": Tensor(storage(numel=numel), 0, (numel,), (1,))}, counts=())
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        file.write(data + struct.pack("<q", numel))
        file.truncate(len(data) + 8 + 4 * numel)
    tracemalloc.start()
    with path.open("rb") as file:
        archive = open_torch_stream(file, str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert archive.tensors["w"].nbytes == 3_000_000_000
    assert archive.tensors["w"].offset == len(data) + 8
    assert peak < 4 << 20


def test_pickles_longer_than_the_first_read_are_read(monkeypatch):
    content = {"text": ["x" * 1000 + str(i) for i in range(50)], "w": torch.arange(5.0)}
    data = saved(content)
    monkeypatch.setattr("core.containers.torch_files.stream._FIRST_READ", 100)
    assert_same_as_torch(data, opened(data))
    monkeypatch.setattr("core.containers.torch_files.stream.LARGEST_PICKLE", 5000)
    assert "does not end within the first 5000 bytes" in damage(data)
