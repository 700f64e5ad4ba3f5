"""Conversions of modded-nanogpt's files: the model they become is the one that they are loaded as."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch

from core.checkpoint import CheckpointManager
from core.conversion.plan import Options
from core.conversion.planning import plan_conversion
from core.conversion.writing import convert
from core.families.rules import apply
from core.pretrained import load_pretrained_checkpoint
from tests.makers.conversions import converted, read, tensors_of
from tests.makers.modded_checkpoints import flex_model, upstream_file
from tests.makers.modded_models import VARIANTS
from tests.makers.modded_upstream import FILES
from tests.makers.models import manager, save_durably


def same_model(source, root, name) -> None:
    made = CheckpointManager.load_for_inference(name, root, device="cpu")
    reference, _, _ = load_pretrained_checkpoint(source, say=lambda line: None)
    weights, expected = made.state_dict(), reference.state_dict()
    assert type(made) is type(reference) and made.config.variant == reference.config.variant
    assert weights.keys() == expected.keys() and made.step == reference.step
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("folder", "file"), FILES)
def test_files_of_the_program_become_the_model_they_are_loaded_as(shared, tmp_path, folder, file):
    source = shared / "fixtures" / folder / file
    plan = converted(source, tmp_path / "b", "bundle")
    same_model(source, tmp_path, "b")
    said = "its 2 optimizer states are left out: only one can be included"
    assert (said in plan["notes"]) is ("step" in file)
    converted(source, tmp_path / "x.safetensors", "safetensors")
    first, second = tensors_of(source), tensors_of(tmp_path / "x.safetensors")
    assert all(first[f"model._orig_mod.{name}"] == tensor for name, tensor in second.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_version_and_its_way_back(tmp_path, variant):
    source = upstream_file(tmp_path / "state.pt", variant)
    with ExitStack() as held:
        plan = plan_conversion(source, tmp_path / "b", "bundle", Options(), held)
        convert(plan)
        ((rows, _),) = plan.model.route
        back = apply(rows, plan.model.tensors, plan.model.sizes, back=True).tensors
        for name, view in plan.model.sources.items():
            length = len(read(back[name])) if view.shape else None
            assert (read(back[name]) == read(view)[:length]).all()
    same_model(source, tmp_path, "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert (config["model_class"], config["variant"]) == ("GPTBatched", variant)


def test_our_bundles_of_both_classes_become_bundles_and_safetensors(tmp_path):
    flex = flex_model()
    save_durably(manager(tmp_path, "flex"), flex, step=3)
    save_durably(manager(tmp_path, "batched"), flex.batched(), step=3)
    for name in ("flex", "batched"):
        converted(tmp_path / name, tmp_path / f"{name}2", "bundle")
        made = CheckpointManager.load_for_inference(f"{name}2", tmp_path, device="cpu")
        ids = (torch.arange(256) * 7 % 60)[None]
        with torch.no_grad():
            assert torch.equal(made(ids)[0], flex.batched()(ids)[0])
    converted(tmp_path / "batched", tmp_path / "b.safetensors", "safetensors")
    assert tensors_of(tmp_path / "b.safetensors") == tensors_of(tmp_path / "batched/model.pt")


def test_vocabulary_and_value_tables_are_cropped_together(shared, tmp_path):
    source = shared / "fixtures" / FILES[0][0] / FILES[0][1]
    converted(source, tmp_path / "b", "bundle", vocab_size=500)
    shapes = {name: tensor[1] for name, tensor in tensors_of(tmp_path / "b/model.pt").items()}
    tables = ["embed.weight", "lm_head_w", "value_embeds.0.weight", "value_embeds.2.weight"]
    assert [shapes[name] for name in tables] == [(500, 128)] * 4
    assert CheckpointManager.load_for_inference("b", tmp_path, device="cpu").config.head_rows == 500
