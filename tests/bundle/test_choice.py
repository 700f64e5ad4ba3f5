"""Which checkpoint of a folder is used, the same for training, generation and inspection."""

from __future__ import annotations

import json

import pytest
import torch

import inspect_model
from core.bundle.choice import choose
from core.checkpoint import CheckpointManager
from core.data.tokenizer import tokenizer_from_state
from core.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, NoneIntact
from core.model import GPT
from tests.makers.generations import (
    SIZES,
    TOKENIZER,
    FusedGPT,
    LectureGPT,
    trained,
    write_old_bundle,
    write_single_file,
)
from tests.makers.models import flip, save_durably


@pytest.fixture(scope="module")
def old():
    """A model of each of two steps, with their optimizer."""
    made = {}
    for step in (4, 9, 20):
        model = LectureGPT(**SIZES)
        made[step] = (model, trained(model, step))
    return made


def single(folder, old, name, step, optimizer=True, **form):
    model, moments = old[step]
    return write_single_file(folder / name, model, moments if optimizer else None, step=step, **form)


def manager(root, lines=None):
    return CheckpointManager("dante", root, say=(lines if lines is not None else []).append)


def resume(root, lines=None):
    made = manager(root, lines)
    model, optimizer, step = made.initialize_for_training({}, tokenizer_from_state(TOKENIZER), None, 1e-3)
    return made, model, optimizer, step


def used(root, capsys) -> int:
    """The step that every door takes; they must agree."""
    steps = {CheckpointManager.load_for_inference("dante", root).step, GPT.load(root / "dante")[2]}
    made, _, _, step = resume(root)
    made.close()
    capsys.readouterr()
    assert inspect_model.main([str(root / "dante"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["training_state"]["step"]
    assert steps == {step} == {shown}
    return step


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"latest.pt": 9}, "latest.pt"),
        ({"final.pt": 9}, "final.pt"),
        ({"latest.pt": 4, "final.pt": 9}, "final.pt"),
        ({"latest.pt": 9, "final.pt": 4}, "latest.pt"),
        ({"latest.pt": 9, "final.pt": 9}, "latest.pt"),
        ({"latest.pt": 4, "bundle": 9}, None),
        ({"latest.pt": 9, "bundle": 9}, None),
        ({"latest.pt": 20, "bundle": 9}, "latest.pt"),
        ({"latest.pt": 4, "final.pt": 20, "bundle": 9}, "final.pt"),
    ],
    ids=str,
)
def test_the_highest_step_is_used_by_every_door_and_said(tmp_path, old, capsys, files, expected):
    folder = tmp_path / "dante"
    for name, step in files.items():
        if name == "bundle":
            write_old_bundle(folder, *old[step], step=step)
        else:
            single(folder, old, name, step)
    first = choose(folder).candidates[0]
    assert (first.single, first.step) == (expected, files[expected or "bundle"])
    assert used(tmp_path, capsys) == first.step
    (said,) = choose(folder).lines()
    assert said.startswith(f"{folder}: using {expected or 'the bundle'} (step {first.step})")
    lines: list[str] = []
    resume(tmp_path, lines)[0].close()
    assert said in lines
    CheckpointManager.load_for_inference("dante", tmp_path)
    assert said in capsys.readouterr().err


def test_a_bundle_alone_is_used_without_a_word(tmp_path, old):
    write_old_bundle(tmp_path / "dante", *old[4], step=4)
    assert choose(tmp_path / "dante").lines() == []


def test_the_only_optimizer_state_is_pointed_out(tmp_path, old):
    single(tmp_path / "dante", old, "latest.pt", 4)
    single(tmp_path / "dante", old, "final.pt", 9, optimizer=False)
    (said,) = choose(tmp_path / "dante").lines()
    assert said.endswith("using final.pt (step 9); beside it latest.pt (step 4); only latest.pt has an optimizer state")


def test_a_file_that_was_there_when_the_bundle_was_written_no_longer_competes(tmp_path, old, capsys):
    folder = tmp_path / "dante"
    path = single(folder, old, "latest.pt", 9)
    made, model, optimizer, _ = resume(tmp_path)
    save_durably(made, model, optimizer, step=5)  # a lower step than the file has, as after a rewind
    made.close()
    (seen,) = json.loads((folder / "training_state.json").read_text())["legacy"]
    assert (seen["name"], seen["size"]) == ("latest.pt", path.stat().st_size)
    assert used(tmp_path, capsys) == 5
    assert "using the bundle (step 5); beside it latest.pt (step 9), all there when" in choose(folder).lines()[0]
    single(folder, old, "latest.pt", 20)
    assert used(tmp_path, capsys) == 20


def test_a_file_of_the_same_size_and_other_bytes_is_new(tmp_path, old, capsys):
    folder = tmp_path / "dante"
    single(folder, old, "final.pt", 9, optimizer=False)
    made, model, optimizer, _ = resume(tmp_path)
    save_durably(made, model, optimizer, step=5)
    made.close()
    size = (folder / "final.pt").stat().st_size
    model, _ = old[20]
    write_single_file(folder / "final.pt", model, step=9)
    assert (folder / "final.pt").stat().st_size == size
    assert used(tmp_path, capsys) == 9


def test_an_unchanged_file_is_not_read_again_for_the_next_save(tmp_path, old, monkeypatch):
    folder = tmp_path / "dante"
    single(folder, old, "latest.pt", 9)
    made, model, optimizer, _ = resume(tmp_path)
    save_durably(made, model, optimizer, step=10)
    monkeypatch.setattr("core.bundle.choice._crc32", lambda path: pytest.fail(f"{path} was read"))
    save_durably(made, model, optimizer, step=11)
    assert json.loads((folder / "training_state.json").read_text())["legacy"][0]["name"] == "latest.pt"


