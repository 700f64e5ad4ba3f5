"""Single-file checkpoints become bundles: the same bits in another layout."""

from __future__ import annotations

import json

import pytest
import torch

from core.bundle.bundle import open_bundle
from core.bundle.choice import choose
from core.bundle.legacy import open_legacy
from core.bundle.training_state import STATE
from core.bundle.verify import verify
from core.checkpoint import CheckpointManager
from core.conversion.migration.migrate import migrate
from core.conversion.migration.plan import BUNDLE, COMPARED, FAILED, KEPT, SEEN, find, plan, work
from core.model import GPT
from tests.makers.generations import batch, fuse, trained, write_old_bundle, write_single_file
from tests.makers.migrations import bits, bundle_at, lecture, listing, migrated, plain, write
from tests.makers.models import flip, kept, save_durably, state_of
from tests.makers.old_runs import (
    GENERATIONS,
    OPTIMIZERS,
    assert_same_bits,
    assert_same_state,
    copied,
    expected,
    fixture_model,
    hyper_parameters,
    logits,
    manager,
    resume,
    update_both,
)

# What becomes of the files of a folder


def test_highest_step_becomes_the_bundle_and_the_other_a_kept_step(folder):
    newest, older = write(folder, "final.pt", 20, optimizer=False), write(folder, "latest.pt", 15)
    before = listing(folder)
    found = migrated(folder)
    assert [(o.path.name, o.action, o.became) for o in found.values()] == [
        ("final.pt", BUNDLE, "the bundle"),
        ("latest.pt", KEPT, "step_00000015"),
    ]
    assert_same_bits(bits(folder), fuse(plain(newest)))
    assert_same_bits(bits(folder, 15), fuse(plain(older)))
    assert not (folder / "optimizer.pt").exists() and (folder / "step_00000015" / "optimizer.pt").exists()
    assert state_of(folder)["step"] == 20 and state_of(folder / "step_00000015")["step"] == 15
    assert before.items() <= listing(folder).items()  # the sources: bytes, time, inode
    assert all(o.may_be_deleted and o.error is None for o in found.values())
    assert found["final.pt"].notes == [
        f"{folder / 'final.pt'}: no optimizer state; training on starts its moments from zero"
    ]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("form", [{}, {"stream": True, "config": "object", "prefix": "module.model._orig_mod."}])
def test_logits_and_updates_are_those_of_before_to_the_bit(folder, generation, form):
    theirs = GENERATIONS[generation]()
    optimizer = trained(theirs, **OPTIMIZERS["two groups, fused kernel"])
    path = write_single_file(folder / "latest.pt", theirs, optimizer, step=3, **form)
    ids = batch(theirs, 99)[0]
    before = logits(GPT.load_legacy(path)[0], ids)
    assert migrated(folder)["latest.pt"].action == BUNDLE
    path.unlink()
    assert torch.equal(logits(CheckpointManager.load_for_inference("dante", folder.parent), ids), before)
    with manager(folder.parent) as made:
        ours, our_optimizer, step = resume(made)
    assert step == 3 and hyper_parameters(our_optimizer) == hyper_parameters(optimizer)
    for seed in range(2):
        assert_same_state(ours, our_optimizer, theirs, optimizer)
        update_both(ours, our_optimizer, theirs, optimizer, seed)
    assert_same_state(ours, our_optimizer, theirs, optimizer)


def test_fixture_of_the_real_program_keeps_its_logits_and_equal_steps_are_compared(shared, folder):
    fixtures = shared / "fixtures" / "lecture_char"
    copied(fixtures / "legacy", folder)
    content = fixture_model(fixtures)[1]
    found = migrated(folder)
    assert found["latest.pt"].action == BUNDLE and found["latest.pt"].step == 30
    assert found["final.pt"].became == "nothing: same weights as the bundle (step 30)"
    assert kept(folder) == [] and found["final.pt"].may_be_deleted
    ids, there = expected(fixtures)
    ours = CheckpointManager.load_for_inference("dante", folder.parent)
    torch.testing.assert_close(logits(ours, ids), there, atol=1e-5, rtol=0)
    assert json.loads((folder / "tokenizer.json").read_text()) == content["tokenizer"]


