"""A sharded BAGEL checkpoint becomes what the published model is: by both command lines, main weights and EMA."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

import convert_checkpoints
from core.errors import CheckpointDamaged, CheckpointMismatch
from tests.makers import bagel
from tests.makers.conversions import Killed, MortalDisk, converted, index_of
from tests.makers.torch_files import bits

PATCHES = "vit_model.vision_model.embeddings.patch_embedding.weight"


class Pair:
    """A step of training, and the model that it began with."""

    def __init__(self, root: Path) -> None:
        self.main, self.ema = bagel.trained(1), bagel.trained(2)
        self.published = bagel.tensors(27, 3, torch.bfloat16, is_linear=True)
        self.step = bagel.write_step(root / "0000002", self.main, self.ema, 3)
        self.original = bagel.write_original(root / "BAGEL-7B-MoT", self.published)

    def expected(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
        made[PATCHES] = made[PATCHES].permute(0, 2, 3, 1).reshape(bagel.VISION, -1).contiguous()
        return {**self.published, **made}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("bagel"))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [n for n in expected if found[n].dtype != expected[n].dtype or found[n].shape != expected[n].shape]
    assert wrong + [n for n in expected if n not in wrong and not torch.equal(bits(found[n]), bits(expected[n]))] == []


def load(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def test_pair_has_the_true_counts(pair):
    assert [len(dict(part)) for part in (bagel.language(), bagel.rest())] == [788, 14]
    assert [len(dict(bagel.vision(n, True))) for n in (26, 27)] == [421, 437]
    assert (len(pair.main), len(pair.published)) == (1223, 1239)


# both command lines


@pytest.mark.parametrize("is_ema", [False, True])
@pytest.mark.parametrize("is_seeds", [False, True])
def test_both_spellings_write_the_published_model_with_the_weights_of_the_step(
    pair, is_ema, is_seeds, tmp_path, capsys
):
    out = tmp_path / "out" / ("ema.safetensors" if is_ema else "model.safetensors")
    words = [str(pair.step), str(out), "--to", "safetensors", "--match_original", str(pair.original)]
    if is_seeds:
        words = ["--checkpoint_dir", str(pair.step), "--output_path", str(out)]
        words += ["--model_path", str(pair.original), "--match_original"]
    assert convert_checkpoints.main([*words, *(["--save_ema"] if is_ema else [])]) == 0
    found = load(out)
    assert len(found) == 1239
    assert_same(found, pair.expected(pair.ema if is_ema else pair.main))
    assert not torch.equal(found["vae2llm.weight"], pair.expected(pair.main if is_ema else pair.ema)["vae2llm.weight"])
    said = capsys.readouterr().out.splitlines()
    taken = [line.split()[-1] for line in said if "taken from the original" in line]
    assert sorted(taken) == sorted(name for name in pair.published if "vision_model.encoder.layers.26." in name)
    assert len(taken) == 16
    assert any("16 of 1239 tensors are not in" in line for line in said)
    assert any(": safetensors, 1239 tensors, bfloat16" in line for line in said)
    assert any("1223 tensors are cast from float32 to bfloat16" in line for line in said)
    assert sorted(p.name for p in out.parent.iterdir()) == sorted([*bagel.COPIED, out.name])
    assert all((out.parent / name).read_bytes() == (pair.original / name).read_bytes() for name in bagel.COPIED)


@pytest.mark.parametrize("to", ["safetensors", "hf"])
def test_a_folder_has_the_files_and_the_index_of_the_original(pair, to, tmp_path):
    converted(pair.step, tmp_path / "made", to, more={"match_original": pair.original})
    assert index_of(tmp_path / "made") == index_of(pair.original)
    found = {}
    for name in sorted(set(index_of(pair.original)["weight_map"].values())):
        held = load(tmp_path / "made" / name)
        assert held.keys() == load(pair.original / name).keys()
        found |= held
    assert_same(found, pair.expected(pair.main))
    assert {p.name for p in (tmp_path / "made").iterdir()} == {p.name for p in pair.original.iterdir()} - {"README.md"}


def test_shard_size_cuts_other_files(pair, tmp_path):
    converted(pair.step, tmp_path / "made", "hf", shard_size=30_000, more={"match_original": pair.original})
    places = index_of(tmp_path / "made")["weight_map"]
    assert len(places) == 1239 and len(set(places.values())) > 2


def test_the_original_may_be_named_by_its_index_or_its_one_file(pair, tmp_path):
    whole = bagel.write_original(tmp_path / "whole", pair.published, files=1)
    (whole / "model-00001-of-00001.safetensors").rename(whole / "ema.safetensors")
    (whole / "model.safetensors.index.json").unlink()
    for k, named in enumerate((whole / "ema.safetensors", pair.original / "model.safetensors.index.json")):
        converted(pair.step, tmp_path / f"made{k}", "safetensors", more={"match_original": named})
        assert {p.name for p in (tmp_path / f"made{k}").iterdir()} >= set(bagel.COPIED)
    assert_same(load(tmp_path / "made0/model.safetensors"), pair.expected(pair.main))
    assert index_of(tmp_path / "made1") == index_of(pair.original)
    with pytest.raises(CheckpointMismatch, match=r"found no safetensors|found ema\.safetensors, expected model\."):
        converted(pair.step, tmp_path / "x", "safetensors", more={"match_original": whole})


def test_a_config_that_is_there_already_stays(pair, tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    words = [str(pair.step), str(tmp_path / "m.safetensors"), "--to", "safetensors"]
    assert convert_checkpoints.main([*words, "--match_original", str(pair.original)]) == 0
    assert (tmp_path / "config.json").read_text() == "mine"
    assert "config.json: was there already, other than" in capsys.readouterr().out


def test_a_lost_metadata_of_the_model_is_rebuilt_after_the_ema(pair, tmp_path):
    step = bagel.write_step(tmp_path / "0000003", pair.main, pair.ema, 3)
    (step / "model_sharded/.metadata").unlink()
    converted(step, tmp_path / "m.safetensors", "safetensors", more={"match_original": pair.original})
    assert_same(load(tmp_path / "m.safetensors"), pair.expected(pair.main))


# what is refused


def refused(pair: Pair, folder: Path, changed: dict[str, torch.Tensor], words: str, **options) -> None:
    step = bagel.write_step(folder / "0000009", changed, None, 2)
    more = {"match_original": pair.original, **options.pop("more", {})}
    with pytest.raises(CheckpointMismatch, match=words):
        converted(step, folder / "m.safetensors", options.pop("to", "safetensors"), more=more, **options)
    assert sorted(p.name for p in folder.iterdir()) == ["0000009"]


def test_surplus_is_refused(pair, tmp_path):
    more = {**pair.main, "surplus.weight": torch.ones(2)}
    refused(
        pair, tmp_path, more, r"1 of its 1224 tensors are not among the 1239 of .*: surplus\.weight\. No tensor is left"
    )


@pytest.mark.parametrize("name", ["vae2llm.weight", PATCHES])
def test_another_shape_is_refused(pair, name, tmp_path):
    words = rf"{name} is \(5, 2, 2, 2\), in the original"
    refused(pair, tmp_path, {**pair.main, name: torch.ones(5, 2, 2, 2)}, words)


def test_a_step_without_ema_is_refused(pair, tmp_path):
    words = "found model, optimizer, expected ema_sharded/.* Leave out --save_ema"
    refused(pair, tmp_path, pair.main, words, more={"save_ema": True})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "pt"}, "--match_original writes safetensors"),
        ({"to": "hf"}, "--to hf writes a folder"),
        ({"dtype": "float16"}, "Leave out --dtype"),
        ({"shard_size": 10}, "--shard_size cuts it"),
    ],
)
def test_what_contradicts_the_original_is_refused(pair, options, words, tmp_path):
    refused(pair, tmp_path, pair.main, words, **options)


def test_the_original_is_only_read(pair):
    more = {"match_original": pair.original}
    with pytest.raises(CheckpointMismatch, match="lies in the original"):
        converted(pair.step, pair.original / "new.safetensors", "safetensors", more=more)
    with pytest.raises(CheckpointMismatch, match=r"found no safetensors, expected model\.safetensors or"):
        converted(pair.step, pair.step.parent / "x", "safetensors", more={"match_original": pair.step})


def test_proof_sees_a_wrong_byte_of_the_original_and_of_the_step(pair, tmp_path, monkeypatch):
    from core.conversion import writing as convert

    taken = "vit_model.vision_model.encoder.layers.26.mlp.fc1.weight"
    for name in (taken, PATCHES, "vae2llm.bias"):

        def wrong(gatherer, target, progress, real=convert.elements, name=name):
            for piece in real(gatherer, target, progress):
                data = bytearray(piece)
                data[0] ^= target.name == name
                yield memoryview(data)

        with monkeypatch.context() as patch, pytest.raises(CheckpointDamaged, match=name):
            patch.setattr(convert, "elements", wrong)
            converted(pair.step, tmp_path / "m.safetensors", "safetensors", more={"match_original": pair.original})
        assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_leaves_nothing_to_be_seen_and_can_be_run_again(pair, tmp_path, monkeypatch):
    """Before calls spread over all: before, during and after writing, and while the configs are copied."""
    target, disk = tmp_path / "made.safetensors", MortalDisk(monkeypatch)

    def convert() -> None:
        converted(pair.step, target, "safetensors", more={"match_original": pair.original})

    convert()
    expected, calls = target.read_bytes(), disk.calls
    assert calls >= 16
    for k in range(8):
        target.unlink(missing_ok=True)
        disk.live(calls * k // 8)
        with pytest.raises(Killed):
            convert()
        assert not target.exists() or target.read_bytes() == expected
        visible = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".convert-")}
        assert visible <= {*bagel.COPIED, target.name}
    target.unlink(missing_ok=True)
    disk.live()
    convert()
    assert target.read_bytes() == expected
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".convert-")] == []