def test_a_damaged_newest_file_gives_way_to_the_next_and_nothing_is_deleted(tmp_path, old):
    folder = tmp_path / "dante"
    write_old_bundle(folder, *old[4], step=4)
    latest = single(folder, old, "latest.pt", 20)
    single(folder, old, "final.pt", 9)
    flip(latest, latest.stat().st_size // 2)
    before = latest.read_bytes()
    lines: list[str] = []
    made, _, _, step = resume(tmp_path, lines)
    made.close()
    assert step == 9 and latest.read_bytes() == before
    damage, instead = (line for line in lines if line.startswith("WARNING"))
    assert str(latest) in damage and "is damaged (CRC32 " in damage
    assert instead == "WARNING: trying final.pt (step 9) instead; nothing was deleted"


def test_a_damaged_newest_file_gives_way_to_the_bundle_and_not_to_a_kept_step(tmp_path, old):
    folder = tmp_path / "dante"
    single(folder, old, "latest.pt", 4)
    made, model, optimizer, _ = resume(tmp_path)
    for step in (5, 6):
        save_durably(made, model, optimizer, step=step)
    made.close()
    latest = single(folder, old, "latest.pt", 20)
    flip(latest, latest.stat().st_size // 2)
    before = sorted(p.name for p in folder.iterdir())
    lines: list[str] = []
    made, _, _, step = resume(tmp_path, lines)
    made.close()
    assert step == 6 and sorted(p.name for p in folder.iterdir()) == before
    assert lines[-1] == "WARNING: trying the bundle (step 6) instead; nothing was deleted"


def test_a_damaged_training_state_does_not_make_an_old_file_the_newest(tmp_path, old, capsys):
    folder = tmp_path / "dante"
    single(folder, old, "latest.pt", 4)
    made, model, optimizer, _ = resume(tmp_path)
    for step in (5, 6):
        save_durably(made, model, optimizer, step=step)
    made.close()
    flip(folder / "training_state.json", 20)
    made, _, _, step = resume(tmp_path)
    made.close()
    assert step == 5, "the newest intact step, and not latest.pt"


def test_another_generation_beside_the_bundle_is_compared_by_step_alone(tmp_path, old, capsys):
    write_old_bundle(tmp_path / "dante", *old[9], step=9)
    model = FusedGPT(**SIZES)
    write_single_file(tmp_path / "dante" / "latest.pt", model, trained(model, 1), step=20, stream=True)
    assert used(tmp_path, capsys) == 20


def test_weights_without_a_config_are_neither_overwritten_nor_started_over(tmp_path, old):
    folder = write_old_bundle(tmp_path / "dante", *old[9], step=9)
    (folder / "config.json").unlink()
    before = (folder / "model.pt").read_bytes()
    single(folder, old, "latest.pt", 4)
    made, model, optimizer, step = resume(tmp_path)
    assert step == 4
    save_durably(made, model, optimizer, step=5)
    save_durably(made, model, optimizer, step=6)
    made.close()
    (aside,) = folder.glob("aside_*")
    assert (aside / "model.pt").read_bytes() == before


def test_a_config_that_belongs_to_nothing_is_not_replaced(tmp_path, old):
    folder = tmp_path / "dante"
    single(folder, old, "latest.pt", 4)
    (folder / "config.json").write_text(json.dumps({"n_layer": 7, "n_head": 1, "n_embd": 8}))
    with pytest.raises(CheckpointMismatch, match=r"config\.json: not the config of latest\.pt.*move it away"):
        resume(tmp_path)
    assert json.loads((folder / "config.json").read_text())["n_layer"] == 7


@pytest.mark.parametrize("gone", ["model.pt", "config.json"])
def test_what_is_left_of_a_bundle_is_not_trained_over(tmp_path, old, gone):
    folder = write_old_bundle(tmp_path / "dante", *old[9], step=9)
    (folder / gone).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(NoneIntact, match=rf"is here without {gone}.*Put {gone} back.*nothing was changed"):
        resume(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")} == before


def test_a_link_to_a_disk_that_is_not_there_is_no_fresh_start(tmp_path, old):
    folder = tmp_path / "dante"
    folder.mkdir()
    (folder / "latest.pt").symlink_to(tmp_path / "unmounted" / "latest.pt")
    with pytest.raises(CheckpointError, match=r"latest\.pt: cannot be opened .*To start from scratch"):
        resume(tmp_path)


def test_a_damaged_file_says_what_stands_beside_it(tmp_path, old):
    folder = tmp_path / "dante"
    latest = single(folder, old, "latest.pt", 20)
    single(folder, old, "final.pt", 9)
    flip(latest, latest.stat().st_size // 8)  # of the weights, which come first
    with pytest.raises(CheckpointDamaged, match=r"is damaged .*Beside it: final\.pt \(step 9\)\."):
        CheckpointManager.load_for_inference("dante", tmp_path)


def test_the_weights_alone_start_a_new_model_where_the_optimizer_state_is_anothers(tmp_path, old):
    folder = write_old_bundle(tmp_path / "dante", old[9][0], {"state": {}, "param_groups": []}, step=9)
    made = CheckpointManager("other", tmp_path, say=[].append)
    model, _, step = made.initialize_for_training({}, tokenizer_from_state(TOKENIZER), None, 1e-3, "dante")
    made.close()
    assert step == 0 and folder.exists()
    assert torch.equal(model.ln_f.weight, old[9][0].ln_f.weight)
