"""What goes along when a single-file checkpoint becomes a bundle, and what is compared before it counts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from core.bundle.training_state import STATE
from core.checkpoint import CheckpointManager
from core.containers.tensors.views import concatenate, slice_axis
from core.conversion.migration import migrate as rewrite
from core.conversion.migration.plan import BUNDLE, FAILED
from core.families.rules import Concat
from core.model import GPT
from tests.makers.generations import EXTRA, SIZES, TOKENIZER, FusedGPT, fuse, write_single_file
from tests.makers.migrations import bits, edit, listing, migrated, plain, write
from tests.makers.models import flip, state_of
from tests.makers.old_runs import assert_same_bits

# What goes along


def test_training_state_has_what_the_file_said_and_where_it_came_from(folder):
    write(folder, "latest.pt", 30, training_config={"max_iters": 31, "lr": 1e-3})
    edit(folder / "latest.pt", lambda content: content.update(val_loss=1.25, betas=(0.9, 0.95)))
    outcome = migrated(folder)["latest.pt"]
    state = state_of(folder)
    assert state["training_config"] == {"max_iters": 31, "lr": 1e-3}
    assert (state["val_loss"], state["betas"], state["best"], state["parent"]) == (1.25, [0.9, 0.95], None, None)
    assert state["migrated_from"] == outcome.fingerprint
    assert state["migrated_from"]["size"] == (folder / "latest.pt").stat().st_size
    assert outcome.may_be_deleted and outcome.notes == [
        f"{folder / 'latest.pt'}: step 30 is recorded, and training_config has max_iters 31: the last save of old "
        "programs recorded one step less than was made. 30 is used."
    ]


def test_entries_that_json_cannot_hold_stay_in_the_file_which_is_then_not_to_be_deleted(folder):
    write(folder, "latest.pt", 30)
    edit(folder / "latest.pt", lambda c: c.update(ema={"w": torch.ones(2)}, worst=float("inf"), best=3, epoch=2))
    outcome = migrated(folder)["latest.pt"]
    assert outcome.action == BUNDLE and not outcome.may_be_deleted
    assert outcome.notes == [
        f"{folder / 'latest.pt'}: in this file alone, as JSON has no such values: ema, worst, best"
    ]
    assert state_of(folder)["epoch"] == 2 and "ema" not in state_of(folder)
    assert not migrated(folder)["latest.pt"].may_be_deleted


def test_unknown_config_fields_are_kept_and_what_files_left_unsaid_is_written_down(folder):
    model = FusedGPT(**SIZES, **EXTRA)
    write_single_file(folder / "latest.pt", model, None, step=3)
    migrated(folder)
    config = json.loads((folder / "config.json").read_text())
    assert model.config.items() <= config.items()
    assert (config["activation"], config["proj_bias"], config["bias"]) == ("gelu", None, False)


def test_rounded_weights_stay_rounded_in_the_file_and_come_back_in_the_dtype_of_the_model(folder):
    model = write(folder, "latest.pt", 30, optimizer=False)

    def half(content):
        weights = content["model_state_dict"]
        weights |= {name: t.bfloat16() for name, t in weights.items()}
        content |= {"checkpoint_dtype": "bf16", "model_dtype": "float32"}

    edit(folder / "latest.pt", half)
    before = GPT.load_legacy(folder / "latest.pt")[0]
    migrated(folder)
    assert {t.dtype for t in bits(folder).values()} == {torch.bfloat16}
    there = fuse({name: t.bfloat16() for name, t in plain(model).items()})
    assert_same_bits(*({name: t.view(torch.int16) for name, t in found.items()} for found in (bits(folder), there)))
    after = CheckpointManager.load_for_inference("dante", folder.parent)
    assert_same_bits(after.state_dict(), before.state_dict())
    assert {p.dtype for p in after.parameters()} == {torch.float32}


def test_file_without_step_optimizer_and_tokenizer_is_migrated_as_it_is(folder):
    write(folder, "latest.pt", None, seed=1, optimizer=False)
    edit(folder / "latest.pt", lambda content: content.pop("tokenizer"))
    assert migrated(folder)["latest.pt"].step == 0
    assert sorted(p.name for p in folder.glob("*.json")) == ["config.json", STATE]
    assert state_of(folder)["step"] == 0 and state_of(folder)["optimizer_file"] is None


def test_transposed_and_shared_tensors_are_compared_by_their_values(folder):
    model = write(folder, "latest.pt", 30)

    def turn(content):
        weights = content["model_state_dict"]
        whole = torch.cat([weights["lm_head.weight"], weights["token_embedding_table.weight"]])
        rows = len(whole) // 2
        weights["lm_head.weight"] = whole[:rows].t().contiguous().t()
        weights["token_embedding_table.weight"] = whole[rows:]

    edit(folder / "latest.pt", turn)
    write(folder, "final.pt", 30, optimizer=False)
    write(folder, "third.pt", 30, optimizer=False)
    edit(folder / "third.pt", lambda c: c["model_state_dict"]["lm_head.weight"][-1, -1].nextafter_(torch.tensor(9.0)))
    found = migrated(folder)
    assert found["latest.pt"].action == BUNDLE
    assert_same_bits(bits(folder), fuse(plain(model)))
    assert bits(folder)["token_embedding_table.weight"].untyped_storage().nbytes() == len(TOKENIZER["chars"]) * 24 * 4
    assert found["final.pt"].result == "same weights as" and found["third.pt"].result == "different weights than"


# What was written is compared before it counts


def assert_refused(folder: Path, before: dict, *words: str) -> None:
    outcome = migrated(folder)["latest.pt"]
    assert outcome.action == FAILED and not outcome.may_be_deleted
    assert outcome.error.startswith(f"{folder / 'latest.pt'}: what was written is not what was read: ")
    assert all(word in outcome.error for word in words), outcome.error
    assert listing(folder) == before


def test_damage_on_the_way_to_the_disk_is_caught(folder, monkeypatch):
    write(folder, "latest.pt", 30)
    before, real = listing(folder), rewrite.write_bundle
    for name, byte in (("model.pt", 9000), ("optimizer.pt", 60000)):

        def damaged(place, stage, state, files, name=name, byte=byte):
            real(place, stage, state, files)
            flip(stage / name, byte)

        monkeypatch.setattr(rewrite, "write_bundle", damaged)
        assert_refused(folder, before, name, "CRC32")


def assert_unproven(folder: Path, before: dict, *words: str) -> None:
    outcome = migrated(folder)["latest.pt"]
    assert outcome.action == FAILED and not outcome.may_be_deleted
    assert all(word in outcome.error for word in words), outcome.error
    assert listing(folder) == before


def test_bytes_of_another_tensor_are_caught_in_weights_and_moments(folder, monkeypatch):
    write(folder, "latest.pt", 30)
    before, real = listing(folder), rewrite.write_torch
    for name, other in (
        ("blocks.1.ln1.weight", "blocks.1.ln2.weight"),
        ("blocks.1.sa.qkv.weight: exp_avg_sq", "blocks.0.sa.qkv.weight: exp_avg_sq"),
        ("lm_head.bias: exp_avg", "lm_head.bias: exp_avg_sq"),
    ):

        def swapped(file, *args, name=name, other=other):
            views = {target.name: target.view for target in file.targets}
            targets = [replace(t, view=views[other]) if t.name == name else t for t in file.targets]
            return real(replace(file, targets=targets), *args)

        with monkeypatch.context() as patch:
            patch.setattr(rewrite, "write_torch", swapped)
            assert_unproven(folder, before, f"{folder}: {name} is not what {folder / 'latest.pt'} holds")
    assert migrated(folder)["latest.pt"].action == BUNDLE


def test_plain_value_that_differs_is_caught(folder, monkeypatch):
    write(folder, "latest.pt", 30)
    before, real = listing(folder), rewrite.write_torch

    def faster(file, *args):
        content = file.content
        if "param_groups" in content:
            content = {**content, "param_groups": [{**content["param_groups"][0], "lr": 0.25}]}
        return real(replace(file, content=content), *args)

    monkeypatch.setattr(rewrite, "write_torch", faster)
    assert_refused(folder, before, "optimizer.pt has another structure")


def test_rule_that_moves_rows_or_parts_is_caught(folder, monkeypatch):
    write(folder, "latest.pt", 30)
    before, real = listing(folder), Concat.forward

    def last_row_first(self, views, sizes, count):
        moved = [
            concatenate([slice_axis(v, 0, v.shape[0] - 1, v.shape[0]), slice_axis(v, 0, 0, v.shape[0] - 1)])
            for v in views
        ]
        return real(self, moved, sizes, count)

    def second_head_first(self, views, sizes, count):
        return real(self, [views[1], views[0], *views[2:]], sizes, count)

    with monkeypatch.context() as patch:
        patch.setattr(Concat, "forward", last_row_first)
        assert_unproven(folder, before, ".weight is not what", "within 768 bytes from element 0 on")
    with monkeypatch.context() as patch:
        patch.setattr(Concat, "forward", second_head_first)
        assert_unproven(folder, before, "blocks.0.sa.qkv.weight and its moments differ in their parts")


def test_tensor_that_would_be_left_out_is_named(folder, monkeypatch):
    write(folder, "latest.pt", 30)
    before, real = listing(folder), rewrite.Content.of

    def without_the_last(bundle):
        found = real(bundle)
        found.weights.popitem()
        return found

    monkeypatch.setattr(rewrite.Content, "of", without_the_last)
    assert_unproven(folder, before, "lm_head.bias is neither used nor dropped")


def test_file_that_changes_while_it_is_read_is_left_for_later(folder, monkeypatch):
    write(folder, "latest.pt", 30)
    real = rewrite.write_bundle

    def overtaken(*args):
        real(*args)
        os.utime(folder / "latest.pt", ns=(0, 1))

    monkeypatch.setattr(rewrite, "write_bundle", overtaken)
    assert "latest.pt: changed while it was read" in migrated(folder)["latest.pt"].error
    assert [p.name for p in folder.iterdir() if p.name != ".lock"] == ["latest.pt"]
