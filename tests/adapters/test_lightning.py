"""Lightning's Trainer saves through a CheckpointManager: started again it ends with the same bits."""

from __future__ import annotations

import re

import pytest
import torch

from core.bundle.bundle import open_bundle
from core.checkpoint import CheckpointManager
from core.errors import CheckpointError
from tests.conftest import ROOT
from tests.makers.adapter_runs import differences, killed, whole

pytest.importorskip("lightning.pytorch")
pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore"),  # of Lightning
]

from tests.adapters.lightning_run import run  # noqa: E402

QUIET = {"say": [].append}


@pytest.mark.parametrize(
    "keys",
    [
        {"val": "middle"},
        {"loader": "stateful", "scheduler": "epoch", "val": "epoch"},
        {"scheduler": "plateau", "val": "epoch"},
        {"loader": "stateful", "accumulation": 2},
        {"workers": 1, "epochs": 2},
    ],
    ids=str,
)
def test_a_stop_behind_any_step_is_made_good(tmp_path, keys):
    expected = run(tmp_path / "whole", **QUIET, **keys)
    for stop in range(
        2, 15 if not keys.get("accumulation") and not keys.get("workers") else 9, 2 if keys.get("workers") else 1
    ):
        folder = tmp_path / f"stopped_{stop}"
        assert run(folder, stop, **QUIET, **keys) is None
        assert differences(expected, run(folder, seed=9, **QUIET, **keys)) == [], stop


def test_a_plain_loader_is_exact_at_the_end_of_an_epoch_and_says_so(tmp_path):
    expected = run(tmp_path / "whole", **QUIET, loader="plain", every=5)
    said: list[str] = []
    assert run(tmp_path / "stopped", 8, say=said.append, loader="plain", every=5) is None
    assert differences(expected, run(tmp_path / "stopped", seed=9, **QUIET, loader="plain", every=5)) == []
    (line,) = (line for line in said if "position" in line)
    assert line.startswith(
        f"{tmp_path / 'stopped/checkpoints/small'}: DataLoader keeps no position, so the batches begin anew"
    )


@pytest.mark.parametrize(("loader", "steps"), [("stateful", 9), ("resumable", 8)])
def test_an_epoch_that_a_limit_ends_is_exact_or_it_is_said_which_is_not(tmp_path, loader, steps):
    said: list[str] = []
    expected = run(tmp_path / "whole", say=said.append, loader=loader, limit=3)  # of 5: resumable gives 3, 2, 3
    assert len(expected["losses"]) == steps
    unlike = []
    for stop in range(2, steps):
        assert run(tmp_path / f"{stop}", stop, **QUIET, loader=loader, limit=3) is None
        if differences(expected, run(tmp_path / f"{stop}", seed=9, **QUIET, loader=loader, limit=3)):
            unlike.append(stop)
    assert unlike == ([] if loader == "stateful" else [5])
    lines = [line for line in said if "limit_train_batches takes 3 of 5 batches, and a later epoch has the 2" in line]
    assert len(lines) == (loader == "resumable")


@pytest.mark.parametrize("keys", [{"every": 2}, {"every": 2, "val": "epoch"}, {"every": 5, "loader": "plain"}])
def test_a_finished_run_that_is_started_again_is_as_it_ended(tmp_path, keys):
    expected = run(tmp_path, **QUIET, **keys)
    assert differences(expected, run(tmp_path, seed=9, **QUIET, **keys)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("loader", "every", "ranks"), [("resumable", 2, 1), ("stateful", 2, 1), ("plain", "null", 2)])
def test_a_run_that_was_killed_several_times_ends_with_the_bits_of_one_that_was_not(tmp_path, loader, every, ranks):
    words = ["epochs=25", f"every={every}", "val=epoch", f"loader={loader}"]
    expected = whole("lightning_run", tmp_path / "whole", *words, ranks=ranks)
    found, log = killed("lightning_run", tmp_path / "killed", *words, ranks=ranks)
    assert differences(expected, found) == []
    assert log.count("going on from step") >= 2


def test_a_damaged_step_is_walked_back_over(tmp_path):
    expected = run(tmp_path / "whole", **QUIET)
    assert run(tmp_path / "stopped", 8, **QUIET, keep=3) is None
    file = tmp_path / "stopped/checkpoints/small/model.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said: list[str] = []
    assert differences(expected, run(tmp_path / "stopped", seed=9, say=said.append, keep=3)) == []
    assert any("damaged" in line for line in said) and any("going on from step 7" in line for line in said)


def test_a_step_is_a_bundle_with_what_was_measured(tmp_path):
    run(tmp_path, **QUIET, val="epoch", every=5)
    with open_bundle(tmp_path / "checkpoints/small") as bundle:
        assert bundle.step == 15 and bundle.state.val_loss is not None
    state = torch.load(tmp_path / "checkpoints/small/model.pt", weights_only=True)
    assert sorted(state) == ["net.0.bias", "net.0.weight", "net.2.bias", "net.2.weight"]


def refused(call, *arguments, **keys) -> str:
    with pytest.raises(CheckpointError) as error:
        call(*arguments, **keys)
    return str(error.value)


def test_a_step_of_another_loop_is_refused(tmp_path):
    with CheckpointManager("small", tmp_path / "checkpoints") as manager:
        manager.save(torch.nn.Linear(2, 1), step=3, extra={"saved_by": "accelerate"})
    assert refused(run, tmp_path, **QUIET).startswith(
        f"{tmp_path / 'checkpoints/small'}: step 3 was saved by accelerate, expected one of Lightning's Trainer"
    )


def test_the_example_of_the_docs_runs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = next(block for block in blocks if "lightning_checkpoints" in block)
    exec(code, {})
    assert CheckpointManager("regression").saved_step() == 24
    exec(code.replace("max_epochs=3", "max_epochs=5"), {})
    assert CheckpointManager("regression").saved_step() == 40
    anew = code.replace("ckpt_path=checkpoints.ckpt_path", "")
    assert "found step 40, and trainer.fit was called without it" in refused(exec, anew, {})
