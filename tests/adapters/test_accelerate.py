"""What an Accelerator has prepared, saved through a CheckpointManager: started again it ends with the same bits."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from core.checkpoint import CheckpointManager
from core.errors import CheckpointError
from tests.conftest import ROOT
from tests.makers.adapter_runs import differences, killed, whole

pytest.importorskip("accelerate")
pytestmark = pytest.mark.full

from core.adapters.accelerate import AcceleratorCheckpoints  # noqa: E402
from tests.adapters.accelerate_run import run  # noqa: E402


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"seedable": 1},
        {"accumulation": 1, "every": 3},
        {"accumulation": 4, "every": 1},
        {"workers": 1, "epochs": 2},
    ],
    ids=str,
)
def test_a_stop_behind_any_step_is_made_good(tmp_path, keys):
    settings = {"say": [].append, **keys}
    expected = run(tmp_path / "whole", **settings)
    steps = {1: 9, 2: 5, 4: 3}[keys.get("accumulation", 2)] * keys.get("epochs", 3)
    for stop in range(2, steps, 1 if not keys else 3):
        folder = tmp_path / f"stopped_{stop}"
        assert run(folder, stop, **settings) is None
        assert differences(expected, run(folder, **settings)) == [], stop


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_killed_several_times_ends_with_the_bits_of_one_that_was_not(tmp_path, ranks):
    words = ["epochs=20"]
    expected = whole("accelerate_run", tmp_path / "whole", *words, ranks=ranks)
    found, _ = killed("accelerate_run", tmp_path / "killed", *words, ranks=ranks)
    assert differences(expected, found) == []


def refused(call, *arguments, **keys) -> str:
    with pytest.raises(CheckpointError) as error:
        call(*arguments, **keys)
    return str(error.value)


def test_other_batches_are_refused(tmp_path):
    run(tmp_path, 4, say=[].append)
    said = refused(run, tmp_path, say=[].append, batch=6)
    assert "its loader had 36 samples in batches of 4, here are 36 samples in batches of 6" in said


def test_a_step_of_another_loop_is_refused(tmp_path):
    with CheckpointManager("small", tmp_path / "checkpoints") as manager:
        manager.save(torch.nn.Linear(2, 1), step=3, extra={"saved_by": "Hugging Face's Trainer"})
    assert refused(run, tmp_path).startswith(
        f"{tmp_path / 'checkpoints/small'}: step 3 was saved by Hugging Face's Trainer, expected one of accelerate"
    )


def test_a_folder_of_save_state_is_named(tmp_path):
    folder = tmp_path / "checkpoints/small"
    folder.mkdir(parents=True)
    (folder / "random_states_0.pkl").write_bytes(b"")
    assert refused(run, tmp_path).startswith(f"{folder}: a folder of accelerator.save_state, expected steps of a")


def made(tmp_path, kind="NO", loader=None, sync=True):
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(name=kind), sync_gradients=sync, step=0)
    return AcceleratorCheckpoints(accelerator, "small", tmp_path, loader)


def test_what_cannot_be_exact_is_refused(tmp_path):
    stateful = SimpleNamespace(load_state_dict=None)
    assert refused(made, tmp_path, "FSDP").startswith("small: accelerate trains with FSDP, expected a whole model")
    assert refused(made, tmp_path, loader=stateful).startswith(
        "small: the loader keeps a position of its own, expected"
    )
    assert refused(made(tmp_path, sync=False).save, 3).startswith("step 3 is not done: gradients are being accumulated")
    assert refused(made(tmp_path).batches).startswith("AcceleratorCheckpoints has no loader, expected one: ")


def test_the_loop_of_the_docs_runs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = next(block for block in blocks if "AcceleratorCheckpoints" in block)
    exec(code, {})
    last = CheckpointManager("linear").saved_step()
    again: dict = {}
    exec(code.replace("epochs(3)", "epochs(5)"), again)
    assert (last, again["step"]) == (10, 20)  # of 4 steps an epoch
