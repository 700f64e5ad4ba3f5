"""What a conversion does not write is listed with the true reason: optimizers, the state of a run, ints and texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import convert_checkpoints
from core.families.parts import OPTIMIZER, RUN
from core.inspection.inspect import inspect_path
from tests.makers.conversions import converted
from tests.makers.dcp_folders import save
from tests.makers.nanogpt_files import TODAY, ckpt

TITAN = {
    "tok_embeddings": {"weight": torch.ones(4, 2)},
    "layers": {"0": {"wq": {"weight": torch.ones(2, 2)}}},
    "optimizer": {"state": {"layers.0.wq.weight": {"exp_avg": torch.ones(2, 2)}}, "param_groups": [{"lr": 1e-3}]},
    "train_state": {"step": torch.tensor(7, dtype=torch.int32), "ntokens": 12},
    "lr_scheduler": {"last_epoch": torch.tensor(3)},
    "dataloader": {"dp_rank_0": torch.zeros(3, dtype=torch.uint8)},
}
"""As torchtitan saves: the model's names stand at the top, beside those of the run."""

RUN_STATE = "state of the run, not a weight of the model"
KEPT = "optimizer; --include_optimizer keeps it"


@pytest.mark.parametrize("container", ["dcp", "torch"])
def test_the_run_of_torchtitan_is_no_part_of_its_model(tmp_path, container):
    source = tmp_path / "titan"
    if container == "dcp":
        save(TITAN, source)
    else:
        torch.save(TITAN, source)
    weights = {"tok_embeddings.weight", "layers.0.wq.weight"}
    found = inspect_path(source)
    assert found.step == 7 and found.weights.keys() == weights
    facts = converted(source, tmp_path / "x.safetensors", "safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == weights
    assert facts["dropped"] == {
        "optimizer.state.layers.0.wq.weight.exp_avg": KEPT,
        "train_state.step": RUN_STATE,
        "lr_scheduler.last_epoch": RUN_STATE,
        "dataloader.dp_rank_0": RUN_STATE,
        "optimizer": "1 value; --to safetensors has no place for it",
        "train_state": "1 value; --to safetensors has no place for it",
    }


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(OPTIMIZER),
    st.sampled_from(RUN),
    st.dictionaries(st.sampled_from(["epoch", "name", "lr"]), st.sampled_from([3, "run-7", 0.5, -1]), max_size=3),
    st.booleans(),
)
def test_optimizer_run_and_values_of_an_unknown_program_are_left_out_and_listed(
    tmp_path_factory, optimizer, run, values, as_list
):
    folder = tmp_path_factory.mktemp("unknown")
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"net": {"w": torch.ones(2)}, optimizer: [state] if as_list else state, run: {"x": torch.ones(3)}}
    torch.save(content | values, folder / "u.pt")
    facts = converted(folder / "u.pt", folder / "u.safetensors", "safetensors")
    assert load_file(folder / "u.safetensors").keys() == {"net.w"}
    dropped = facts["dropped"]
    moment = f"{optimizer}.{'0.' * as_list}state.0.exp_avg"
    assert dropped[moment] == KEPT and dropped[f"{run}.x"] == RUN_STATE
    for name, value in values.items():
        assert dropped[name].startswith(f'"{value}";' if isinstance(value, str) else f"{value};")
    converted(folder / "u.pt", folder / "with.safetensors", "safetensors", include_optimizer=True)
    assert load_file(folder / "with.safetensors").keys() == {"net.w", moment}


def test_an_optimizer_alone_is_what_is_converted(tmp_path):
    torch.save({"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, tmp_path / "o.pt")
    converted(tmp_path / "o.pt", tmp_path / "o.safetensors", "safetensors")
    assert load_file(tmp_path / "o.safetensors").keys() == {"optimizer.state.0.exp_avg"}


def test_modules_with_names_of_a_run_are_weights(tmp_path):
    torch.save({"scaler": {"mean": torch.ones(2)}, "progress": {"w": torch.ones(2)}}, tmp_path / "m.pt")
    converted(tmp_path / "m.pt", tmp_path / "m.safetensors", "safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == {"scaler.mean", "progress.w"}


def test_entries_of_nanogpt_without_a_place_are_listed_and_those_taken_over_are_not(tmp_path, capsys):
    ckpt(tmp_path / "ckpt.pt", order=TODAY)
    assert converted(tmp_path / "ckpt.pt", tmp_path / "b", "bundle")["dropped"] == {}
    facts = converted(tmp_path / "ckpt.pt", tmp_path / "hf", "hf")
    assert facts["dropped"]["optimizer"] == "27 tensors and 21 values; --to hf has no place for it"
    assert facts["dropped"]["iter_num"] == "40; --to hf has no place for it"
    assert convert_checkpoints.main([str(tmp_path / "ckpt.pt"), str(tmp_path / "x.pt"), "--to", "pt"]) == 0
    said = capsys.readouterr().out
    assert "left out: optimizer (27 tensors and 21 values; --include_optimizer keeps it)" in said
    assert "nanoGPT, 10 tensors, 0 left out, and 5 other entries" in said


def test_a_conversion_counts_the_tensors_of_each_part_that_it_leaves_out(tmp_path, capsys):
    save(TITAN, tmp_path / "titan")
    words = [str(tmp_path / "titan"), str(tmp_path / "x.safetensors"), "--to", "safetensors"]
    assert convert_checkpoints.main(words) == 0
    said = capsys.readouterr().out
    assert f"left out: 1 tensor: {KEPT}" in said and f"left out: 3 tensors: {RUN_STATE}" in said
    assert "6 tensors, 4 left out, and 2 other entries" in said
