"""Steps in shards: written by four ranks, opened and resumed by any number, damaged, killed."""

from __future__ import annotations

import json
import signal
import sys

import pytest
import torch

from core.bundle.bundle import open_bundle
from core.bundle.verify import verify
from core.checkpoint import CheckpointManager
from core.errors import CheckpointDamaged, CheckpointMismatch
from core.inspection.inspect import inspect_path
from core.loading.tensors import load_model, read_part
from core.model import GPT
from tests.makers.dcp_folders import load as load_by_torch
from tests.makers.models import TEXT, copy, flip
from tests.makers.ranks import finished, kill, output_of, processes, same, saved, start, train, wait_for

BATCH = {"batch_size": 12, "gradient_accumulation_steps": 1, "learning_rate": 0.01}
BOUND = 1e-6
"""How far weights of 20 steps may be from those of one process: sums in another order."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the text, and `dante`, which four ranks trained in shards, saved at 10 and 20."""
    root = tmp_path_factory.mktemp("sharded")
    (root / "text.txt").write_text(TEXT * 40)
    done = train(root, root / "text.txt", 4, "--parallel=fsdp", max_iters=20, eval_interval=10, **BATCH)
    assert done.returncode == 0, done.stderr
    assert "saved step 20" in done.stderr and "in shards of 4 ranks" in done.stderr
    return root


def whole_of(root):
    """Weights and moments by name, from the shards at the top, by our reader."""
    with open_bundle(root / "dante") as bundle:
        assert bundle.is_sharded
        average = [read_part(bundle.ema)] if bundle.ema else []
        return read_part(bundle.weights), read_part(bundle.optimizer)["state"], *average


def reloaded(root, ranks, parallel):
    """What ranks hold after a resume, gathered."""
    out = root / f"{parallel}{ranks}.pt"
    launch = [sys.executable, "-m", "tests.makers.forked", str(ranks)]
    done = finished([*launch, "tests.makers.reload", str(root), str(out), parallel])
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


def test_a_sharded_step_is_a_bundle_of_folders(run):
    names = sorted(p.name for p in (run / "dante/model_sharded").iterdir())
    assert names == [".metadata", *(f"__{rank}_0.distcp" for rank in range(4))]
    state = json.loads((run / "dante/training_state.json").read_text())
    assert state["optimizer_file"] == "optimizer_sharded" and state["step"] == 20
    assert {n for n in state["integrity"]["files"] if n.startswith("model")} == {f"model_sharded/{n}" for n in names}
    assert not (run / "dante/model.pt").exists()


def test_torch_reads_the_shards_as_we_do(run):
    weights, moments = whole_of(run)
    assert same(load_by_torch(run / "dante/model_sharded"), weights)
    theirs = load_by_torch(run / "dante/optimizer_sharded")
    assert same(theirs["state"], moments)
    assert [group["weight_decay"] for group in theirs["param_groups"]] == [0.1, 0.0]


def test_shards_of_four_ranks_are_the_weights_of_one_process(run, tmp_path):
    done = train(tmp_path, run / "text.txt", 0, max_iters=20, eval_interval=10, **BATCH)
    assert done.returncode == 0, done.stderr
    alone, together = saved(tmp_path)[0], whole_of(run)[0]
    assert alone.keys() == together.keys()
    assert max((alone[name] - together[name]).abs().max().item() for name in alone) < BOUND


@pytest.mark.parametrize(("ranks", "parallel"), [(1, "fsdp"), (2, "fsdp"), (3, "fsdp"), (4, "fsdp"), (2, "ddp")])
def test_a_sharded_step_resumes_on_any_number_of_ranks_to_the_bit(run, tmp_path, ranks, parallel):
    copy(run / "dante", tmp_path / "dante")
    found = reloaded(tmp_path, ranks, parallel)
    weights, moments = whole_of(run)
    assert found["step"] == 20
    assert same(found["weights"], weights)
    assert same(found["moments"], moments)


