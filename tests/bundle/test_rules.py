"""The rules by which steps are kept, and keep their optimizer: exactly what they say, over whole lives of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import inspect_model
import train
from core.bundle.bundle import KeptStep, history, open_bundle
from core.bundle.retention import Retention
from core.bundle.storage import DISK
from core.bundle.training_state import STATE, TrainingState, seal
from core.bundle.verify import verify
from core.checkpoint import CheckpointManager
from core.console.commandline import DONE, FAILED
from core.console.words import size_text
from core.errors import CheckpointLocked, CheckpointMismatch, CheckpointNotFound, InputError, NoneIntact
from tests.makers.models import equal, flip, kept, manager, save_durably, save_steps, started, state_of, train_and_save
from tests.makers.runs import fitted

LISTED = {"integrity": {"files": {}}}


def life(rules: Retention, values: list[float], metric: str = "val_loss") -> list[tuple[TrainingState, list[KeptStep]]]:
    """What is at the top and kept after each save of a run, by the rules alone."""
    seen, older, top = [], [], None
    for step, value in enumerate(values, 1):
        if top is not None:
            older.append(KeptStep(top.step, Path(str(top.step)), top))
        best = rules.better(rules.best_of(top or TrainingState(), older), step, {metric: value})
        told = {"step": step, "optimizer_file": "optimizer.pt", "commit_number": step, "best": best, metric: value}
        top = TrainingState.from_dict({**told, **LISTED})
        going, thinned = rules.going(top, older), rules.thinned(top, older)
        older = [
            KeptStep(one.step, one.path, one.state.having(optimizer_file=None)) if one in thinned else one
            for one in older
            if one not in going
        ]
        seen.append((top, list(older)))
    return seen


RULES = st.builds(
    Retention,
    keep=st.integers(0, 3),
    keep_every=st.sampled_from([None, 2, 5]),
    resumed_from=st.sampled_from([None, 1, 4]),
    keep_best=st.integers(0, 3),
    best_by=st.sampled_from(["val_loss", "accuracy:max", "accuracy:min"]),
    keep_steps=st.one_of(st.just("log"), st.lists(st.integers(0, 20), max_size=3, unique=True).map(sorted).map(tuple)),
    keep_optimizer=st.sampled_from([None, 0, 1, 2]),
)


def commit(step: int, size: int, **more) -> KeptStep:
    state = {"step": step, "commit_number": step // 250, "integrity": {"files": {"model.pt": {"size": size}}}, **more}
    return KeptStep(step, Path(str(step)), TrainingState.from_dict(state))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (10, [1000, 2000, 3000, 4000, 4500, 4750]),  # the best is 1000
        (125, [1000, 2000, 3000, 4000, 4500, 4750]),
        (143, [1000, 3000, 4000, 4500, 4750]),  # 7 would be above 1000 bytes
        (199, [1000, 4000, 4500, 4750]),
        (201, [1000, 4500, 4750]),
        (333, [1000, 4750]),
        (600, [1000, 4750]),  # newest and best, however large
    ],
)
def test_steps_at_growing_distances_stay_while_all_of_them_are_smaller_than_the_room(size, expected):
    rules, older = Retention(keep_within=1000), []
    for step in range(250, 5001, 250):
        top = commit(step, size, best={"step": min(step, 1000), "val_loss": 1.0})
        older = [one for one in older if one not in rules.going(top.state, older)]
        shown = [one.step for one in older]
        assert size * (len(older) + 1) < 1000 or len(older) <= 2
        older.append(top)
    assert shown == expected
    before = "within 1.0 KB" if size < 300 else "best"
    assert rules.rules(top.state, older[:-1])[-2:] == [[before], ["newest 1"]]


def test_a_given_or_recorded_number_of_steps_wins_over_the_room_and_the_room_is_told_once(tmp_path):
    said = []
    made = CheckpointManager("dante", tmp_path, say=said.append)
    made.keep_as({})
    assert made.rules == Retention(keep_within=10**9) and said == [
        "kept: the newest two steps, the best one, and older ones at growing distances while all take less than 1.0 GB "
        "(--keep N keeps the N newest older steps and the best instead)"
    ]
    recorded = {"step": 1, "retention": made.rules.recorded()}
    assert recorded["retention"]["keep_within"] == 10**9
    made.keep_as(recorded)
    assert made.keep_within == 10**9
    made.keep_as(recorded, keep=3)
    assert (made.keep, made.keep_within) == (3, 0)
    made.keep_as({"step": 1, "retention": made.rules.recorded()})
    assert (made.keep, made.keep_within) == (3, 0)
    made.keep_as({"step": 1, "retention": {"keep": 1, "keep_every": None, "resumed_from": None}})  # of an older version
    assert (made.keep, made.keep_within) == (1, 0)
    made.keep_as({}, keep_within=0)
    assert made.keep_within == 0 and len(said) == 1


@settings(max_examples=50, deadline=None)
@given(RULES, st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_what_is_kept_is_exactly_what_the_rules_say(rules, values):
    (metric, sign), thinned = rules.metric, set()
    for count, (top, older) in enumerate(life(rules, values, metric), 1):
        saved = range(1, count)
        ranked = sorted(range(1, count + 1), key=lambda step: (sign * values[step - 1], step))
        expected = set(saved[max(0, len(saved) - rules.keep) :])
        expected |= {step for step in ranked[: rules.keep_best] if step in saved}
        expected |= {step for step in saved if rules.keep_every and step % rules.keep_every == 0}
        expected |= {step for step in saved if rules.resumed_from == step}
        log = {1, 2, 4, 8, 16}
        expected |= {step for step in saved if step in (log if rules.keep_steps == "log" else rules.keep_steps)}
        assert {one.step for one in older} == expected
        assert top.step == count
        if rules.keep_best:
            assert top.best == {"step": ranked[0], metric: values[ranked[0] - 1]}
        if rules.keep_optimizer is not None:
            last = sorted(expected)[max(0, len(expected) - rules.keep_optimizer) :]
            whole = {one.step for one in older if one.state.optimizer_file}
            stays = {*last, *({rules.resumed_from} & expected)}
            assert whole == stays - thinned  # what is gone does not come back when a newer step goes
            thinned |= expected - stays
        assert Retention.of(TrainingState.from_dict({"step": 1, "retention": rules.recorded()})) == rules


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keep_best": -1}, "keep_best is -1 and keep_optimizer None: expected at least 0."),
        ({"keep_optimizer": -2}, "keep_best is 1 and keep_optimizer -2: expected at least 0."),
        ({"best_by": "accuracy"}, "best_by is 'accuracy': expected a metric and which of its values is the best"),
        ({"best_by": ":max"}, "best_by is ':max'"),
        ({"keep_steps": "every"}, "keep_steps is 'every': expected numbers of steps of at least 0, or \"log\"."),
        ({"keep_steps": [1, -1]}, r"keep_steps is \(-1, 1\): expected numbers"),
        ({"keep_steps": [1.5]}, r"keep_steps is \[1.5\]: expected numbers"),
        ({"keep_within": -1}, "keep_within is -1: expected a number of bytes of at least 0."),
        ({"keep_steps": 7}, "keep_steps is 7: expected numbers"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(wrong, said, tmp_path):
    with pytest.raises(InputError, match=said):
        manager(tmp_path, **wrong)


def test_rules_that_are_the_default_leave_the_training_state_as_it_was():
    assert Retention().recorded() == {"keep": 1, "keep_every": None, "resumed_from": None}
    assert Retention(keep_steps=(2, 3)).recorded()["keep_steps"] == [2, 3]


def test_the_best_steps_by_a_metric_of_ones_own_stay_and_are_found(tmp_path):
    accuracy = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.8, 5: 0.2, 6: 0.3}
    made, model, optimizer = started(tmp_path, keep=0, keep_best=2, best_by="accuracy:max")
    train_and_save(made, model, optimizer, 6, accuracy=accuracy.get, val_loss=float)
    made.add_metrics(6, {"accuracy": 0.85})
    made.close()
    assert kept(tmp_path / "dante") == ["step_00000002", "step_00000004"]
    assert state_of(tmp_path / "dante")["best"] == {"step": 2, "accuracy": 0.9}
    assert CheckpointManager.load_for_inference("dante", tmp_path, step="best").step == 2
    made = manager(tmp_path)
    made.keep_as(state_of(tmp_path / "dante"), keep_best=3)
    assert (made.keep, made.keep_best, made.best_by) == (0, 3, "accuracy:max")


def test_steps_by_their_numbers_are_saved_and_kept_and_a_resume_goes_on_with_them(tmp_path):
    fitted(started(tmp_path, keep=0, keep_best=0, keep_steps=np.array([3, 5, 40])), 6, save_interval=100)
    assert kept(tmp_path / "dante") == ["step_00000003", "step_00000005"]
    made, model, optimizer = started(tmp_path)
    made.keep_as(made.resumed, keep_steps="log")
    assert [step for step in range(40) if made.wants(step)] == [1, 2, 4, 8, 16, 32]
    fitted((made, model, optimizer), 9, save_interval=100)
    assert kept(tmp_path / "dante") == ["step_00000006", "step_00000008"]  # which was resumed from, and 8


def thin(root: Path, **rules) -> tuple[Path, dict[str, torch.Tensor]]:
    """Steps 1 to 5, of which 1 to 3 hold weights only, unless told otherwise; the weights of step 2."""
    made, model, optimizer = started(root, **{"keep": 9, "keep_optimizer": 1, **rules})
    train_and_save(made, model, optimizer, 2)
    second = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_and_save(made, model, optimizer, 3)
    made.close()
    return root / "dante", second


def test_older_steps_hold_weights_only_and_open_verify_and_show_as_such(tmp_path, capsys):
    folder, second = thin(tmp_path)
    assert [(one.step, one.state.optimizer_file) for one in history(folder)] == [
        (1, None), (2, None), (3, None), (4, "optimizer.pt"),
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "step_00000002").iterdir()) == [
        "config.json", "model.pt", "tokenizer.json", "training_state.json",
    ]  # fmt: skip
    model = CheckpointManager.load_for_inference("dante", tmp_path, step=2)
    assert model.step == 2 and equal(model.state_dict(), second)
    for words in (["--step", "2", "--verify"], ["--history", "--verify"], ["--history", "--keep_optimizer", "0"]):
        assert inspect_model.main([str(folder), *words]) == DONE
    said = capsys.readouterr().out
    assert "optimizer : removed (keep_optimizer 1); this step holds weights only" in said
    assert "rules: --keep 9, --keep_optimizer 1\n" in said and said.count("newest 9 (weights only)") == 6
    assert "--keep_optimizer 0: would remove the optimizer state of 4; train.py --prune --keep_optimizer 0 does" in said


def test_going_back_to_a_step_of_weights_only_is_refused_and_changes_nothing(tmp_path):
    folder, _ = thin(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name}
    with pytest.raises(CheckpointMismatch) as caught, manager(tmp_path) as made:
        made.go_back(2)
    assert str(caught.value) == (
        f"{folder}/step_00000002: holds weights only, since its optimizer state was removed (keep_optimizer 1). Steps "
        f"with one: 4. Its weights alone start a new run: convert_checkpoints.py {folder}/step_00000002 DST --to "
        "bundle. Nothing was changed."
    )
    assert before == {path: path.read_bytes() for path in before}


def test_damage_leads_back_to_a_step_with_an_optimizer_and_to_no_other(tmp_path):
    folder, _ = thin(tmp_path)
    flip(folder / "model.pt", 4000)
    made, model, _ = started(tmp_path)
    assert model.step == 4
    made.close()
    for broken in (folder / "step_00000004", folder):
        flip(broken / "model.pt", 4000)
    with pytest.raises(NoneIntact, match=r"step_00000003: holds weights only, since its optimizer state was removed"):
        started(tmp_path)


def test_a_run_keeps_the_optimizer_of_the_step_that_it_resumed_from_and_of_the_last_one_that_has_any(tmp_path):
    thin(tmp_path, keep_optimizer=None)
    made, model, optimizer = started(tmp_path, keep=9, keep_optimizer=0)
    train_and_save(made, model, optimizer, 2)
    assert [one.step for one in history(made.checkpoint_dir) if one.state.optimizer_file] == [5]
    made.resumed = TrainingState()
    save_durably(made, model, step=8)  # without an optimizer
    save_durably(made, model, step=9)
    made.close()
    assert [one.step for one in history(made.checkpoint_dir) if one.state.optimizer_file] == [7]


def test_prune_removes_optimizer_states_by_a_rule_and_counts_the_bytes(tmp_path, capsys):
    folder, _ = thin(tmp_path, keep_optimizer=None)
    size = sum((folder / f"step_0000000{n}/optimizer.pt").stat().st_size for n in (1, 2))
    words = ["--model_name", "dante", "--checkpoint_root", str(tmp_path), "--prune", "--keep_optimizer", "2"]
    assert train.main(words) == DONE
    said = capsys.readouterr()
    assert said.out == f"{size_text(size)} freed\n" and f"removed {folder}/step_00000001/optimizer.pt (" in said.err
    assert [one.step for one in history(folder) if one.state.optimizer_file] == [3, 4]
    flip(folder / "model.pt", 4000)
    with manager(tmp_path) as made:
        lines = []
        made.say = lines.append
        assert made.prune(keep_optimizer=0) > 0
    assert f"WARNING: {folder}/step_00000004 keeps its optimizer state: it is the last step" in lines[0]
    assert [one.step for one in history(folder) if one.state.optimizer_file] == [4]


def test_a_dry_run_names_and_counts_what_a_prune_removes_and_changes_nothing(tmp_path, capsys):
    folder, _ = thin(tmp_path, keep_optimizer=None)
    names = [path.name for path in sorted(folder.iterdir())]
    words = ["--model_name", "dante", "--checkpoint_root", str(tmp_path), "--prune", "--keep", "2"]
    assert train.main([*words, "--keep_optimizer", "1", "--dry_run"]) == DONE
    said = capsys.readouterr()
    assert [path.name for path in sorted(folder.iterdir())] == names
    gone = ["step_00000001", "step_00000002", "step_00000003/optimizer.pt"]
    assert [line.partition(" (")[0] for line in said.err.splitlines()] == [f"would remove {folder}/{n}" for n in gone]
    assert train.main([*words, "--keep_optimizer", "1"]) == DONE
    real = capsys.readouterr()
    assert said.out == real.out.replace(" freed", " would be freed")
    assert real.err == said.err.replace("would remove", "removed")
    with pytest.raises(SystemExit, match="2"):
        train.main(["--dry_run"])
    assert "--dry_run is for --prune, which is missing" in capsys.readouterr().err


def test_a_prune_that_frees_nothing_says_why(tmp_path, capsys):
    folder, _ = thin(tmp_path, keep_optimizer=None)
    words = ["--model_name", "dante", "--checkpoint_root", str(tmp_path), "--prune"]
    size = size_text(sum(file.stat().st_size for file in folder.glob("step_*/*") if file.name != STATE))
    for more, why in (
        ([], f"nothing lies aside; of the 4 kept steps ({size}), --keep N removes those that no rule keeps"),
        (["--keep", "4"], "nothing lies aside, and the rules keep all 4 kept steps"),
    ):
        assert train.main([*words, *more]) == DONE
        said = capsys.readouterr()
        assert (said.out, said.err) == ("0 bytes freed\n", f"{folder}: {why}\n")
    save_steps(tmp_path, 1, "other", keep=0)
    assert train.main(["--model_name", "other", *words[2:]]) == DONE
    assert capsys.readouterr().err == f"{tmp_path}/other: nothing lies aside, and no older step is kept\n"


def test_a_prune_without_a_name_is_of_all_models_and_passes_over_one_that_trains(tmp_path, capsys, monkeypatch):
    for name in ("a", "b", "c"):
        save_steps(tmp_path, 3, name, keep=2, keep_best=0)
    prune = CheckpointManager.prune

    def refused(made, **rules):
        if made.model_name == "b":
            raise CheckpointLocked(f"{made.checkpoint_dir}: another program trains this model.")
        return prune(made, **rules)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "prune", refused)
        assert train.main(["--checkpoint_root", str(tmp_path), "--prune", "--keep", "1"]) == FAILED
    said = capsys.readouterr()
    assert [kept(tmp_path / name)[:-1] for name in "abc"] == [[], ["step_00000001"], []]
    assert said.err.startswith(f"removed {tmp_path}/a/step_00000001 (") and f"error: {tmp_path}/b: " in said.err
    size = sum(file.stat().st_size for file in (tmp_path / "b/step_00000001").iterdir())
    assert said.out == f"{size_text(2 * size)} freed\n"
    with pytest.raises(CheckpointNotFound, match="no models here, so nothing to prune"):
        train.main(["--checkpoint_root", str(tmp_path / "none"), "--prune"])


def test_what_a_killed_removal_left_is_listed_nowhere_and_the_next_save_removes_it(tmp_path):
    folder, _ = thin(tmp_path, keep_optimizer=None)
    states = {n: (folder / f"step_0000000{n}/optimizer.pt").read_bytes() for n in (1, 2)}
    save_steps(tmp_path, 1, keep=9, keep_optimizer=0)
    for number, data in states.items():  # as after a kill between the two changes
        (folder / f"step_0000000{number}/optimizer.pt").write_bytes(data)
    with open_bundle(folder, 1) as bundle:
        assert bundle.state.optimizer_removed == "keep_optimizer 0" and verify(bundle) == []
        assert bundle.optimizer is None
    save_steps(tmp_path, 1, keep=9)
    assert not [n for n in states if (folder / f"step_0000000{n}/optimizer.pt").exists()]


def test_a_planted_link_in_the_place_of_a_step_leads_to_no_removal(tmp_path):
    folder, _ = thin(tmp_path, keep_optimizer=None)
    (folder / "step_00000001").rename(tmp_path / "elsewhere")
    (folder / "step_00000001").symlink_to(tmp_path / "elsewhere")
    save_steps(tmp_path, 1, keep=9, keep_optimizer=0)
    assert (tmp_path / "elsewhere/optimizer.pt").exists()
    assert not (folder / "step_00000002/optimizer.pt").exists()


def test_a_reader_beside_the_removal_finds_the_step_whole(tmp_path, monkeypatch):
    folder, _ = thin(tmp_path, keep_optimizer=None)
    step = folder / "step_00000001"
    opened = DISK.open

    def removed_meanwhile(path):
        if path == step / "optimizer.pt" and path.exists():
            state = history(folder)[0].state
            files = {name: entry for name, entry in state.files.items() if name != "optimizer.pt"}
            (step / STATE).write_bytes(seal(state.having(optimizer_file=None, integrity={"files": files})))
            path.unlink()
        return opened(path)

    monkeypatch.setattr(DISK, "open", removed_meanwhile)
    with open_bundle(folder, 1) as bundle:
        assert bundle.optimizer is None and verify(bundle) == []


@pytest.mark.parametrize("words", [["--keep_steps", "1,x"], ["--keep_steps", ""], ["--keep_steps", "1,,2"]])
def test_steps_that_are_no_numbers_are_wrong_use(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(words)
    assert "expected steps such as 100,1000,5000, or log, or none" in capsys.readouterr().err
