"""Tensors of anything in safetensors and torch files: casts, ties, shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.errors import CheckpointMismatch
from tests.makers.conversions import converted, expected, hf_logits, index_of, same, tensors_of

# Casts


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float32"])
def test_a_cast_rounds_as_torch_does(hf, tmp_path, dtype):
    converted(hf, tmp_path / "x.pt", "pt", dtype=dtype)
    made = torch.load(tmp_path / "x.pt", weights_only=True)
    for name, tensor in load_file(hf / "model.safetensors").items():
        assert torch.equal(made[name], tensor.to(getattr(torch, dtype)))


@pytest.mark.full
def test_transformers_computes_in_the_dtype_of_a_cast_and_the_same_logits_from_shards(hf, tmp_path):
    ids, logits = expected(hf)
    converted(hf, tmp_path / "cast", "hf", dtype="bfloat16")
    assert hf_logits(tmp_path / "cast", ids).dtype == torch.bfloat16
    converted(hf, tmp_path / "shards", "safetensors", shard_size=30_000)
    assert (hf_logits(tmp_path / "shards", ids) - logits).abs().max() < 1e-5


def test_odd_numbers_are_cast_as_torch_casts_them_and_what_is_too_large_is_refused(tmp_path):
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    odd = bits.view(torch.float32)
    odd[odd.abs() > 3.3e38] = 1.0  # finite, and beyond bf16: the last of these tests
    odd[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 3.3895e38])
    torch.save({"odd": odd}, tmp_path / "odd.pt")
    converted(tmp_path / "odd.pt", tmp_path / "b.pt", "pt", dtype="bfloat16")
    made = torch.load(tmp_path / "b.pt", weights_only=True)["odd"]
    wanted = odd.to(torch.bfloat16)
    assert torch.equal(made.isnan(), wanted.isnan())
    assert torch.equal(made[~made.isnan()].view(torch.int16), wanted[~made.isnan()].view(torch.int16))
    torch.save({"large": torch.tensor([1.0, 7e4])}, tmp_path / "large.pt")
    with pytest.raises(CheckpointMismatch, match=r"large holds 70000, which is beyond float16. Keep the dtype"):
        converted(tmp_path / "large.pt", tmp_path / "c.pt", "pt", dtype="float16")
    assert not (tmp_path / "c.pt").exists()


# Safetensors and torch files of anything


def test_safetensors_and_torch_files_of_anything_become_each_other(tmp_path):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 5, generator=generator)
    content = {
        "a.weight": table,
        "tied": table,
        "turned": torch.randn(4, 6, generator=generator).t(),
        "part": torch.arange(100).reshape(10, 10)[2:5, ::3],
        "half": torch.randn(3).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "wide": torch.tensor([1, 2], dtype=torch.uint32),
        "eight": torch.ones(3).to(torch.float8_e4m3fn),
    }
    torch.save(content, tmp_path / "x.pt")
    plan = converted(tmp_path / "x.pt", tmp_path / "y.safetensors", "safetensors")
    assert plan["dropped"] == {"tied": "tied to a.weight, and safetensors has no tied tensors"}
    made = load_file(tmp_path / "y.safetensors")

    assert same(made, {name: tensor for name, tensor in content.items() if name != "tied"})
    converted(tmp_path / "y.safetensors", tmp_path / "z.pt", "pt")
    again = torch.load(tmp_path / "z.pt", weights_only=True, mmap=True)
    assert same(again, made)
    converted(tmp_path / "x.pt", tmp_path / "t.pt", "pt")
    tied = torch.load(tmp_path / "t.pt", weights_only=True)
    assert tied["tied"].data_ptr() == tied["a.weight"].data_ptr() and list(tied) == list(content)
    converted(tmp_path / "x.pt", tmp_path / "u.safetensors", "safetensors", tied=False)
    assert torch.equal(load_file(tmp_path / "u.safetensors")["tied"], table)


def test_files_in_shards_have_a_correct_index_and_go_along_with_config_and_tokenizer(hf, tmp_path):
    (tmp_path / "in").mkdir()
    source = Path(shutil.copytree(hf, tmp_path / "in/hf"))
    (source / "vocab.json").write_text("{}")
    converted(source, tmp_path / "out", "safetensors", shard_size=30_000)
    index = index_of(tmp_path / "out")
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 3 and files == sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert all(load_file(tmp_path / "out" / file).keys() for file in files)
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())
    assert (tmp_path / "out/vocab.json").read_text() == "{}"
    assert tensors_of(tmp_path / "out") == tensors_of(hf)
