"""Bundles of GPTFlexAttention and GPTBatched: saved, checked, loaded, shown and written with like those of GPT."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import generate
from core.checkpoint import CheckpointManager
from core.data import gpt2_ranks
from core.data.tokenizer import make_char
from core.errors import CheckpointMismatch
from core.model import GPTBatched, GPTFlexAttention
from core.pretrained import load_pretrained_checkpoint
from tests.conftest import ROOT
from tests.makers.modded_checkpoints import flex_model, upstream_file
from tests.makers.modded_models import VARIANTS
from tests.makers.models import equal, manager, save_durably, weights

TEXT = "".join(chr(c) for c in range(65, 65 + 60))
IDS = torch.arange(256) * 7 % 60


def saved(root, model, name="speed"):
    model.tokenizer = make_char([TEXT])
    save_durably(manager(root, name), model, step=9)
    return root / name


def script(name, *args, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), *map(str, args)], cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [GPTFlexAttention, GPTBatched])
def test_a_bundle_loads_as_the_class_its_config_names_and_computes_the_same(tmp_path, variant, kind):
    flex = flex_model(variant)
    model = flex if kind is GPTFlexAttention else flex.batched()
    folder = saved(tmp_path, model)
    assert json.loads((folder / "config.json").read_text())["model_class"] == kind.__name__
    loaded = CheckpointManager.load_for_inference("speed", tmp_path, device="cpu")
    assert type(loaded) is kind and loaded.step == 9 and loaded.tokenizer.vocab_size == 60
    assert equal(weights(loaded), weights(model))
    ids = IDS if kind is GPTFlexAttention else IDS[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])


@pytest.mark.parametrize("kind", ["flex", "batched"])
def test_one_call_opens_bundles_too(tmp_path, kind):
    flex = flex_model()
    folder = saved(tmp_path, flex if kind == "flex" else flex.batched())
    model, info, content = load_pretrained_checkpoint(folder, say=lambda line: None)
    assert type(model) is GPTBatched and info["step"] == 9 and content["config"]["variant"] == "small"
    with torch.no_grad():
        assert torch.equal(model(IDS[None])[0], flex.batched()(IDS[None])[0])


def test_a_live_model_and_its_padded_scalars_are_filled_from_a_bundle(tmp_path):
    model = flex_model()
    assert len(model.state_dict()["scalars"]) == 64
    saved(tmp_path, model)
    target = flex_model()
    with torch.no_grad():
        target.scalars.zero_()
    assert manager(tmp_path, "speed").load(target) == 9
    assert torch.equal(target.state_dict()["scalars"], model.state_dict()["scalars"])
    assert len(target.scalars) == 60


def test_a_config_that_does_not_fit_the_weights_is_refused_with_names_and_shapes(tmp_path):
    folder = saved(tmp_path, flex_model())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 14}))
    with pytest.raises(
        CheckpointMismatch, match=r"config\.json does not fit model\.pt: missing: blocks\.12\.attn\.qkv_w"
    ):
        CheckpointManager.load_for_inference("speed", tmp_path)
    (folder / "config.json").write_text(json.dumps({**config, "variant": "large"}))
    with pytest.raises(CheckpointMismatch, match=r"variant is 'large', expected small, small_2025_02, medium"):
        CheckpointManager.load_for_inference("speed", tmp_path)


def test_generate_writes_from_a_file_of_the_program(tmp_path, shared, monkeypatch, capsys):
    monkeypatch.setattr(gpt2_ranks, "BESIDE", tmp_path / "gpt2.tiktoken")
    path = upstream_file(tmp_path / "state_step001770.pt", vocab=50304)
    flags = ["--checkpoint", path, "--tokenization", "gpt2", "--bpe_file", shared / "data/gpt2.tiktoken", "--seed", 1]
    assert generate.main([*map(str, flags), "--prompt", "Hello", "--max_new_tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Hello") and "Format: small (from train_gpt_small.py)" in err
    assert (tmp_path / "gpt2.tiktoken").read_bytes() == (shared / "data/gpt2.tiktoken").read_bytes()
    without = script("generate", "--checkpoint", path, cwd=tmp_path)
    assert without.returncode == 1 and without.stdout == ""
    assert "no tokenizer in it or beside it. Give --tokenization gpt2" in without.stderr.splitlines()[-1]


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path, shared):
    path = upstream_file(tmp_path / "state.pt")
    flags = ["--tokenization", "gpt2", "--bpe_file", shared / "data/gpt2.tiktoken"]
    ran = script("generate", "--checkpoint", path, *flags, cwd=tmp_path)
    assert ran.returncode == 1 and "but the model has 61 rows. It does not fit this model." in ran.stderr


def test_checkpoint_and_model_name_together_are_wrong_use(tmp_path):
    ran = script("generate", "--checkpoint", "a.pt", "--model_name", "b", cwd=tmp_path)
    assert ran.returncode == 2 and "--checkpoint names a file" in ran.stderr


def test_inspection_names_the_variant_and_the_class(tmp_path):
    saved(tmp_path, flex_model("small_2025_02").batched())
    ran = script("inspect_model", "--model_name", "speed", "--checkpoint_root", tmp_path, cwd=tmp_path)
    assert ran.returncode == 0
    assert ran.stdout.splitlines()[1] == "Format: small (from train_gpt_small.py of 2025-02), as GPTBatched"
