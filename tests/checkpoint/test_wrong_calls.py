"""Calls of the manager that cannot be meant, and those that have nothing to do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from core.checkpoint import CheckpointManager
from core.errors import CheckpointMismatch, InputError
from core.loading.optimizer import load_optimizer_state
from core.networks.distributed import World
from core.pretrained import load_pretrained_checkpoint
from core.saving.ranks import Ranks
from tests.checkpoint.test_optimizer import make, trained
from tests.makers.models import kept, manager, started, state_of


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": -1}, "keep is -1 and keep_every None: expected at least 0 and 1."),
        ({"keep_every": 0}, "keep is 1 and keep_every 0: expected at least 0 and 1."),
        ({"save_policy": "later"}, "save_policy is 'later' and stage_memory None: expected wait or skip, and bytes."),
        ({"stage_memory": -5}, "save_policy is 'wait' and stage_memory -5: expected wait or skip, and bytes."),
    ],
)
def test_impossible_settings_are_named(tmp_path, settings, said):
    with pytest.raises(InputError) as caught:
        manager(tmp_path, **settings)
    assert str(caught.value) == said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("named", [".", "../dante"])
def test_a_folder_may_be_named_from_within(tmp_path, monkeypatch, named):
    (tmp_path / "dante").mkdir()
    monkeypatch.chdir(tmp_path / "dante")
    assert CheckpointManager.of_folder(named).checkpoint_dir.resolve() == tmp_path / "dante"


@pytest.fixture
def saved(tmp_path):
    made, model, optimizer = started(tmp_path)
    with made:
        made.save(model, optimizer, step=1)
        made.wait()
        yield made


def test_plain_files_are_plain_already(saved, tmp_path):
    before = {path.name: path.read_bytes() for path in (tmp_path / "dante").iterdir() if path.is_file()}
    saved.consolidate()
    after = {path.name: path.read_bytes() for path in (tmp_path / "dante").iterdir() if path.is_file()}
    assert after == before


def test_only_the_first_rank_changes_the_folder(saved, tmp_path):
    second = Ranks()
    second.world = World(rank=1, size=2)
    other = manager(tmp_path, ranks=second)
    before = {path: path.read_bytes() for path in (tmp_path / "dante").rglob("*") if path.is_file()}
    assert other.prune(keep=0) == 0
    for nothing in (other.consolidate(), other.go_back(1), other.add_metrics(1, {"accuracy": 1.0})):
        assert nothing is None
    assert {path: path.read_bytes() for path in (tmp_path / "dante").rglob("*") if path.is_file()} == before


def test_metrics_are_of_the_newest_step_and_have_free_names(saved, tmp_path):
    with pytest.raises(InputError, match=r"dante: the newest step is 1, expected 2\."):
        saved.add_metrics(2, {"val_loss": 1.0})
    with pytest.raises(InputError, match=r"metrics: best, step cannot be names of metrics\."):
        saved.add_metrics(1, {"step": 3.0, "best": 1.0})
    saved.add_metrics(1, {"accuracy": 0.5})
    assert json.loads((tmp_path / "dante/training_state.json").read_text())["accuracy"] == 0.5


@pytest.fixture
def told(tmp_path):
    """A manager of a folder whose steps are told by their losses, and what it says."""
    said = []
    with CheckpointManager("dante", tmp_path, say=said.append, keep=9) as made:
        yield made, said


def test_saving_the_same_state_again_records_what_is_said_anew_and_nothing_else(told, tmp_path):
    made, said = told
    module, folder = torch.nn.Linear(2, 2), tmp_path / "dante"
    made.save(module, step=1, metrics={"val_loss": 3.0, "accuracy": 0.5}, extra={"epoch": 4})
    made.wait()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    first = state_of(folder)
    made.save(module, step=1, metrics={"val_loss": 3.0}, extra={"epoch": 4})
    made.wait()
    assert said[1:] == [f"step 1 is already saved in {folder}"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    made.save(module, step=1, metrics={"val_loss": 2.0, "f1": np.float32(0.25)}, extra={"epoch": 5})
    made.wait()
    assert said[2:] == [f"step 1 is already saved in {folder}; recorded anew: val_loss, f1, extra"]
    changed = {"val_loss": 2.0, "f1": 0.25, "extra": {"epoch": 5}, "best": {"step": 1, "val_loss": 2.0}}
    now = state_of(folder)
    assert {**now, "integrity": None} == {**first, **changed, "integrity": None}
    assert now["integrity"]["files"] == first["integrity"]["files"] and kept(folder) == []
    assert manager(tmp_path).load(module) == 1


def test_a_loss_that_is_measured_anew_decides_again_which_step_is_the_best(told, tmp_path):
    made, _ = told
    for step, loss in ((1, 2.0), (2, 1.0)):
        made.save(torch.nn.Linear(step, 1), step=step, metrics={"val_loss": loss})
        made.wait()
    made.add_metrics(2, {"accuracy": 0.5})
    assert state_of(tmp_path / "dante")["best"] == {"step": 2, "val_loss": 1.0}
    made.add_metrics(2, {"val_loss": 2.5})
    assert state_of(tmp_path / "dante")["best"] == {"step": 1, "val_loss": 2.0}
    made.add_metrics(2, {"val_loss": 1.5})
    assert state_of(tmp_path / "dante")["best"] == {"step": 2, "val_loss": 1.5}


@pytest.mark.parametrize("step", [-1, True, 1.0, "5", None, np.float32(2), np.int64(-3)], ids=repr)
def test_a_step_that_is_no_count_is_refused_at_the_save(tmp_path, step):
    made, model, optimizer = started(tmp_path)
    with made, pytest.raises(InputError) as caught:
        made.save(model, optimizer, step=step)
    expected = "expected a whole number of at least 0: the optimizer steps completed."
    assert str(caught.value) == f"step is {step!r}, {expected}"
    assert not (tmp_path / "dante/model.pt").exists()


def test_numbers_of_numpy_are_numbers(tmp_path):
    made, model, optimizer = started(tmp_path)
    extra = {"seen": [np.int32(3), {"rate": np.float64(0.25)}], "done": np.bool_(True)}
    with made:
        made.save(model, optimizer, step=np.int64(7), metrics={"val_loss": np.float32(1.5)}, extra=extra)
        made.wait()
        made.add_metrics(7, {"accuracy": np.float32(0.5)})
    state = json.loads((tmp_path / "dante/training_state.json").read_text())
    assert (state["step"], state["val_loss"], state["accuracy"], state["best"]["val_loss"]) == (7, 1.5, 0.5, 1.5)
    assert state["extra"] == {"seen": [3, {"rate": 0.25}], "done": True}


def test_an_extra_that_holds_itself_is_refused(saved):
    extra: dict = {}
    extra["again"] = extra
    model, optimizer = make(), None
    with pytest.raises(InputError, match="metrics or extra of step 2: "):
        saved.save(model, optimizer, step=2, extra=extra)


def test_a_gpt_is_no_pretrained_modded_model(saved, tmp_path):
    with pytest.raises(CheckpointMismatch, match=r"dante: its model is a GPT, expected one of GPTFlexAttention, "):
        load_pretrained_checkpoint(tmp_path / "dante")


def test_an_optimizer_state_of_another_number_of_parameters_is_counted():
    optimizer = trained()[1]
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("param_names", None)
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    with pytest.raises(CheckpointMismatch, match=rf"found {len(numbers)} parameters for 2 names"):
        load_optimizer_state(optimizer, state, names=["a", "b"])
    state["param_groups"] = [{**state["param_groups"][0], "params": numbers[:3]}]
    fewer = torch.optim.AdamW(list(make().parameters()))
    with pytest.raises(CheckpointMismatch, match=r"found 3 parameters without names, expected "):
        load_optimizer_state(fewer, state)