def test_equal_steps_with_other_weights_are_reported_and_nothing_is_made_of_the_second(folder):
    newest = write(folder, "latest.pt", 30, seed=1)
    write(folder, "final.pt", 30, seed=2)
    found = migrated(folder)
    assert found["final.pt"].became == "nothing: different weights than the bundle (step 30)"
    assert not found["final.pt"].may_be_deleted and found["latest.pt"].may_be_deleted
    assert_same_bits(bits(folder), fuse(plain(newest)))
    assert kept(folder) == []


def test_equal_weights_with_another_optimizer_state_or_config_are_no_duplicate(folder):
    write(folder, "latest.pt", 30, seed=1)
    model, optimizer = lecture(1)
    optimizer.param_groups[0]["lr"] = 0.5
    write_single_file(folder / "final.pt", model, optimizer, step=30)
    other, optimizer = lecture(1)
    other.config["activation"] = "gelu"
    write_single_file(folder / "third.pt", other, None, step=30)
    write(folder, "more.pt", 30, seed=1, optimizer=False, training_config={"lr": 1}, tokenizer={"token_kind": "other"})
    found = migrated(folder)
    assert found["more.pt"].became == (
        "nothing: same weights, another tokenizer, training_config than the bundle (step 30)"
    )
    assert found["final.pt"].became == "nothing: same weights, another optimizer state than the bundle (step 30)"
    assert found["third.pt"].became == "nothing: same weights, another config than the bundle (step 30)"
    assert [name for name, outcome in found.items() if outcome.may_be_deleted] == ["latest.pt"]


def test_of_equal_steps_the_one_with_the_optimizer_wins_then_latest(folder):
    write(folder, "latest.pt", 30, seed=1, optimizer=False)
    write(folder, "final.pt", 30, seed=1)
    write(folder, "again.pt", 30, seed=1)
    found = migrated(folder)
    assert [found[name].action for name in ("final.pt", "again.pt", "latest.pt")] == [BUNDLE, COMPARED, COMPARED]
    assert found["latest.pt"].may_be_deleted  # all it has is in the bundle


def test_every_file_of_a_folder_is_migrated_and_other_torch_files_are_left(folder, tmp_path):
    for step, name in ((7, "latest.pt"), (9, "run_a.pt"), (3, "run b.pt")):
        write(folder, name, step)
    torch.save({"model": {}}, folder / "foreign.pt")
    (folder / "notes.pt").write_text("not one of torch's")
    found = find([folder])
    assert [path.name for path in found.folders[folder]] == ["latest.pt", "run b.pt", "run_a.pt"]
    assert len(found.passed) == 1 and str(folder / "notes.pt") in found.passed[0]
    assert {o.path.name: o.became for o in migrate(folder, found.folders[folder])} == {
        "run_a.pt": "the bundle",
        "latest.pt": "step_00000007",
        "run b.pt": "step_00000003",
    }
    assert [path.name for path in find([folder]).folders[folder]] == ["latest.pt", "run b.pt", "run_a.pt"]


def test_folders_below_are_searched_through_links_but_never_kept_steps(folder, tmp_path):
    write(folder / "step_00000001", "latest.pt", 1)
    write(folder / ".stage-1", "latest.pt", 1)
    write(folder / "aside_00000001_ab", "latest.pt", 1)
    write(tmp_path / "elsewhere", "latest.pt", 1)
    write(folder.parent / "group" / "deep", "old.pt", 1)
    (folder.parent / "linked").symlink_to(tmp_path / "elsewhere")
    (folder.parent / "group" / "loop").symlink_to(folder.parent)
    found = find([folder.parent]).folders
    assert list(found) == [folder.parent / "group" / "deep", folder.parent / "linked"]
    for place, paths in found.items():
        assert [o.action for o in migrate(place, paths)] == [BUNDLE]
    assert (tmp_path / "elsewhere" / "model.pt").exists()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["dante", "group", "linked"]


# Beside a bundle


