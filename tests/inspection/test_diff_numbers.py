"""What changed between two tensors, element by element, and in how much memory."""

from __future__ import annotations

import math
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import core.inspection.diff.change
from core.containers.tensors.dtypes import decode
from core.errors import CheckpointDamaged
from core.inspection.diff.comparison import compare
from core.inspection.diff.side import Side
from core.inspection.diff.text import _rounded, comparison_facts
from core.inspection.inspect import inspect_path
from tests.makers.comparisons import compared, saved, text, with_optimizer


def one_change(a: torch.Tensor, b: torch.Tensor, folder: Path) -> core.inspection.diff.change.Change:
    """The change of one tensor between two files."""
    found = compared(saved(folder / "a.pt", {"w": a}), saved(folder / "b.pt", {"w": b}))
    (pair,) = found.weights.different
    assert pair.change is not None
    return pair.change


def test_names_shapes_and_dtypes_are_told_apart(tmp_path: Path):
    a = {"same": torch.ones(3), "gone": torch.ones(2), "shape": torch.ones(2, 3), "cast": torch.tensor([1.0, 0.1])}
    b = {"same": torch.ones(3), "new": torch.ones(4), "shape": torch.ones(3, 2), "cast": a["cast"].bfloat16()}
    found = compared(saved(tmp_path / "a.pt", a), saved(tmp_path / "b.pt", b))
    assert (list(found.weights.only_a), list(found.weights.only_b)) == (["gone"], ["new"])
    shape, cast = found.weights.different
    assert (shape.title, shape.change, shape.a.shape, shape.b.shape) == ("shape", None, (2, 3), (3, 2))
    assert (cast.a.dtype, cast.b.dtype, cast.change.changed) == ("float32", "bfloat16", 1)
    assert cast.change.absolute == abs(np.float32(0.1) - float(b["cast"][1]))
    assert "float32 and bfloat16" in text(found) and "A (2, 3) float32  B (3, 2) float32" in text(found)


def test_equal_bytes_of_two_dtypes_are_two_values(tmp_path: Path):
    whole = torch.tensor([2.0])
    change = one_change(whole, whole.view(torch.int32), tmp_path)
    assert (change.changed, change.absolute) == (1, float(0x40000000 - 2))


def test_cast_without_loss_differs_in_dtype_alone(tmp_path: Path):
    a = torch.tensor([1.0, -2.5, math.inf, math.nan, 0.0])
    change = one_change(a, a.bfloat16(), tmp_path)
    assert (change.elements, change.changed, change.nan, change.absolute) == (5, 0, 0, 0.0)


def test_nan_and_infinity_are_counted_and_never_hide_a_change(tmp_path: Path):
    a = torch.tensor([math.nan, math.nan, 1.0, math.inf, 2.0, 0.0])
    b = torch.tensor([math.nan, 3.0, math.nan, math.inf, 2.5, -0.0])
    change = one_change(a, b, tmp_path)
    assert (change.changed, change.nan, change.absolute, change.relative) == (4, 2, 0.5, 0.2)
    lost = compared(
        saved(tmp_path / "a.pt", {"w": torch.tensor([math.inf, 1.0])}), saved(tmp_path / "b.pt", {"w": a[:2]})
    )
    assert (
        lost.weights.different[0].change.nan,
        comparison_facts(lost)["weights"]["different"][0]["change"]["nan"],
    ) == (2, 2)
    change = one_change(torch.tensor([math.inf]), torch.tensor([-math.inf]), tmp_path)
    assert (change.absolute, change.relative) == (math.inf, math.inf)


def test_tensor_with_nan_comes_first(tmp_path: Path):
    a = {"small": torch.zeros(2), "large": torch.zeros(2), "nan": torch.zeros(2), "same": torch.zeros(1)}
    b = {**a, "small": torch.tensor([0.0, 1e-9]), "large": torch.tensor([7.0, 0.0]), "nan": torch.tensor([math.nan, 0])}
    found = compared(saved(tmp_path / "a.pt", a), saved(tmp_path / "b.pt", b))
    assert [pair.title for pair in found.weights.different] == ["nan", "large", "small"]
    assert "1 with NaN" in text(found)


def test_large_integers_are_compared_exactly(tmp_path: Path):
    change = one_change(torch.tensor([2**62, -(2**63)]), torch.tensor([2**62 + 1, 2**63 - 1]), tmp_path)
    assert (change.changed, change.absolute) == (2, float(2**64 - 1))
    change = one_change(torch.tensor([2**62]), torch.tensor([2**62 + 1]), tmp_path)
    assert (change.changed, change.absolute) == (1, 1.0)


