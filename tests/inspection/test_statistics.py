"""Statistics from the bytes of a file; torch's own, in float64 over the finite elements, are the oracle."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.containers.container import Container
from core.containers.dcp.folder import open_dcp
from core.containers.open import open_container
from core.containers.spec import ITEM_SIZES, TensorSpec, dense_strides
from core.errors import CheckpointDamaged, CheckpointNotFound
from core.inspection import statistics as module
from core.inspection.statistics import BY_MAGNITUDE, TWO_IN_ONE, Stat, histogram, statistics
from tests.conftest import ROOT
from tests.makers.dcp_folders import Writer

FLOAT8 = [name for name in ITEM_SIZES if name.startswith("float8")]
FLOAT4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
"""The sixteen numbers of float4_e2m1, as the OCP specification of microscaling formats lists them."""


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as float64, whichever type they have."""
    if tensor.dtype == torch.float4_e2m1fn_x2:
        codes = tensor.view(torch.uint8).reshape(-1)
        return torch.tensor(FLOAT4, dtype=torch.float64)[torch.stack([codes & 15, codes >> 4], 1).reshape(-1).long()]
    if tensor.is_complex():
        parts = torch.view_as_real(tensor.resolve_conj()).double().reshape(-1, 2)
        return torch.hypot(parts[:, 0], parts[:, 1])
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return torch.tensor([float(n) for n in tensor.reshape(-1).tolist()], dtype=torch.float64)
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.reshape(-1).double()


def assert_like_torch(stat: Stat, tensor: torch.Tensor) -> None:
    all_numbers = numbers(tensor)
    finite = all_numbers[all_numbers.isfinite()]
    assert stat.count == len(all_numbers)
    assert stat.nan == int(all_numbers.isnan().sum()) and stat.inf == int(all_numbers.isinf().sum())
    assert stat.zeros == int((all_numbers == 0).sum())
    assert stat.zero_fraction == (stat.zeros / stat.count if stat.count else 0)
    if not len(finite):
        assert (stat.min, stat.max, stat.mean, stat.std, stat.norm) == (None, None, None, None, 0.0)
        return
    assert (float(stat.min), float(stat.max)) == (float(finite.min()), float(finite.max()))
    largest = float(finite.abs().max())
    scale = 2.0**-600 if largest > 1e150 else 1.0  # else torch's own squares are infinite
    near = {"rel": 1e-6, "abs": 1e-12 * largest}
    finite = finite * scale
    assert stat.mean == pytest.approx(float(finite.mean() / scale), **near)
    if len(finite) > 1:
        assert stat.std == pytest.approx(float(finite.std() / scale), **near)
    else:
        assert stat.std is None
    norm = float(finite.norm()) / scale
    assert stat.norm == pytest.approx(norm, rel=1e-6, abs=1e-160)


def container_of(path: Path, dtype: str, data: bytes) -> Container:
    """A file that is nothing but the elements of the tensor w."""
    path.write_bytes(data)
    shape = (len(data) // ITEM_SIZES[dtype],)
    spec = TensorSpec("w", dtype, shape, dense_strides(shape), 0, len(data), "0")
    return Container("", path, {"w": spec}, None, {path.name: len(data)})


def tensor_of(dtype: str, data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data) or bytearray(16), dtype=torch.uint8)[: len(data)].view(
        getattr(torch, dtype)
    )


@pytest.mark.parametrize("dtype", [*FLOAT8, "float4_e2m1fn_x2", "int8", "uint8", "float16", "bfloat16"])
def test_every_code_of_a_small_type_stands_for_the_number_that_torch_reads(tmp_path, dtype):
    if ITEM_SIZES[dtype] == 1:
        codes = [bytes([code]) for code in range(256)]
    else:
        codes = [code.to_bytes(2, "little") for code in range(1 << 16)]
    everything = b"".join(codes)
    container = container_of(tmp_path / "all", dtype, everything)
    assert_like_torch(next(statistics(container, ["w"])), tensor_of(dtype, everything))
    with numpy.errstate(invalid="ignore"):
        (decoded,) = [
            torch.from_numpy(block.astype("float64")) for block, _ in module._values(container, container.tensors["w"])
        ]
    expected = numbers(tensor_of(dtype, everything))
    assert torch.equal(decoded.isnan(), expected.isnan())
    real = ~expected.isnan()
    assert torch.equal(decoded[real], expected[real]) and torch.equal(decoded[real].signbit(), expected[real].signbit())


SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, -1.0, 5e-324, 1e-40, 1e-310, 3e38, -1.7e308, 0.1]


@st.composite
def bits(draw):
    """A type and elements of any bits; floats often have special values."""
    dtype = draw(st.sampled_from(list(ITEM_SIZES)))
    size = draw(st.integers(0, 40))
    kind = getattr(torch, dtype)
    if dtype in ("float64", "float32", "float16", "bfloat16", "complex64", "complex128") and draw(st.booleans()):
        values = draw(st.lists(st.sampled_from(SPECIAL), min_size=size, max_size=size))
        tensor = torch.tensor(values, dtype=torch.float64).to(kind)
        return dtype, tensor.view(torch.uint8).numpy().tobytes() if size else b""
    data = draw(st.binary(min_size=size * kind.itemsize, max_size=size * kind.itemsize))
    return dtype, bytes(byte & 1 for byte in data) if dtype == "bool" else data


@settings(max_examples=600, deadline=None)
@given(bits(), st.sampled_from([1, 2, 7, 1 << 16]))
def test_any_bits_of_any_type_have_the_statistics_that_torch_computes(tmp_path_factory, drawn, block):
    dtype, data = drawn
    container = container_of(tmp_path_factory.mktemp("bits") / "x", dtype, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        stat = next(statistics(container, ["w"]))
        parts = histogram(container, container.tensors["w"], 5)
    assert_like_torch(stat, tensor_of(dtype, data))
    assert (0 if parts is None else sum(parts.counts)) == stat.count - stat.nan - stat.inf
    notes = {"complex": BY_MAGNITUDE, "float4_": TWO_IN_ONE}
    assert stat.note == notes.get(dtype[:7], "")


def test_whole_numbers_keep_all_their_digits(tmp_path):
    values = torch.tensor([2**63 - 1, -(2**63), 0, 5])
    container = container_of(tmp_path / "x", "int64", values.numpy().tobytes())
    stat = next(statistics(container, ["w"]))
    assert (stat.min, stat.max, type(stat.min)) == (-(2**63), 2**63 - 1, int)


def test_millions_of_numbers_far_from_zero_keep_a_precise_deviation(tmp_path):
    torch.manual_seed(0)
    values = 1e6 + torch.randn(3_000_000, dtype=torch.float64)
    container = container_of(tmp_path / "x", "float64", values.numpy().tobytes())
    stat = next(statistics(container, ["w"]))
    assert stat.std == pytest.approx(float(values.std()), rel=1e-9)
    assert stat.mean == pytest.approx(float(values.mean()), rel=1e-12)


def test_a_constant_tensor_has_no_deviation(tmp_path):
    values = torch.full((200_001,), 0.1, dtype=torch.float64)
    container = container_of(tmp_path / "x", "float64", values.numpy().tobytes())
    stat = next(statistics(container, ["w"]))
    assert (stat.min, stat.mean, stat.std) == (0.1, 0.1, 0.0)


def test_views_blocks_and_empty_tensors_count_each_element_as_often_as_it_is_seen(tmp_path):
    table = torch.randn(30, 20)
    table[3, 4], table[5, 6], table[7] = math.nan, math.inf, 0
    tensors = {
        "table": table,
        "turned": table.t(),
        "part": table[2:9, 1::3],
        "repeated": table[:, :1].expand(30, 9),
        "permuted": table.reshape(5, 6, 20).permute(2, 0, 1),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "empty and repeated": torch.ones(5).as_strided((0, 5), (0, 1)),
    }
    torch.save(tensors, tmp_path / "a.pt")
    stats = list(statistics(open_container(tmp_path / "a.pt"), tensors))
    assert [stat.name for stat in stats] == list(tensors)
    for stat, tensor in zip(stats, tensors.values(), strict=True):
        assert_like_torch(stat, tensor)
    writer = Writer(tmp_path / "dcp")
    writer.tensor("w", table, [((0, 0), (10, 20)), ((10, 0), (20, 5)), ((10, 5), (20, 15))])
    assert_like_torch(next(statistics(open_dcp(writer.close()), ["w"])), table)


def test_a_scalar_repeated_a_trillion_times_takes_no_time(tmp_path):
    torch.save({"w": torch.tensor([2.0]).expand(1 << 20, 1 << 20)}, tmp_path / "a.pt")
    container = open_container(tmp_path / "a.pt")
    stat = next(statistics(container, ["w"]))
    assert (stat.count, stat.mean, stat.std, stat.norm) == (1 << 40, 2.0, 0.0, 2.0 * 2**20)
    found = histogram(container, container.tensors["w"], 3)
    assert (found.low, found.high, found.counts) == (2.0, 2.0, [1 << 40, 0, 0])


def test_windows_that_overlap_without_end_are_not_read_and_the_others_are(tmp_path):
    windows = torch.arange(40_000.0).as_strided((20_000, 20_000), (1, 1))
    torch.save({"w": windows, "b": torch.ones(2)}, tmp_path / "a.pt")
    container = open_container(tmp_path / "a.pt")
    first, second = statistics(container, ["w", "b"])
    size = (tmp_path / "a.pt").stat().st_size
    expected = f"has {4 * 20_000**2} bytes, all files together {size}: a view that repeats its elements, not read"
    assert (first.count, first.min, first.note) == (20_000**2, None, expected)
    assert second.mean == 1.0
    assert histogram(container, container.tensors["w"], 3) is None


def test_tied_tensors_are_read_once(tmp_path):
    table = torch.randn(50, 4)
    torch.save({"wte": table, "head": table}, tmp_path / "a.pt")
    told = []
    first, second = statistics(open_container(tmp_path / "a.pt"), ["wte", "head"], told.append)
    assert (first.name, second.name, first.mean) == ("wte", "head", second.mean)
    assert sum(told) == 800


@pytest.mark.parametrize("bins", [1, 7, 64])
def test_a_histogram_has_the_counts_of_torch(tmp_path, bins):
    torch.manual_seed(2)
    values = torch.randn(100_000)
    values[5], values[6] = math.nan, -math.inf
    container = container_of(tmp_path / "x", "float32", values.numpy().tobytes())
    found = histogram(container, container.tensors["w"], bins)
    finite = values[values.isfinite()].double()
    assert (found.low, found.high) == (float(finite.min()), float(finite.max()))
    expected = torch.histc(finite, bins, found.low, found.high).long()
    assert found.counts == expected.tolist()
    assert sum(found.counts) == 99_998


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([0, 1, 2, 3, 4], [1, 1, 1, 2]),
        ([5e-324, 0, 0], [2, 0, 0, 1]),
        ([1.0, 1.0000000000000002], [1, 0, 0, 1]),
        ([1.7e308, -1.7e308, 0], [1, 0, 1, 1]),
        ([3, 3], [2, 0, 0, 0]),
    ],
    ids=["each edge is the next part's", "denormal", "neighbours", "the whole range", "constant"],
)
def test_the_parts_of_a_histogram_are_right_at_the_limits_of_float64(tmp_path, values, counts):
    data = torch.tensor(values, dtype=torch.float64).numpy().tobytes()
    container = container_of(tmp_path / "x", "float64", data)
    assert histogram(container, container.tensors["w"], 4).counts == counts