def test_older_file_becomes_a_kept_step_and_the_bundle_stays(folder):
    ours = bundle_at(folder, 50)
    before = listing(folder)
    theirs = write(folder, "latest.pt", 20)
    assert migrated(folder)["latest.pt"].action == KEPT
    assert_same_bits(bits(folder), ours)
    assert_same_bits(bits(folder, 20), fuse(plain(theirs)))
    assert before.items() <= listing(folder).items()


def test_newer_file_becomes_the_newest_step_and_the_old_bundle_is_kept(folder):
    ours = bundle_at(folder, 50, metrics={"val_loss": 1.5})
    theirs = write(folder, "latest.pt", 80)
    assert migrated(folder)["latest.pt"].action == BUNDLE
    assert_same_bits(bits(folder), fuse(plain(theirs)))
    assert_same_bits(bits(folder, 50), ours)
    with open_bundle(folder, 50) as there, open_bundle(folder) as top:
        assert verify(there) == verify(top) == []
        assert top.state["parent"] == there.state["commit_id"]
        assert top.state["best"] == {"step": 50, "val_loss": 1.5}


@pytest.mark.parametrize("optimizer", [True, False])
def test_newer_file_beside_a_bundle_of_old_is_taken_over_and_nothing_of_the_bundle_is_lost(folder, optimizer):
    model, moments = lecture(4)
    write_old_bundle(folder, model, moments if optimizer else None, step=50)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    write(folder, "latest.pt", 80)
    assert migrated(folder)["latest.pt"].action == BUNDLE
    old = folder / "step_00000050"
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before


def test_newer_file_that_the_bundle_has_seen_is_left_and_said(folder):
    write(folder, "latest.pt", 80)
    bundle_at(folder, 50)
    before = listing(folder)
    outcome = migrated(folder)["latest.pt"]
    assert (outcome.action, outcome.became) == (SEEN, "nothing: known to the bundle at step 50; left as it is")
    assert listing(folder) == before and not outcome.may_be_deleted


@pytest.mark.parametrize("at", ["the bundle", "step_00000050"])
def test_step_that_is_there_from_elsewhere_is_compared_and_left(folder, at):
    model, _ = lecture(5)
    write_old_bundle(folder, model, None, step=50)
    if at != "the bundle":
        bundle_at(folder, 60)
    write(folder, "latest.pt", 50, seed=5, optimizer=False)
    write(folder, "final.pt", 50, seed=6)
    before = listing(folder)
    found = migrated(folder)
    assert found["latest.pt"].became == f"nothing: same weights as {at} (step 50)"
    assert found["final.pt"].became == f"nothing: different weights than {at} (step 50)"
    assert listing(folder) == before
    assert found["latest.pt"].may_be_deleted and not found["final.pt"].may_be_deleted


def test_damaged_bundle_is_named_and_not_covered_up(folder):
    bundle_at(folder, 50)
    (folder / STATE).write_text("{")
    write(folder, "latest.pt", 80)
    before = listing(folder)
    outcome = migrated(folder)["latest.pt"]
    assert outcome.action == FAILED and str(folder / STATE) in outcome.error
    assert listing(folder) == before


@pytest.mark.parametrize("state", ["there", "damaged", "missing"])
def test_what_is_left_of_a_bundle_moves_aside_and_is_said(folder, state):
    bundle_at(folder, 50)
    (folder / "model.pt").unlink()
    if state == "damaged":
        (folder / STATE).write_text("{")
    if state == "missing":
        (folder / STATE).unlink()
    rest = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".json"}
    write(folder, "latest.pt", 20)
    outcome = migrated(folder)["latest.pt"]
    (aside,) = folder.glob("aside_*")
    names = ", ".join(name for name in ("config.json", "tokenizer.json", STATE) if name in rest)
    assert outcome.action == BUNDLE and outcome.notes == [
        f"{folder}: {names} without the rest of a bundle: now in {aside.name}",
        f"{folder / 'config.json'}: was here before and fits, so it stays as it is",
    ]
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == rest