DTYPES = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_those_of_torch(dtype: str, tmp_path: Path):
    torch.manual_seed(1)
    kind = getattr(torch, dtype)
    a, b = ((torch.randn(50, 40) * 20).relu().to(kind) for _ in range(2))
    x, y = a.double(), b.double()
    change = one_change(a, b, tmp_path)
    assert (change.elements, change.nan) == (2000, 0)
    assert change.changed == (a.view(torch.uint8).view(2000, -1) != b.view(torch.uint8).view(2000, -1)).any(1).sum()
    assert change.absolute == (x - y).abs().max().item()
    assert change.relative == ((x - y).abs() / torch.maximum(x.abs(), y.abs())).nan_to_num(0).max().item()


def test_two_numbers_of_a_byte_are_one_element():
    assert decode(bytes([0x21, 0xF7]), "float4_e2m1fn_x2").tolist() == [0.5, 1.0, 6.0, -6.0]
    change = core.inspection.diff.change._measure(b"\x21\x00", "float4_e2m1fn_x2", b"\x31\x00", "float4_e2m1fn_x2")
    assert (change.changed, change.absolute) == (1, 0.5)


def test_two_numbers_in_an_element_are_not_compared_with_one(tmp_path: Path):
    whole = torch.tensor([1, 2], dtype=torch.uint8)
    found = compared(
        saved(tmp_path / "a.pt", {"w": whole}), saved(tmp_path / "b.pt", {"w": whole.view(torch.float4_e2m1fn_x2)})
    )
    assert found.weights.different[0].change is None
    assert "A (2,) uint8  B (2,) float4_e2m1fn_x2" in text(found)


@pytest.mark.parametrize("dtype", ["complex32", "complex64", "complex128"])
def test_complex_numbers_are_measured_by_their_distance(dtype: str):
    half = {"complex32": "<f2", "complex64": "<f4", "complex128": "<f8"}[dtype]
    a, b = np.array([0, 0, 3, 4], half).tobytes(), np.array([3, 4, 3, 4], half).tobytes()
    change = core.inspection.diff.change._measure(a, dtype, b, dtype)
    assert (change.changed, change.absolute, change.relative) == (1, 5.0, 1.0)


def test_equal_bytes_are_not_decoded(tmp_path: Path, monkeypatch):
    tensors = {"w": torch.randn(300_000)}
    a, b = saved(tmp_path / "a.pt", tensors), saved(tmp_path / "b.pt", tensors)
    monkeypatch.setattr(core.inspection.diff.change, "decode", lambda data, dtype: pytest.fail("decoded"))
    assert compared(a, b).equal


def test_change_in_the_last_element_of_many_pieces_is_found(tmp_path: Path):
    a = torch.zeros(5_000_000)
    b = a.clone()
    b[-1] = 1.0
    told: list[int] = []
    found = compared(saved(tmp_path / "a.pt", {"w": a}), saved(tmp_path / "b.pt", {"w": b}), progress=told.append)
    (pair,) = found.weights.different
    assert (pair.change.elements, pair.change.changed, pair.change.absolute) == (5_000_000, 1, 1.0)
    assert sum(told) == 40_000_000


def test_memory_is_a_few_pieces_whatever_the_size(tmp_path: Path):
    a = torch.zeros(2, 12_500_000)
    b = a + 1
    first, second = saved(tmp_path / "a.pt", {"w": a}), saved(tmp_path / "b.pt", {"w": b})
    tracemalloc.start()
    try:
        assert compared(first, second).weights.different[0].change.changed == 25_000_000
        assert tracemalloc.get_traced_memory()[1] < 60_000_000, "of 200 MB"
    finally:
        tracemalloc.stop()


def test_views_and_transposes_are_compared_by_their_elements(tmp_path: Path):
    base = torch.arange(24.0).reshape(4, 6)
    a = saved(tmp_path / "a.pt", {"t": base.t(), "cut": base[1:3, ::2], "wide": base[:, :1].expand(4, 5)})
    b = {name: t.contiguous() for name, t in torch.load(a, weights_only=True).items()}
    assert compared(a, saved(tmp_path / "b.pt", b)).equal
    b["t"][5, 3] += 2
    (pair,) = compared(a, saved(tmp_path / "b.pt", b)).weights.different
    assert (pair.title, pair.change.changed, pair.change.absolute) == ("t", 1, 2.0)


