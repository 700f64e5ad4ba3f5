"""Which steps stay and by which rule, and what each says of its descent."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.bundle.bundle import KeptStep, history
from core.bundle.retention import Retention
from core.bundle.training_state import TrainingState, seal, unseal
from core.errors import CheckpointDamaged
from tests.makers.models import kept, manager, save_steps, started, state_of, train_and_save

state = TrainingState.from_dict


def steps(*numbers, **losses):
    return [KeptStep(n, Path(f"step_{n:08d}"), state({"step": n, **losses.get(f"s{n}", {})})) for n in numbers]


def test_each_kept_step_is_told_by_which_rules_it_stays():
    older = steps(100, 200, 300, 400, s100={"migrated_from": {}})
    newest = state({"step": 500, "best": {"step": 200, "val_loss": 1.0}})
    rules = Retention(keep=1, keep_every=200, resumed_from=300).rules(newest, older)
    assert rules == [["migrated"], ["best", "every 200"], ["resumed from"], ["newest 1", "every 200"]]


def test_newest_is_what_was_committed_last_not_the_highest_step():
    older = steps(7, 1, 2, s7={"commit_number": 1}, s1={"commit_number": 2}, s2={"commit_number": 3})
    going = Retention(keep=1).going(state({"step": 3, "commit_number": 4}), older)
    assert [step.step for step in going] == [7, 1]


def test_a_step_committed_after_the_top_is_not_removed_by_a_save():
    assert Retention(keep=0).going(TrainingState(step=5), steps(4, 5, 6)) == steps(4)


@given(st.lists(st.integers(1, 40), unique=True), st.integers(0, 5), st.one_of(st.none(), st.integers(1, 9)))
def test_more_is_never_kept_by_keeping_less(numbers, keep, every):
    older, newest = steps(*sorted(numbers)), TrainingState(step=50)
    going = Retention(keep, every).going(newest, older)
    assert len(older) - len(going) >= min(keep, len(older))
    assert set(map(str, Retention(keep + 1, every).going(newest, older))) <= set(map(str, going))
    assert not any(every and step.step % every == 0 for step in going)


def test_the_best_step_is_the_recorded_one_while_it_is_here_and_else_the_best_of_those_that_are():
    older = steps(1, 2, s1={"val_loss": 2.0}, s2={"val_loss": 1.5})
    recorded = {"step": 9, "val_loss": 1.0}
    best_of = Retention().best_of
    assert best_of(state({"step": 9, "best": recorded}), older) == recorded
    assert best_of(state({"step": 3, "val_loss": 1.9, "best": recorded}), older) == {"step": 2, "val_loss": 1.5}
    assert best_of(state({"step": 3, "best": recorded}), steps(1, 2)) is None


def test_the_rules_that_a_training_state_records_are_read_and_anything_else_is_the_default():
    assert Retention.of(state({"retention": {"keep": 3, "keep_every": 500, "resumed_from": 0}})) == Retention(3, 500, 0)
    assert Retention.of(state({"retention": {"keep": -1, "keep_every": 0, "resumed_from": "x"}})) == Retention()
    assert Retention.of(state({"retention": []})) == Retention.of(TrainingState()) == Retention()


def test_a_run_keeps_its_id_over_resumes_and_counts_its_commits(tmp_path):
    save_steps(tmp_path, 2, keep=2, keep_every=5)
    first = state_of(tmp_path / "dante")
    save_steps(tmp_path, 1, keep=2)
    second = state_of(tmp_path / "dante")
    assert len(first["run"]) == 16 and second["run"] == first["run"]
    assert (first["commit_number"], second["commit_number"]) == (2, 3)
    assert second["parent"] == first["commit_id"] and "branch" not in second
    assert first["retention"] == {"keep": 2, "keep_every": 5, "resumed_from": None}
    assert second["retention"] == {"keep": 2, "keep_every": None, "resumed_from": 2}
    save_steps(tmp_path, 1, "other")
    assert state_of(tmp_path / "other")["run"] != first["run"]


def test_a_bundle_without_a_run_id_gets_one_at_the_next_save_and_is_counted_on_from_its_step(tmp_path):
    save_steps(tmp_path, 3)
    path = tmp_path / "dante/training_state.json"
    old = state_of(tmp_path / "dante")
    path.write_bytes(seal({k: v for k, v in old.items() if k not in ("run", "commit_number", "retention")}))
    save_steps(tmp_path, 1)
    state = state_of(tmp_path / "dante")
    assert len(state["run"]) == 16 and state["run"] != old["run"]
    assert state["commit_number"] == 4


def test_lower_steps_saved_later_are_the_newer_ones(tmp_path):
    made, model, optimizer = started(tmp_path, keep=2)
    for step in (7, 1, 2, 3):
        model.step = step - 1
        train_and_save(made, model, optimizer, 1)
    made.close()
    assert kept(tmp_path / "dante") == ["step_00000001", "step_00000002"]
    assert [step.step for step in history(tmp_path / "dante")] == [1, 2]
    assert manager(tmp_path).saved_step() == 3


@pytest.mark.parametrize("number", ["3", -1, True, None])
def test_a_commit_number_that_is_no_count_is_damage(number):
    state = seal({"step": 1, "format_version": 2, "commit_number": number, "integrity": {"files": {}}})
    with pytest.raises(CheckpointDamaged, match=r"training_state.json: commit_number is .*, expected a whole number"):
        unseal(state, "dante/training_state.json")