def test_a_histogram_of_nothing_finite_is_none(tmp_path):
    container = container_of(tmp_path / "x", "float32", torch.tensor([math.nan, math.inf]).numpy().tobytes())
    assert histogram(container, container.tensors["w"], 4) is None


def test_a_file_that_is_cut_off_or_gone_is_an_error_with_its_path(tmp_path):
    container = container_of(tmp_path / "x", "float32", bytes(4000))
    (tmp_path / "x").write_bytes(bytes(1000))
    with pytest.raises(CheckpointDamaged, match=r"x: w ends after 1000 of 4000 bytes of the file\. It was cut off"):
        list(statistics(container, ["w"]))
    (tmp_path / "x").unlink()
    with pytest.raises(CheckpointNotFound, match="x: cannot be opened"):
        list(statistics(container, ["w"]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process so")
def test_a_large_tensor_needs_little_memory_and_no_torch(tmp_path):
    torch.save({"w": torch.arange(40_000_000, dtype=torch.float32).reshape(8000, 5000).t()}, tmp_path / "a.pt")
    code = rf"""
import re, sys
from pathlib import Path
from core.containers.open import open_container
from core.inspection import statistics
assert "numpy" not in sys.modules
import numpy
def peak(): return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
container = open_container(Path({str(tmp_path / "a.pt")!r}))
(stat,) = statistics.statistics(container, ["w"])
statistics.histogram(container, container.tensors["w"], 64, stat)
assert stat.count == 40_000_000
print(peak() - before, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    grown, with_torch = done.stdout.split()
    assert int(grown) < 50_000 and with_torch == "False"  # kilobytes
