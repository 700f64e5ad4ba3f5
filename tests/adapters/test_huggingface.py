"""Hugging Face's Trainer, saving through a CheckpointManager: stopped and started again it ends with the same bits."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from core.bundle.retention import best_step
from core.checkpoint import CheckpointManager
from core.errors import CheckpointError
from tests.conftest import ROOT
from tests.makers.adapter_runs import differences, killed, whole

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("default")]  # of the frameworks

from core.adapters.huggingface import TrainerCheckpoints  # noqa: E402
from tests.adapters.hf_trainer_run import make_trainer, result  # noqa: E402


class Stop(Exception):
    pass


class Stopper(transformers.TrainerCallback):
    """Ends training within a step: its weights are new, and nothing else."""

    def __init__(self, step):
        self.step = step

    def on_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            raise Stop


@pytest.fixture(autouse=True)
def quiet():
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        transformers.logging.set_verbosity_error()
        yield


def train(folder: Path, stop: int | None = None, lines: list[str] | None = None, wrap=None, rules=None, **changed):
    trainer = make_trainer(folder, **changed)
    if wrap:
        data = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
        trainer = transformers.Trainer(wrap(trainer.model), trainer.args, **data)
    say = (lines if lines is not None else []).append
    checkpoints = TrainerCheckpoints(trainer, "tiny", folder / "checkpoints", say=say, **(rules or {}))
    if stop is not None:
        trainer.add_callback(Stopper(stop))
    try:
        trainer.train(resume_from_checkpoint=checkpoints.resume_folder())
    except Stop:
        checkpoints.manager.close()
        return None
    assert not list((folder / "checkpoints").glob(".*")), "the folder that Trainer read is gone"
    return result(trainer)


def same_from(tmp_path, stops, **settings):
    expected = train(tmp_path / "whole", **settings)
    for stop in stops:
        folder = tmp_path / f"stopped_{stop}"
        assert train(folder, stop, **settings) is None
        assert differences(expected, train(folder, **settings)) == [], stop


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["num_train_epochs=16"], id="accumulation"),
        pytest.param(["num_train_epochs=16", 'save_strategy="epoch"', 'eval_strategy="epoch"'], id="epochs"),
        pytest.param(["gradient_accumulation_steps=1", "max_steps=96", "logging_steps=5"], id="a number of steps"),
    ],
)
@pytest.mark.slow
def test_a_run_that_was_killed_several_times_ends_with_the_bits_of_one_that_was_not(tmp_path, words):
    expected = whole("hf_trainer_run", tmp_path / "whole", *words)
    found, log = killed("hf_trainer_run", tmp_path / "killed", *words, seed=len(words))
    assert "Trainer goes on from step" in log
    assert differences(expected, found) == []


@pytest.mark.slow
def test_two_processes_that_were_killed_end_with_the_bits_of_two_that_were_not(tmp_path):
    words = ["per_device_train_batch_size=2", "num_train_epochs=16"]
    expected = whole("hf_trainer_run", tmp_path / "whole", *words, ranks=2)
    found, log = killed("hf_trainer_run", tmp_path / "killed", *words, ranks=2, kills=2)
    assert "Trainer goes on from step" in log
    assert differences(expected, found) == []


@pytest.mark.slow
def test_a_stop_within_any_step_is_made_good(tmp_path):
    same_from(tmp_path, range(3, 16))


@pytest.mark.parametrize(
    "settings",
    [
        {"train_sampling_strategy": "group_by_length"},  # drawn from torch's generator at the beginning of the epoch
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"load_best_model_at_end": True, "save_steps": 4},
        {"neftune_noise_alpha": 5.0, "bf16": True},
        {"max_steps": 8},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_arguments_of_trainer_are_exact_too(tmp_path, settings):
    same_from(tmp_path, (7,), **settings)


def test_a_finished_run_that_is_started_again_changes_nothing(tmp_path):
    expected = train(tmp_path, max_steps=8)  # within an epoch: Trainer alone would make a ninth step
    assert differences(expected, train(tmp_path, max_steps=8)) == []
    assert CheckpointManager("tiny", tmp_path / "checkpoints").saved_step() == 8


def test_a_damaged_newest_step_is_walked_back_over(tmp_path):
    expected = train(tmp_path / "whole", rules={"keep": 2})
    train(tmp_path / "stopped", 9, rules={"keep": 2})
    path = tmp_path / "stopped/checkpoints/tiny/optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    lines: list[str] = []
    assert differences(expected, train(tmp_path / "stopped", lines=lines, rules={"keep": 2})) == []
    assert any(line.endswith("Trainer goes on from step 6") for line in lines)


def test_the_best_step_by_what_was_measured_is_kept_and_loaded_at_the_end(tmp_path):
    found = train(tmp_path, save_steps=4, eval_steps=4, load_best_model_at_end=True, learning_rate=0.05)
    folder = tmp_path / "checkpoints/tiny"
    measured = {line["step"]: line["eval_loss"] for line in found["log"] if "eval_loss" in line}
    best = min((step for step in measured if step % 4 == 0 or step == 15), key=measured.__getitem__)
    assert best_step(folder) == best < 15
    kept = torch.load(folder / f"step_{best:08d}/model.pt", weights_only=True)
    assert differences(kept, {name: found["model"][name] for name in kept}) == []


@pytest.mark.parametrize("only", [True, False])
def test_a_model_of_peft_goes_on_exactly(tmp_path, only):
    peft = pytest.importorskip("peft")

    def wrap(model):
        torch.manual_seed(3)
        return peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
        )

    same_from(tmp_path, (7,), wrap=wrap, rules={"trainable_only": only})


def test_the_first_call_finds_nothing_and_begins_anew(tmp_path):
    checkpoints = TrainerCheckpoints(make_trainer(tmp_path), "tiny", tmp_path)
    assert checkpoints.resume_folder() is None
    checkpoints.manager.close()


def test_changed_batches_are_reported(tmp_path):
    train(tmp_path, 9)
    lines: list[str] = []
    train(tmp_path, lines=lines, per_device_train_batch_size=2)
    said = "batches and noise are not exact from here: per_device_train_batch_size was 4, is 2"
    assert f"{tmp_path / 'checkpoints/tiny'}: {said}" in lines


def refused(trainer, root: Path, call=lambda checkpoints: checkpoints.resume_folder(), **rules) -> str:
    checkpoints = TrainerCheckpoints(trainer, "tiny", root / "checkpoints", say=[].append, **rules)
    with pytest.raises(CheckpointError) as error:
        call(checkpoints)
    checkpoints.manager.close()
    return str(error.value)


def test_a_folder_of_trainers_own_is_named_with_the_call_that_goes_on_from_it(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    own = str(tmp_path / "trainer/checkpoint-2")
    expected = (
        f"{own}: a checkpoint of Trainer's own, and {tmp_path / 'checkpoints/tiny'} has no step. Go on from it with "
        f"trainer.train(resume_from_checkpoint={own!r}), or begin anew with allow_fresh=True."
    )
    assert refused(trainer, tmp_path) == expected
    checkpoints = TrainerCheckpoints(make_trainer(tmp_path, max_steps=6), "tiny", tmp_path / "checkpoints")
    checkpoints.trainer.train(resume_from_checkpoint=own)
    assert checkpoints.manager.saved_step() == 6


def test_a_step_of_another_loop_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with CheckpointManager("tiny", tmp_path / "checkpoints") as manager:
        manager.save(trainer.model, step=3)
    assert refused(trainer, tmp_path) == (
        f"{tmp_path / 'checkpoints/tiny'}: step 3 was saved by a loop of one's own, expected one of Hugging Face's "
        "Trainer: how far that had come is not in it. Choose another name, or load its weights with "
        "CheckpointManager.load. Nothing was changed."
    )


def test_training_from_scratch_over_steps_is_refused(tmp_path):
    train(tmp_path, 9)
    said = refused(make_trainer(tmp_path), tmp_path, lambda checkpoints: checkpoints.trainer.train())
    assert said.startswith(
        f"{tmp_path / 'checkpoints/tiny'}: found step 8, and Trainer begins at step 0. Call trainer."
    )


def test_another_optimizer_is_refused(tmp_path):
    train(tmp_path, 9)

    def go_on(checkpoints):
        checkpoints.trainer.train(resume_from_checkpoint=checkpoints.resume_folder())

    said = refused(make_trainer(tmp_path, optim="adagrad"), tmp_path, go_on)
    assert "found the state of AdamW, expected that of Adagrad with the same parameters" in said


def test_a_model_in_shards_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(CheckpointError, match=r"tiny: Trainer shards the model .*expected a whole one in each process"):
        TrainerCheckpoints(trainer, "tiny", tmp_path)


def test_saving_the_best_steps_alone_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match='tiny: save_strategy is "best", expected "steps" or "epoch"'):
        TrainerCheckpoints(make_trainer(tmp_path, save_strategy="best"), "tiny", tmp_path)


def test_the_loop_of_the_docs_runs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "TrainerCheckpoints" in block)
    exec(code, {})
    last = CheckpointManager("tiny").saved_step()
    again: dict = {}
    exec(code.replace("num_train_epochs=2", "num_train_epochs=3"), again)
    assert (last, again["checkpoints"].manager.saved_step()) == (10, 15)