def test_tied_tensors_are_read_once(tmp_path: Path, shared: Path):
    model = torch.load(shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt", weights_only=True)["model"]
    path = saved(tmp_path / "a.pt", model, iter_num=1)
    told: list[int] = []
    assert compared(path, path, progress=told.append).equal
    assert sum(told) == 2 * sum(t.nbytes for name, t in model.items() if name != "lm_head.weight")


def test_views_of_one_storage_are_told_apart(tmp_path: Path):
    base, other = torch.arange(16.0).reshape(4, 4), torch.arange(16.0).reshape(4, 4)
    other[3, 0] = 50
    a = {"upper": base[:2], "lower": base[2:], "square": base, "turned": base.t()}
    b = {"upper": other[:2], "lower": other[2:], "square": other, "turned": other}
    found = compared(saved(tmp_path / "a.pt", a), saved(tmp_path / "b.pt", b))
    assert {pair.title: pair.change.changed for pair in found.weights.different} == {
        "lower": 1,
        "square": 1,
        "turned": 12,
    }


def test_settings_are_rounded_to_four_digits_or_to_where_they_differ():
    assert (_rounded(0.0006930693069306931, 0.001), _rounded(0.001, 0.0006930693069306931)) == ("0.0006931", "0.001")
    assert (_rounded(0.12345678, 0.12345679), _rounded(1.0, None)) == ("0.12345678", "1")
    assert _rounded(math.nextafter(0.1, 1), 0.1) == "0.10000000000000002"


def test_long_lists_are_cut(tmp_path: Path):
    a = {f"w{i}": torch.zeros(1) for i in range(50)}
    b = {name: tensor + 1 for name, tensor in a.items()}
    found = compared(saved(tmp_path / "a.pt", a), saved(tmp_path / "b.pt", b))
    lines = text(found).splitlines()
    assert sum(" 1 of 1" in line for line in lines) == 39 and "    ... and 11 more; --json lists all" in lines
    assert len(comparison_facts(found)["weights"]["different"]) == 50


def test_scalars_and_empty_tensors_are_compared(tmp_path: Path):
    a = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "longer": torch.zeros(0, 4)}
    b = {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4), "longer": torch.zeros(0, 5)}
    found = compared(saved(tmp_path / "a.pt", a), saved(tmp_path / "b.pt", b))
    assert [pair.title for pair in found.weights.different] == ["longer", "scalar"]
    assert found.weights.different[1].change.absolute == 0.5


def test_tensor_that_lacks_a_part_is_compared_part_by_part(shared: Path, tmp_path: Path):
    original = shared / "fixtures/lecture_char/legacy/latest.pt"
    content = torch.load(original, weights_only=True)
    del content["model_state_dict"]["blocks.1.sa.heads.2.value.weight"]
    torch.save(content, broken := tmp_path / "latest.pt")
    found = compared(original, broken)
    assert "weights" in found.different and not found.weights.different
    assert list(found.weights.only_a) == ["blocks.1.sa.heads.2.value.weight"]
    said = "blocks.1.sa.qkv.weight of B: blocks.1.sa.heads.2.value.weight is missing"
    assert found.weights.notes == [said] and said in text(found)
    assert compared(broken, broken, moments=True).equal


def test_parts_of_two_shapes_are_compared_part_by_part(shared: Path, tmp_path: Path):
    original = shared / "fixtures/lecture_char/legacy/final.pt"
    content = torch.load(original, weights_only=True)
    content["model_state_dict"]["blocks.1.sa.heads.0.key.weight"] = torch.zeros(5, 48)
    torch.save(content, broken := tmp_path / "final.pt")
    found = compared(original, broken)
    (pair,) = found.weights.different
    assert (pair.title, pair.a.shape, pair.b.shape) == ("blocks.1.sa.heads.0.key.weight", (12, 48), (5, 48))
    assert compared(broken, broken).equal


def test_large_tensors_among_settings_compare_by_their_bytes(tmp_path: Path):
    a = with_optimizer(tmp_path / "a.pt", {}, lr=[torch.zeros(40), torch.tensor([1 + 1j])])
    b = with_optimizer(tmp_path / "b.pt", {}, lr=[torch.ones(40), torch.tensor([1 + 1j])])
    found = compare(a, b)
    assert compare(a, a).equal and list(found.optimizer.different) == ["group 0: lr"] and text(found)
    assert f"CRC32 {zlib.crc32(bytes(160)):08x}" in found.optimizer.different["group 0: lr"][0][0]
    assert found.optimizer.different["group 0: lr"][0][1] == found.optimizer.different["group 0: lr"][1][1]


def test_file_that_ended_meanwhile_is_damaged(tmp_path: Path):
    path = saved(tmp_path / "a.pt", {"w": torch.zeros(1000)})
    with inspect_path(path) as first, inspect_path(path) as second:
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(CheckpointDamaged, match=str(path)):
            compare(Side(first), Side(second))
