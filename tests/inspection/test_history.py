"""inspect_model.py --history: each step, its branch, its health, why it is kept, and what numbers would remove."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import inspect_model
from core.inspection import history as past
from core.inspection.history import past_of
from tests.makers.models import flip, manager, save_steps, started, train_and_save


@pytest.fixture
def branches(tmp_path):
    """Steps 1 to 4; back to 2, on to 4 again; back to 3 of the new branch, and on to 4 once more."""
    root = tmp_path / "checkpoints"
    made, model, optimizer = started(root, keep=9)
    train_and_save(made, model, optimizer, 4, val_loss=lambda step: 5.0 - step)
    for target, steps in ((2, 2), (3, 1)):
        made.go_back(target)
        made.close()
        save_steps(root, steps, keep=9)
    return root / "dante"


def run(capsys, *words):
    code = inspect_model.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def table(out):
    return [re.sub(r"_[0-9a-f]{16}", "", line) for line in out.split("\n\n")[1].splitlines()]


def test_a_drawing_shows_each_branch_where_it_left(branches, capsys):
    code, out, err = run(capsys, branches, "--history")
    assert (code, err) == (0, "")
    rows = [re.sub(r"(\d\.\d{4}|-) +[\d.]+ KB +\S+ \S+ +", r"\1 ", row) for row in table(out)[1:]]
    assert [" ".join(row.split()) for row in rows] == [
        "o 1 4.0000 whole newest 9",
        "o 2 3.0000 whole newest 9, best",
        "|-o 3 2.0000 whole aside_00000003_abandoned",
        "| o 4 1.0000 whole aside_00000004_abandoned",
        "o 3 - whole newest 9, resumed from",
        "|-o 4 - whole aside_00000004_abandoned",
        "* 4 - whole newest",
    ]


def test_json_has_the_descent_of_every_step(branches, capsys):
    code, out, _ = run(capsys, branches, "--history", "--json")
    past = json.loads(out)
    steps = {(step["place"], step["step"], step["branch"]): step for step in past["steps"]}
    assert code == 0 and len(steps) == 7
    by_commit = {step["commit_id"]: step for step in past["steps"]}
    (top,) = [step for step in past["steps"] if step["place"] == "top"]
    assert by_commit[top["parent"]]["step"] == 3 and by_commit[top["branch_left"]]["place"] == "kept"
    assert {step["run"] for step in past["steps"]} == {past["run"]}
    assert [step["why"] for step in past["steps"] if step["place"] == "aside"] == ["abandoned"] * 3
    later = {"keep_best": 1, "best_by": "val_loss", "keep_steps": [], "keep_optimizer": None, "keep_within": 0}
    assert past["rules"] == {"keep": 9, "keep_every": None, "resumed_from": 3, **later, "recorded": True}


def test_numbers_show_what_they_would_remove_and_prune_removes_just_that(branches, capsys):
    code, out, _ = run(capsys, branches, "--history", "--keep", 0)
    assert code == 0 and re.search(
        r"^--keep 0: would remove 1 \([\d.]+ KB\); train\.py --prune --keep 0 does$", out, re.M
    )
    past = json.loads(run(capsys, branches, "--history", "--keep", 0, "--json")[1])
    assert past["would_remove"] == [str(branches / "step_00000001")]
    kept = [step["path"] for step in past["steps"] if step["place"] == "kept"]
    with manager(branches.parent) as made:
        made.prune(keep=0)
    left = json.loads(run(capsys, branches, "--history", "--json")[1])["steps"]
    assert [step["path"] for step in left if step["place"] != "top"] == kept[1:]
    assert "would remove no step" in run(capsys, branches, "--history", "--keep_every", 1)[1]
    assert json.loads(run(capsys, branches, "--history", "--json")[1])["would_remove"] is None


def test_health_is_told_from_sizes_and_headers_and_from_checksums_on_demand(branches, capsys):
    flip(branches / "step_00000001/model.pt", 4000)
    (branches / "step_00000002/model.pt").write_bytes((branches / "model.pt").read_bytes())
    code, out, err = run(capsys, branches, "--history")
    assert (code, err) == (0, "") and "--verify compares every byte" in out
    code, out, err = run(capsys, branches, "--history", "--verify", "--json")
    health = {step["path"].rpartition("/")[2]: step["health"] for step in json.loads(out)["steps"]}
    assert health["step_00000001"] == "damaged" and health["step_00000002"] == "replaced"
    assert health["dante"] == health["step_00000003"] == "intact"
    names = r"token_embedding_table\.weight, lm_head\.weight"
    assert code == 1 and re.search(rf"^error: .*step_00000001/model\.pt: {names} is damaged \(CRC32", err)
    assert re.search(
        r"^replaced: .*step_00000002/model\.pt: whole", run(capsys, branches, "--history", "--verify")[1], re.M
    )


@pytest.mark.parametrize("cut", [0, 100, -2])
def test_a_file_cut_short_is_damage_without_reading_it(branches, capsys, cut):
    path = branches / "step_00000002/optimizer.pt"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:cut])
    code, out, err = run(capsys, branches, "--history")
    assert code == 1 and re.search(r"step_00000002.*damaged|damaged", out) and "step_00000002/optimizer.pt" in err


def test_a_missing_file_and_a_broken_training_state_are_damage(branches, capsys):
    (branches / "step_00000001/tokenizer.json").unlink()
    (branches / "step_00000002/training_state.json").write_text("{")
    code, _, err = run(capsys, branches, "--history")
    assert code == 1
    assert re.search(r"step_00000001/tokenizer\.json: missing, but training_state\.json of step 1 lists it", err)
    assert re.search(r"step_00000002/training_state\.json: 1 bytes that are not valid JSON", err)


def test_a_damaged_step_aside_is_shown_and_is_no_failure(branches, capsys):
    flip(branches / "model.pt", 4000)
    with manager(branches.parent) as made:
        made.newest_intact().close()
    code, out, err = run(capsys, branches, "--history", "--verify")
    assert code == 0 and "error" not in err
    (row,) = [row for row in table(out) if "aside_00000004_damaged" in row]
    assert " damaged " in row and row.split()[:2] == ["|-o", "4"]


def test_a_migrated_step_and_one_of_before_rules_were_recorded_say_so(tmp_path, capsys):
    save_steps(tmp_path, 2, keep=9)
    folder = tmp_path / "dante"
    from core.bundle.training_state import seal
    from tests.makers.models import state_of

    for place, extra in ((folder, {}), (folder / "step_00000001", {"migrated_from": {"name": "latest.pt"}})):
        state = {k: v for k, v in state_of(place).items() if k not in ("retention", "run", "commit_number")}
        (place / "training_state.json").unlink()
        (place / "training_state.json").write_bytes(seal(state | extra))
    _, out, _ = run(capsys, folder, "--history")
    assert "rules: --keep 1 (the default: none are recorded)" in out
    assert table(out)[1].endswith("newest 1, migrated")


def test_what_is_no_model_has_no_history(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "nothing"):
        with pytest.raises(inspect_model.CheckpointError, match=re.escape(str(path))):
            run(capsys, path, "--history")


@pytest.mark.parametrize("words", [["--keep", "1"], ["--history", "--step", "1"], ["--history", "--keep", "-1"]])
def test_flags_that_make_no_sense_together_are_wrong_use(branches, words):
    with pytest.raises(SystemExit) as stop:
        inspect_model.main([str(branches), *words])
    assert stop.value.code == 2


def test_a_step_that_a_writer_removes_meanwhile_is_no_damage(branches, monkeypatch):
    going = next(entry.path for entry in past_of(branches).entries if entry.place == "kept")
    look = past._look

    def removed_first(entry, checksums):
        if entry.path == going:
            shutil.rmtree(going)
        look(entry, checksums)

    monkeypatch.setattr(past, "_look", removed_first)
    entries = past_of(branches).entries
    assert going not in [entry.path for entry in entries] and [e for e in entries if e.health != "whole"] == []


def test_steps_that_claim_to_come_from_each_other_are_all_shown(branches):
    from core.bundle.training_state import seal
    from tests.makers.models import state_of

    asides = sorted(branches.glob("aside_*"))[:2]
    ids = [state_of(path)["commit_id"] for path in asides]
    for path, other in zip(asides, reversed(ids), strict=True):
        state = {**state_of(path), "run": "x", "branch": {"id": other, "commit_id": other, "step": 1}}
        (path / "training_state.json").unlink()
        (path / "training_state.json").write_bytes(seal(state))
    assert len(past_of(branches).entries) == 7
