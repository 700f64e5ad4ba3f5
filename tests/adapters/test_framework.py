"""What adapters have in common, without their frameworks."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from core.adapters.accelerate import AcceleratorCheckpoints, Position
from core.adapters.framework import put_file, refuse_others
from core.adapters.huggingface import TrainerCheckpoints
from core.adapters.lightning import lightning_checkpoints
from core.bundle.bundle import open_bundle
from core.bundle.storage import DISK
from core.checkpoint import CheckpointManager
from core.errors import CheckpointError


@pytest.mark.parametrize(
    ("adapter", "package"), [(TrainerCheckpoints, "transformers"), (AcceleratorCheckpoints, "accelerate")]
)
def test_a_missing_framework_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path, adapter, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CheckpointError) as error:
        adapter(SimpleNamespace(), "dante", tmp_path)
    said = (
        f"The adapter for {package} needs it (import of {package} halted; None in sys.modules): pip install {package}"
    )
    assert str(error.value) == said
    assert list(tmp_path.iterdir()) == []


def test_a_step_of_another_trainer_is_named_by_who_saved_it(tmp_path):
    model = torch.nn.Linear(2, 1)
    for step, extra, facts, by in (
        (1, {"saved_by": "accelerate"}, {}, "accelerate"),
        (2, {"note": 1}, {}, "a loop of one's own"),
        (3, None, {"training": {"seed": 1}}, "train.py or fit"),
    ):
        with CheckpointManager("dante", tmp_path, say=[].append) as manager:
            manager.record(**facts)
            manager.save(model, step=step, extra=extra)
        with open_bundle(tmp_path / "dante") as bundle, pytest.raises(CheckpointError) as error:
            refuse_others(bundle, "X", "wait")
        assert str(error.value) == (
            f"{tmp_path / 'dante'}: step {step} was saved by {by}, expected one of X: how far that had come is not in "
            "it. Choose another name, or wait. Nothing was changed."
        )


def test_a_file_is_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"1")
    put_file(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(DISK, "links", False)
    put_file(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "b").samefile(tmp_path / "a") and not (tmp_path / "c").samefile(tmp_path / "a")
    assert (tmp_path / "c").read_bytes() == b"1"


@pytest.mark.parametrize("own", [False, True], ids=["torch's generator", "a generator of the loader"])
def test_batches_go_on_in_the_order_and_with_the_noise_of_a_run_that_was_not_stopped(own):
    def loop(stop=None, state=None):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(7) if own else None
        loader = torch.utils.data.DataLoader(torch.arange(20), 4, shuffle=True, generator=generator)
        position = Position(loader, SimpleNamespace(step=0))
        if state is not None:
            position.load_state_dict(state[0])
            torch.set_rng_state(state[1])
        seen = []
        while position.epoch < 3:
            for batch in position.batches(lambda loader, count: (b for i, b in enumerate(loader) if i >= count)):
                seen.append([*batch.tolist(), torch.rand(1).item()])
                if (position.epoch, position.batch) == stop:
                    return position.state_dict(), torch.get_rng_state(), seen
        return seen

    with torch.random.fork_rng():
        whole = loop()
        for stop in [(0, 1), (0, 5), (1, 2), (2, 4)]:
            *state, before = loop(stop)
            assert before + loop(state=state) == whole, stop


def test_a_position_in_other_batches_is_refused():
    loaders = [torch.utils.data.DataLoader(torch.arange(20), size) for size in (4, 5)]
    first, other = (Position(loader, SimpleNamespace(step=0)) for loader in loaders)
    with pytest.raises(
        ValueError, match="its loader had 20 samples in batches of 4, here are 20 samples in batches of 5"
    ):
        other.load_state_dict(first.state_dict())


def test_lightning_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(CheckpointError, match=r"^The adapter for lightning.* needs it .*: pip install lightning$"):
        lightning_checkpoints("dante")