def test_a_sharded_step_opens_in_one_process_and_becomes_plain_files_at_its_next_save(run, tmp_path):
    copy(run / "dante", tmp_path / "dante")
    with open_bundle(tmp_path / "dante") as bundle:
        model = load_model(bundle)
    assert isinstance(model, GPT) and same(dict(model.state_dict()), whole_of(run)[0])
    done = train(tmp_path, run / "text.txt", 0, max_iters=21, **BATCH)
    assert done.returncode == 0 and "resuming at step 20" in done.stderr, done.stderr
    assert "resume is not exact; its weights and moments are." in done.stderr and "ranks 4 then, 1 now" in done.stderr
    assert (tmp_path / "dante/model.pt").is_file() and not (tmp_path / "dante/model_sharded").exists()
    with open_bundle(tmp_path / "dante", 20) as kept:
        assert kept.is_sharded and same(read_part(kept.weights), whole_of(run)[0])


def test_a_plain_step_resumes_in_shards_to_the_bit(run, tmp_path):
    assert train(tmp_path, run / "text.txt", 0, max_iters=5, **BATCH).returncode == 0
    weights, moments = saved(tmp_path)
    names = [name for group in moments["param_groups"] for name in group["param_names"]]
    found = reloaded(tmp_path, 2, "fsdp")
    assert same(found["weights"], weights)
    assert same(found["moments"], {name: moments["state"][i] for i, name in enumerate(names)})


def test_scripts_open_a_sharded_step(run, tmp_path):
    with inspect_path(run / "dante") as found:
        assert len(found.weights) == len(whole_of(run)[0]) and found.step == 20 and not found.damage
    words = ["--model_name=dante", f"--checkpoint_root={run}"]
    for script, more in (("inspect_model.py", ["--verify"]), ("generate.py", ["--prompt=In", "--max_new_tokens=5"])):
        done = finished([sys.executable, script, *words, *more])
        assert done.returncode == 0, done.stderr
    out = tmp_path / "plain.pt"
    done = finished([sys.executable, "convert_checkpoints.py", str(run / "dante"), str(out), "--to=pt"])
    assert done.returncode == 0, done.stderr
    assert same(torch.load(out, weights_only=True), whole_of(run)[0])


def test_a_damaged_shard_names_its_tensors_and_the_rank_that_wrote_it(run, tmp_path):
    folder = copy(run / "dante", tmp_path / "dante")
    with open_bundle(folder) as bundle:
        chunk = bundle.weights.tensors["blocks.0.sa.qkv.weight"].chunks[2]
    flip(folder / "model_sharded" / chunk.file, chunk.offset)
    with open_bundle(folder) as bundle, pytest.raises(CheckpointDamaged) as damage:
        verify(bundle)
    assert "model_sharded/__2_0.distcp (the shard of rank 2): blocks.0.sa.qkv.weight is damaged" in str(damage.value)
    done = train(tmp_path, run / "text.txt", 2, "--parallel=fsdp", max_iters=12, eval_interval=20, **BATCH)
    assert done.returncode == 0, done.stderr
    assert "__2_0.distcp (the shard of rank 2): blocks.0.sa.qkv.weight is damaged" in done.stderr
    assert "Continuing from step 10" in done.stderr and "resuming at step 10" in done.stderr
    assert "resume is not exact" in done.stderr and "ranks 4 then, 2 now" in done.stderr
    assert list(tmp_path.glob("dante/aside_00000020_damaged_*/model_sharded/__2_0.distcp"))


def test_a_missing_shard_names_the_rank_that_wrote_it(run, tmp_path):
    folder = copy(run / "dante", tmp_path / "dante")
    (folder / "optimizer_sharded/__3_0.distcp").unlink()
    with pytest.raises(CheckpointDamaged, match=r"optimizer_sharded/__3_0\.distcp \(the shard of rank 3\): missing"):
        open_bundle(folder)


