"""--step N and --step newest of inspect_model.py and convert_checkpoints.py: runs of other programs, and kept steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import convert_checkpoints
import inspect_model
from core.containers.step_parents import one_step, steps_below
from core.errors import CheckpointNotFound
from tests.makers.models import save_steps
from tests.makers.trainer_folders import gpt2, save_dcp, write_fsdp, write_trainer


def trainer(root: Path, step: int, weights: dict[str, torch.Tensor]) -> None:
    write_trainer(root / f"checkpoint-{step}", step, weights)


def fsdp(root: Path, step: int, weights: dict[str, torch.Tensor]) -> None:
    write_fsdp(root / f"checkpoint-{step}", weights, step)


def torchtitan(root: Path, step: int, weights: dict[str, torch.Tensor]) -> None:
    save_dcp({"model": weights, "train_state": {"step": step}}, root / f"step-{step}")


def verl(root: Path, step: int, weights: dict[str, torch.Tensor]) -> None:
    (folder := root / f"global_step_{step}/actor").mkdir(parents=True)
    torch.save(weights, folder / "model_world_size_1_rank_0.pt")
    torch.save({"lr_scheduler": {"last_epoch": step}}, folder / "extra_state_world_size_1_rank_0.pt")
    (folder / "huggingface").mkdir()
    (folder / "huggingface/config.json").write_text('{"model_type": "gpt2", "n_head": 4, "n_layer": 1}')
    torch.save({"_position": step}, root / f"global_step_{step}/data.pt")
    (root / "latest_checkpointed_iteration.txt").write_text(str(step))


def numbered(root: Path, step: int, weights: dict[str, torch.Tensor]) -> None:
    (folder := root / f"{step:07}").mkdir(parents=True)
    torch.save(weights, folder / "ckpt.pt")


@pytest.mark.parametrize("make", [trainer, fsdp, torchtitan, verl, numbered])
def test_a_step_of_a_run_is_taken_by_its_number_or_as_the_newest(tmp_path, make, capsys):
    weights = {step: gpt2(1, seed=step) for step in (90, 100)}  # 100 is newer, though not by the alphabet
    for step, tensors in weights.items():
        make(tmp_path / "run", step, tensors)
    for said, step in (("90", 90), ("100", 100), ("newest", 100)):
        target = tmp_path / f"{said}.safetensors"
        args = [str(tmp_path / "run"), str(target), "--to", "safetensors", "--step", said]
        assert convert_checkpoints.main(args) == 0
        assert all(torch.equal(tensor, weights[step][name]) for name, tensor in load_file(target).items())
        capsys.readouterr()
        assert inspect_model.main([str(tmp_path / "run"), "--step", said]) == 0
        assert f"Location: {tmp_path}/run/" in (shown := capsys.readouterr().out)
        assert f"{step}" in shown.split("Location: ")[1].splitlines()[0]


def test_the_step_of_verl_is_its_actor_and_never_its_position_in_the_data(tmp_path, capsys):
    weights = gpt2(1)
    verl(tmp_path / "run", 5, weights)
    folder = tmp_path / "run/global_step_5"
    for source in (folder, folder / "actor"):
        assert inspect_model.main([str(source)]) == 0
        shown = capsys.readouterr()
        assert "heads 4 (from config)" in shown.out and "Step: 5\n" in shown.out
        assert shown.err == "step 5 is in the name of its folder alone\n"
        target = tmp_path / f"{source.name}.safetensors"
        assert convert_checkpoints.main([str(source), str(target), "--to", "safetensors"]) == 0
        assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(target).items())
        capsys.readouterr()


def test_a_run_without_a_flag_names_its_steps_and_the_flag(tmp_path):
    for step in (90, 100):
        trainer(tmp_path / "run", step, gpt2(1))
    run = tmp_path / "run"
    with pytest.raises(CheckpointNotFound) as caught:
        convert_checkpoints.main([str(run), str(tmp_path / "o.pt"), "--to", "pt"])
    assert str(caught.value) == (
        f"{run}: no checkpoint itself; it holds the steps 90, 100. Add --step N or --step newest, or name the folder "
        f"of one: {run}/checkpoint-100."
    )
    with pytest.raises(CheckpointNotFound, match=rf"{run}: no step 95; it holds 90, 100\."):
        convert_checkpoints.main([str(run), str(tmp_path / "o.pt"), "--to", "pt", "--step", "95"])


def test_what_holds_no_steps_says_so(tmp_path):
    with pytest.raises(CheckpointNotFound, match=r"no step newest; it holds no folders of steps\."):
        one_step(tmp_path, "newest")
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointNotFound, match=r"a\.pt: not a folder, so there are no steps to choose"):
        convert_checkpoints.main([str(tmp_path / "a.pt"), str(tmp_path / "o.pt"), "--to", "pt", "--step", "1"])
    (tmp_path / "step_by_step").mkdir()
    (tmp_path / "step-3").write_text("a file")
    assert steps_below(tmp_path) == {}


def test_a_kept_step_of_our_own_model_is_converted_and_shown(tmp_path, capsys):
    save_steps(tmp_path, 3, "dante")
    folder = tmp_path / "dante"
    newest, kept = (torch.load(path / "model.pt") for path in (folder, folder / "step_00000002"))
    for said, expected in (("newest", newest), ("3", newest), ("2", kept)):
        target = tmp_path / f"{said}.pt"
        assert convert_checkpoints.main([str(folder), str(target), "--to", "pt", "--step", said]) == 0
        assert all(torch.equal(tensor, expected[name]) for name, tensor in torch.load(target).items())
        capsys.readouterr()
        assert inspect_model.main([str(folder), "--step", said]) == 0
        assert f"Last recorded training step: {2 if said == '2' else 3}" in capsys.readouterr().out