def test_config_that_waits_alone_and_fits_stays_as_a_person_wrote_it(folder):
    write(folder, "latest.pt", 20)
    with open_legacy(folder / "latest.pt") as source:
        text = json.dumps({**source.config.to_dict(), "dropout": 0.125})
    (folder / "config.json").write_text(text)
    outcome = migrated(folder)["latest.pt"]
    assert (folder / "config.json").read_text() == text
    assert outcome.notes == [f"{folder / 'config.json'}: was here before and fits, so it stays as it is"]


# One file of several


def test_newer_file_that_was_not_asked_for_is_still_the_one_that_is_used(folder):
    write(folder, "latest.pt", 30)
    write(folder, "final.pt", 20)
    (outcome,) = migrate(folder, [folder / "final.pt"])
    assert outcome.action == BUNDLE
    assert choose(folder).candidates[0].single == "latest.pt"
    assert [entry["name"] for entry in state_of(folder)["legacy"]] == ["final.pt"]
    assert {o.path.name: o.became for o in migrate(folder, find([folder]).folders[folder])} == {
        "latest.pt": "the bundle",
        "final.pt": "already migrated: step_00000020",
    }
    assert choose(folder).candidates[0].single is None


# Again, and only looking


def test_second_run_finds_everything_done_and_changes_nothing(folder):
    write(folder, "latest.pt", 30)
    write(folder, "final.pt", 20)
    write(folder, "copy.pt", 30)
    migrated(folder)
    before = listing(folder)
    found = migrated(folder)
    assert listing(folder) == before
    assert {o.path.name: o.became for o in found.values()} == {
        "latest.pt": "already migrated: the bundle",
        "final.pt": "already migrated: step_00000020",
        "copy.pt": "nothing: same weights as the bundle (step 30)",
    }
    assert all(o.may_be_deleted for o in found.values())


def test_file_whose_bundle_was_damaged_since_may_not_be_deleted(folder):
    write(folder, "latest.pt", 30)
    migrated(folder)
    flip(folder / "model.pt", 5000)
    outcome = migrated(folder)["latest.pt"]
    assert outcome.action == FAILED and not outcome.may_be_deleted
    assert str(folder / "model.pt") in outcome.error and "CRC32" in outcome.error


def test_file_that_was_written_anew_since_is_migrated_again(folder):
    write(folder, "latest.pt", 30)
    migrated(folder)
    theirs = write(folder, "latest.pt", 40)
    assert migrated(folder)["latest.pt"].became == "the bundle"
    assert_same_bits(bits(folder), fuse(plain(theirs)))
    assert kept(folder) == ["step_00000030"]


@pytest.mark.parametrize("bundle", [None, 10, 25, 50])
def test_plan_changes_nothing_and_is_what_is_then_done(folder, bundle):
    if bundle:
        bundle_at(folder, bundle)
    for name, step in (("latest.pt", 30), ("final.pt", 20), ("third.pt", 30)):
        write(folder, name, step)
    before, paths = listing(folder), find([folder]).folders[folder]
    planned = plan(folder, paths)
    assert listing(folder) == before
    made = migrate(folder, paths)
    assert [(o.path, o.action, o.target) for o in planned] == [(o.path, o.action, o.target) for o in made]


def test_progress_reports_the_bytes_that_were_planned(folder):
    for name, step in (("latest.pt", 30), ("final.pt", 20), ("third.pt", 30)):
        write(folder, name, step)
    flip(folder / "final.pt", 20000)
    total = sum(work(o) for o in plan(folder, find([folder]).folders[folder]))
    reported: list[int] = []
    migrated(folder, progress=reported.append)
    assert sum(reported) == total > 0 and len(reported) > 20


def test_training_on_never_prunes_a_step_whose_file_the_user_was_told_to_delete(folder):
    write(folder, "latest.pt", 30)
    write(folder, "final.pt", 20, optimizer=False)
    for outcome in migrated(folder).values():
        assert outcome.may_be_deleted
        outcome.path.unlink()
    kept = bits(folder, 20)
    with manager(folder.parent, folder.name) as made:
        made.keep = 0
        model, optimizer, step = resume(made)
        for later in range(1, 4):
            save_durably(made, model, optimizer, step=step + later)
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000020", "step_00000030"]
    assert_same_bits(bits(folder, 20), kept)
