from __future__ import annotations

import re
import shutil

import pytest

from core.bundle.bundle import open_bundle
from core.bundle.intact import ANEW
from core.checkpoint import CheckpointManager
from core.errors import CheckpointDamaged, CheckpointMismatch, NoneIntact
from tests.makers.models import (
    SMALL,
    equal,
    flip,
    manager,
    save_steps,
    started,
    train_and_save,
    weights,
)


def test_the_step_named_as_the_newest_intact_one_is_checked_first(tmp_path):
    save_steps(tmp_path, 3, keep=9)
    for damaged in ("", "step_00000002"):
        flip(tmp_path / "dante" / damaged / "model.pt", 4000)
    with pytest.raises(CheckpointDamaged, match=r"dante/model\.pt: .* Newest intact step: 1 \(step_00000001\)\.$"):
        CheckpointManager.load_for_inference("dante", tmp_path)
    flip(tmp_path / "dante/step_00000001/model.pt", 4000)
    with pytest.raises(CheckpointDamaged, match=r"dante/model\.pt: .* No intact older step is kept\.$"):
        CheckpointManager.load_for_inference("dante", tmp_path)


def test_a_step_that_lost_its_training_state_is_not_trained_on_as_step_0(tmp_path):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 1)
    expected = weights(model)
    train_and_save(made, model, optimizer, 1)
    made.close()
    newest = (tmp_path / "dante/model.pt").read_bytes()
    (tmp_path / "dante/training_state.json").unlink()
    lines = []
    with CheckpointManager("dante", tmp_path, say=lines.append) as again:
        resumed, _, step = again.initialize_for_training({}, "char", None, 1e-3)
    assert step == 1 and equal(resumed.state_dict(), expected)
    assert "dante/training_state.json: missing, and kept steps have one. Continuing from step 1" in lines[0]
    (aside,) = (tmp_path / "dante").glob("aside_*_damaged_*")
    assert (aside / "model.pt").read_bytes() == newest


def named(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if not p.name.startswith(".lock"))


def test_when_no_step_is_intact_nothing_changes_and_nothing_starts_anew(tmp_path):
    save_steps(tmp_path, 2)
    folder = tmp_path / "dante"
    flip(folder / "model.pt", 4000)
    flip(folder / "step_00000001/model.pt", 4000)
    before = named(folder)
    with pytest.raises(NoneIntact) as caught:
        manager(tmp_path).initialize_for_training({}, "char", None, 1e-3)
    # Each fault once, what to do once.
    damaged = (
        r"dante/{}model\.pt: token_embedding_table\.weight, lm_head\.weight is damaged "
        r"\(CRC32 \w{{8}}, recorded \w{{8}}\)\. "
    )
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}/{damaged.format('')}{re.escape(str(tmp_path))}/{damaged.format('step_00000001/')}"
        rf"No intact older step is kept in {re.escape(str(folder))}, and nothing was changed\. {re.escape(ANEW)}",
        str(caught.value),
    )
    assert named(folder) == before


def test_a_slip_in_a_hand_edited_config_is_the_persons_to_mend_and_nothing_is_set_aside(tmp_path):
    save_steps(tmp_path, 2)
    path = tmp_path / "dante/config.json"
    text = path.read_text()
    path.write_text(text.replace(",", "", 1))
    before = named(tmp_path / "dante")
    with pytest.raises(
        CheckpointMismatch, match=r"config.json: \d+ bytes that are not valid JSON .* Correct it, or copy"
    ):
        started(tmp_path)
    assert named(tmp_path / "dante") == before
    path.write_text(text)
    assert started(tmp_path)[1].step == 2


def test_a_config_whose_edit_keeps_every_shape_is_refused_with_the_value_that_was_saved(tmp_path):
    save_steps(tmp_path, 1)
    path = tmp_path / "dante/config.json"
    saved = path.read_text()
    path.write_text(saved.replace('"n_head": 2', '"n_head": 1'))
    said = r"dante/config\.json: n_head is 1, step 1 was saved with 2\. Set it to 2\."
    with pytest.raises(CheckpointMismatch, match=said):
        CheckpointManager.load_for_inference("dante", tmp_path)
    with pytest.raises(CheckpointMismatch, match=said):
        manager(tmp_path).initialize_for_training({}, "char", None, 1e-3)
    path.write_text(saved.replace('"dropout": 0.1', '"dropout": 0.2'))
    assert CheckpointManager.load_for_inference("dante", tmp_path).config.dropout == 0.2


def test_weights_that_a_person_put_there_bring_their_own_config(tmp_path):
    for name, heads in (("dante", 2), ("other", 1)):
        save_steps(tmp_path, 1, name, {**SMALL, "n_head": heads})
    for file in ("model.pt", "config.json"):
        shutil.copy(tmp_path / "other" / file, tmp_path / "dante" / file)
    assert CheckpointManager.load_for_inference("dante", tmp_path).config.n_head == 1


@pytest.mark.parametrize("name", ["config.json", "model.pt", "optimizer.pt", "tokenizer.json"])
@pytest.mark.parametrize("step", [None, 1])
def test_a_folder_in_the_place_of_a_file_is_damage(tmp_path, name, step):
    save_steps(tmp_path, 2)
    folder = tmp_path / "dante" if step is None else tmp_path / "dante/step_00000001"
    (folder / name).unlink()
    (folder / name).mkdir()
    with (
        pytest.raises(CheckpointDamaged, match=rf"{name}: a folder, expected a file\."),
        open_bundle(tmp_path / "dante", step),
    ):
        pass