def test_a_rank_killed_while_shards_are_saved_leaves_a_whole_step_and_the_run_ends_where_it_would_have(run, tmp_path):
    flags = {"max_iters": 40, "eval_interval": 40, "save_interval": 2, "dropout": 0.1, "ema": 0.9, **BATCH}
    whole = tmp_path / "whole"
    whole.mkdir()
    assert train(whole, run / "text.txt", 2, "--parallel=fsdp", **flags).returncode == 0
    going = start(tmp_path, run / "text.txt", 2, "--parallel=fsdp", restarts=5, **flags)
    for step in (6, 18):
        wait_for(going, tmp_path, step)
        assert kill(processes(going).get(1, -1), signal.SIGKILL)
    assert going.wait(200) == 0, output_of(tmp_path)
    assert output_of(tmp_path).count("resuming at step") == 2
    assert output_of(tmp_path).count("resume is exact") == 2
    assert same(whole_of(tmp_path), whole_of(whole))


def test_fsdp_refuses_what_needs_whole_matrices(run, tmp_path):
    done = train(tmp_path, run / "text.txt", 1, "--parallel=fsdp", "--arch=flex_small", n_head=None, n_embd=None)
    assert done.returncode == 1 and "Muon needs whole matrices" in done.stderr


def test_other_weights_than_the_config_says_are_refused_before_anything_is_read(run, tmp_path):
    folder = copy(run / "dante", tmp_path / "dante")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "block_size": 32}))
    with open_bundle(folder) as bundle, pytest.raises(CheckpointMismatch, match="block_size is 32, but"):
        load_model(bundle)


def test_shards_become_the_plain_files_of_the_same_step_by_the_command(run, tmp_path):
    folder = copy(run / "dante", tmp_path / "dante")
    weights, moments = whole_of(run)
    done = finished([sys.executable, "convert_checkpoints.py", str(folder), "--consolidate"])
    assert done.returncode == 0 and "step 20 is in plain files now" in done.stdout, done.stderr
    found, state = saved(tmp_path)
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    assert same(found, weights)
    assert same({name: state["state"][i] for i, name in enumerate(names)}, moments)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["step_00000010"]
    with open_bundle(folder) as bundle:
        assert verify(bundle) == [] and bundle.step == 20
    again = finished([sys.executable, "convert_checkpoints.py", str(folder), "--consolidate"])
    assert "already in plain files" in again.stdout
    done = train(tmp_path, run / "text.txt", 0, max_iters=21, **BATCH)
    assert done.returncode == 0 and "resuming at step 20" in done.stderr, done.stderr


def test_shards_become_plain_files_by_the_manager(run, tmp_path):
    copy(run / "dante", tmp_path / "dante")
    weights, said = whole_of(run)[0], []
    made = CheckpointManager("dante", tmp_path, say=said.append)
    made.consolidate()
    assert same(saved(tmp_path)[0], weights) and "step 20 is in plain files now (" in said[-1]


def test_consolidating_damaged_shards_changes_nothing(run, tmp_path):
    folder = copy(run / "dante", tmp_path / "dante")
    flip(folder / "optimizer_sharded/__1_0.distcp", 5000)
    before = sorted(str(p) for p in folder.rglob("*") if p.name != ".lock")
    done = finished([sys.executable, "convert_checkpoints.py", str(folder), "--consolidate"])
    assert done.returncode == 1 and "__1_0.distcp (the shard of rank 1)" in done.stderr
    assert sorted(str(p) for p in folder.rglob("*") if p.name != ".lock") == before


def test_a_save_that_fails_on_one_rank_is_told_to_all_and_the_next_one_succeeds(run, tmp_path):
    folder = copy(run / "dante", tmp_path / "dante")
    done = finished([sys.executable, "-m", "tests.makers.forked", "3", "tests.makers.failing_save", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    told = {(tmp_path / f"told{rank}.txt").read_text() for rank in range(3)}
    assert len(told) == 1
    (said,) = told
    assert "save of step 21 failed: rank 1: " in said and "__1_0.distcp: No space left on device" in said
    assert said.endswith("Step 20 is intact.")
    first, *others = (json.loads((tmp_path / f"copy{rank}.json").read_text()) for rank in range(3))
    assert "save of step 23 failed: rank 1: writing: Cannot allocate memory. Step 22 is intact." in first[0]
    assert first[1:] == [False, True] and others == 2 * [[first[0], True]], "no rank begins a save alone"
    assert json.loads((folder / "training_state.json").read_text())["step"] == 24
    assert not list(folder.glob(".stage-*"))
