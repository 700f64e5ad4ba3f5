"""Going back to an older step, beginning anew over what cannot be used, and removing what lies aside."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from core.bundle.commit import ModelFolder
from core.bundle.rewind import go_back
from core.checkpoint import CheckpointManager
from core.console.commandline import DONE, FAILED
from core.errors import CheckpointDamaged, CheckpointLocked, CheckpointNotFound, NoneIntact
from core.saving.snapshot import Snapshot
from tests.conftest import ROOT
from tests.makers.locks import locked
from tests.makers.models import equal, flip, kept, manager, save_steps, started, state_of, train_and_save, weights


def trained(root, steps, **settings):
    """A run of some steps, each saved with a loss; the weights of each step."""
    made, model, optimizer = started(root, keep=99, **settings)
    seen = {}
    for _ in range(steps):
        train_and_save(made, model, optimizer, 1, val_loss=lambda step: 10.0 - step)
        seen[model.step] = weights(model)
    made.close()
    return seen


def asides(root):
    return sorted(p.name.rpartition("_")[0] for p in (root / "dante").glob("aside_*"))


def test_the_branch_that_began_at_an_older_step_is_the_one_resumed_next_time(tmp_path):
    seen = trained(tmp_path, 5)
    lines = []
    with CheckpointManager("dante", tmp_path, say=lines.append) as made:
        made.go_back(2)
        with made.newest_intact() as bundle:
            assert bundle.step == 2
    assert kept(tmp_path / "dante") == ["step_00000001", "step_00000002"]
    assert asides(tmp_path) == [f"aside_0000000{n}_abandoned" for n in (3, 4, 5)]
    assert len(lines) == 1 and "back to step 2" in lines[0] and "until --prune" in lines[0]
    made, model, optimizer = started(tmp_path, keep=99)
    assert model.step == 2 and equal(model.state_dict(), seen[2])
    train_and_save(made, model, optimizer, 1)
    made.close()
    assert equal(model.state_dict(), seen[3])
    assert kept(tmp_path / "dante") == ["step_00000001", "step_00000002"]
    assert CheckpointManager.load_for_inference("dante", tmp_path).step == 3


def test_the_new_branch_says_where_it_left_and_what_lies_aside_is_of_the_old_one(tmp_path):
    trained(tmp_path, 4)
    run = state_of(tmp_path / "dante")["run"]
    with manager(tmp_path, keep=99) as made:
        made.go_back(2)
    second = state_of(tmp_path / "dante")
    assert second["went_back"]["why"] == "abandoned" and second["went_back"]["step"] == 4
    assert list(second)[-1] == "integrity"
    save_steps(tmp_path, 2, keep=99)
    state = state_of(tmp_path / "dante")
    assert state["run"] == run and state["commit_number"] == 4
    assert (state["branch"]["step"], state["branch"]["commit_id"]) == (2, second["commit_id"])
    assert "went_back" not in state
    (aside,) = (tmp_path / "dante").glob("aside_00000004_*")
    assert "branch" not in state_of(aside) and state_of(aside)["run"] == run


def test_going_back_to_the_newest_step_changes_nothing(tmp_path):
    trained(tmp_path, 2)
    before = named(tmp_path / "dante")
    with manager(tmp_path) as made:
        made.go_back(2)
    assert named(tmp_path / "dante") == before


def test_going_back_from_a_step_just_gone_back_to_keeps_it_once(tmp_path):
    trained(tmp_path, 3)
    with manager(tmp_path) as made:
        made.go_back(2)
        made.go_back(1)
    assert asides(tmp_path) == ["aside_00000002_abandoned", "aside_00000003_abandoned"]
    assert kept(tmp_path / "dante") == ["step_00000001"]


def test_the_best_step_after_going_back_is_one_of_the_present_branch(tmp_path):
    trained(tmp_path, 4)
    with manager(tmp_path) as made:
        made.go_back(2)
    save_steps(tmp_path, 1, keep=99, val_loss=lambda step: 20.0)
    assert state_of(tmp_path / "dante")["best"] == {"step": 2, "val_loss": 8.0}
    assert CheckpointManager.load_for_inference("dante", tmp_path, step="best").step == 2


def test_a_best_step_that_was_removed_before_gives_way_to_the_best_that_is_left(tmp_path):
    save_steps(tmp_path, 4, keep=1, keep_every=2, val_loss={1: 1.0, 2: 5.0, 3: 0.5, 4: 0.1}.get)
    assert kept(tmp_path / "dante") == ["step_00000002", "step_00000003"]
    with manager(tmp_path) as made:
        made.go_back(2)
    assert state_of(tmp_path / "dante")["best"] == {"step": 1, "val_loss": 1.0}
    assert CheckpointManager.load_for_inference("dante", tmp_path, step="best").step == 2


def test_a_step_that_is_not_kept_is_answered_with_those_that_are_and_nothing_changes(tmp_path):
    trained(tmp_path, 3)
    with manager(tmp_path) as made:
        made.go_back(1)
        before = named(tmp_path / "dante")
        flag = "train.py --keep_steps 7 would have kept it."
        listed = rf"Kept steps: 1 \(val_loss 9.0000\)\. {flag}"
        with pytest.raises(CheckpointNotFound, match=rf"dante: step 7 is not kept\. {listed}$"):
            made.go_back(7)
        said = r"step 2 is not kept\. Rename aside_00000002_abandoned_\w+ to step_00000002 to have it back\."
        with pytest.raises(CheckpointNotFound, match=said):
            made.go_back(2)
        assert named(tmp_path / "dante") == before


def test_a_step_aside_can_be_renamed_and_gone_back_to(tmp_path):
    seen = trained(tmp_path, 3)
    folder = tmp_path / "dante"
    with manager(tmp_path) as made:
        made.go_back(1)
    (aside,) = folder.glob("aside_00000003_*")
    aside.rename(folder / "step_00000003")
    with manager(tmp_path) as made:
        made.go_back(3)
    assert equal(CheckpointManager.load_for_inference("dante", tmp_path).state_dict(), seen[3])


def test_a_damaged_step_is_not_gone_back_to_and_nothing_changes(tmp_path):
    trained(tmp_path, 3)
    folder = tmp_path / "dante"
    flip(folder / "step_00000001/model.pt", 4000)
    before = named(folder)
    with manager(tmp_path) as made:
        names = r"token_embedding_table\.weight, lm_head\.weight"
        with pytest.raises(CheckpointDamaged, match=rf"step_00000001/model\.pt: {names} is damaged \(CRC32"):
            made.go_back(1)
        with pytest.raises(
            CheckpointDamaged, match=r"step_00000001/model\.pt: \S+, lm_head\.weight is damaged \(CRC32"
        ):
            go_back(ModelFolder(folder), 1, print)  # which checks unless told otherwise
        assert named(folder) == before
    with manager(tmp_path, verify=False) as made:
        made.go_back(1)
        assert state_of(folder)["step"] == 1


def test_a_single_file_that_came_after_the_step_is_not_chosen_over_it(tmp_path):
    trained(tmp_path, 3)
    path = tmp_path / "dante/latest.pt"
    made, model, optimizer = started(tmp_path, keep=9)
    content = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "step": 30}
    torch.save(content | {"config": model.config.to_dict(), "tokenizer": model.tokenizer.state()}, path)
    made.close()
    made, model, optimizer = started(tmp_path, keep=9)
    assert model.step == 30
    train_and_save(made, model, optimizer, 1)
    made.go_back(2)
    with made.newest_intact() as bundle:
        assert (bundle.step, bundle.single) == (2, None)
    made.close()
    assert path.exists() and [entry["name"] for entry in state_of(tmp_path / "dante")["legacy"]] == ["latest.pt"]


def test_the_log_of_the_abandoned_branch_goes_aside_with_it(tmp_path):
    trained(tmp_path, 2)
    (tmp_path / "dante/metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with manager(tmp_path) as made:
        made.go_back(1)
    (aside,) = (tmp_path / "dante").glob("aside_*")
    assert (aside / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("links", [True, False], ids=["links", "moves"])
def test_prune_removes_what_lies_aside_names_it_and_counts_what_it_frees(tmp_path, monkeypatch, links):
    monkeypatch.setattr("core.bundle.storage.DISK.links", links)
    trained(tmp_path, 4)
    folder, lines = tmp_path / "dante", []
    with CheckpointManager("dante", tmp_path, say=lines.append) as made:
        made.go_back(2)
        gone = list(folder.glob("aside_*"))
        size = sum(file.stat().st_size for path in gone for file in path.iterdir())
        before = disk_use(folder)
        lines.clear()
        assert made.prune() == size == before - disk_use(folder)
    assert not list(folder.glob("aside_*")) and not list(folder.glob(".trash*"))
    assert [line.split(" (")[0] for line in lines] == [f"removed {path}" for path in sorted(gone)]
    assert kept(folder) == ["step_00000001", "step_00000002"]


def disk_use(folder):
    files = {p.stat().st_ino: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return sum(files.values())


@pytest.mark.parametrize(("broken", "stays"), [((4,), 3), ((4, 3), 2), ((4, 2), 3), ((), None), ((4, 3, 2, 1), None)])
def test_the_last_step_that_can_be_loaded_is_never_pruned(tmp_path, monkeypatch, broken, stays):
    def holding(step):  # an older program saved what no load gives back
        return {"state": {}, "param_groups": [], "hook": print if step in broken and step % 2 else None}

    monkeypatch.setattr(Snapshot, "refuse_unloadable", lambda self: None)
    said = []
    made = CheckpointManager("dante", tmp_path, say=said.append, keep=9)
    for step in (1, 2, 3, 4):
        made.save(torch.nn.Linear(step, 1), holding(step), step=step)
        made.wait()
    for step in broken:
        if step % 2 == 0:
            flip(tmp_path / "dante" / ("model.pt" if step == 4 else f"step_{step:08d}/model.pt"), 900)
    said.clear()
    made.prune(keep=0)
    folder = tmp_path / "dante"
    assert kept(folder) == ([f"step_{stays:08d}"] if stays else [])
    spared = [f"WARNING: {path} stays: it is the last step that can be loaded" for path in folder.glob("step_*")]
    assert [line for line in said if line.startswith("WARNING")] == spared


def test_prune_with_a_number_applies_the_rules_of_the_run_with_that_number(tmp_path):
    made, model, optimizer = started(tmp_path, keep=9, keep_every=4)
    train_and_save(made, model, optimizer, 6)
    assert kept(tmp_path / "dante") == [f"step_0000000{n}" for n in range(1, 6)]
    made.prune()
    assert len(kept(tmp_path / "dante")) == 5
    made.prune(keep=1)
    made.close()
    assert kept(tmp_path / "dante") == ["step_00000004", "step_00000005"]


def test_files_that_a_kept_step_shares_are_not_counted_as_freed(tmp_path):
    trained(tmp_path, 2)
    folder = tmp_path / "dante"
    flip(folder / "model.pt", 4000)
    with manager(tmp_path) as made:
        made.newest_intact().close()
        (aside,) = folder.glob("aside_00000002_damaged_*")
        os.link(folder / "step_00000001/model.pt", aside / "more.pt")
        size = sum(p.stat().st_size for p in aside.iterdir())
        assert made.prune() == size - (folder / "step_00000001/model.pt").stat().st_size


def train(root, *flags):
    command = [sys.executable, "train.py", "--checkpoint_root", str(root), "--model_name", "dante", *flags]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


SIZES = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 8, "batch_size": 2, "eval_iters": 1}
SMALL_RUN = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
def test_the_command_line_goes_back_and_prunes(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    source = ("--input_file", str(tmp_path / "text.txt"))
    first = train(tmp_path, *SMALL_RUN, *source, "--max_iters", "6", "--eval_interval", "2", "--keep", "5")
    assert first.returncode == DONE, first.stderr
    back = train(tmp_path, *source, "--resume_from", "2", "--max_iters", "4", "--keep", "5")
    assert back.returncode == DONE, back.stderr
    assert "back to step 2" in back.stderr and "resuming at step 2" in back.stderr
    assert state_of(tmp_path / "dante")["step"] == 4
    lines = [json.loads(line)["step"] for line in (tmp_path / "dante/metrics.jsonl").read_text().splitlines()]
    assert max(lines) == 4
    assert len(asides(tmp_path)) == 2
    pruned = train(tmp_path, "--prune")
    assert pruned.returncode == DONE and pruned.stdout.endswith(" KB freed\n"), pruned.stderr
    assert pruned.stderr.count("removed ") == 2 and not asides(tmp_path)
    nothing = train(tmp_path / "typo", "--prune")
    assert nothing.returncode == FAILED and not (tmp_path / "typo").exists()


def named(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".lock"))


def files_of(folder):
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock"))
    return {p.relative_to(folder): p.read_bytes() for p in files}


def damaged_bundle(folder):
    flip(folder / "model.pt", 4000)


def only_damaged_kept_steps(folder):
    flip(folder / "step_00000001/model.pt", 4000)
    for name in ("model.pt", "config.json", "tokenizer.json", "training_state.json", "optimizer.pt"):
        (folder / name).unlink()


def weights_without_config(folder):
    (folder / "config.json").unlink()


def optimizer_alone(folder):
    for name in ("model.pt", "config.json", "tokenizer.json", "training_state.json"):
        (folder / name).unlink()


def damaged_single_file(folder):
    for path in folder.iterdir():
        if path.is_file() and path.name != ".lock":
            path.unlink()
    (folder / "latest.pt").write_bytes(b"PK\3\4 and no more")


def nothing_but_an_aside(folder):
    (folder / "model.pt").rename(folder / "x")
    aside = folder / "aside_00000002_damaged_ab"
    aside.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name != ".lock":
            path.rename(aside / path.name)


LEFTOVERS = [
    damaged_bundle,
    only_damaged_kept_steps,
    weights_without_config,
    optimizer_alone,
    damaged_single_file,
    nothing_but_an_aside,
]


@pytest.mark.parametrize("leave", LEFTOVERS, ids=[f.__name__ for f in LEFTOVERS])
def test_what_is_left_and_cannot_be_used_never_starts_anew_in_silence(tmp_path, leave):
    made, model, optimizer = started(tmp_path, keep=1 if leave is only_damaged_kept_steps else 0)
    train_and_save(made, model, optimizer, 2)
    made.resumed = {}
    made.close()
    folder, lines = tmp_path / "dante", []
    if leave is not only_damaged_kept_steps:
        for step in kept(folder):
            for path in (folder / step).iterdir():
                path.unlink()
            (folder / step).rmdir()
    leave(folder)
    before = files_of(folder)
    with (
        manager(tmp_path) as made,
        pytest.raises(NoneIntact, match=r"dante.*To start from scratch, use another .*--allow_fresh"),
    ):
        made.newest_intact()
    assert files_of(folder) == before
    with CheckpointManager("dante", tmp_path, say=lines.append, allow_fresh=True) as made:
        assert made.newest_intact() is None
        fresh, _, step = made.initialize_for_training({"n_embd": 16, "n_head": 1}, "char", "abc", 1e-3)
    assert step == 0 and fresh.config.n_embd == 16
    moved = {p.read_bytes() for p in folder.rglob("aside_*/*")}
    assert set(before.values()) <= moved
    said = "\n".join(lines)
    assert "starting from scratch (--allow_fresh)" in said
    assert all(path.name in said for path in folder.glob("aside_*_cleared_*"))


def test_each_kept_step_that_a_new_start_clears_has_a_folder_of_its_own_aside(tmp_path):
    trained(tmp_path, 3)
    folder, lines = tmp_path / "dante", []
    weights_of = {}
    for step, path in ((3, folder), (2, folder / "step_00000002"), (1, folder / "step_00000001")):
        flip(path / "model.pt", 4000)
        weights_of[step] = (path / "model.pt").read_bytes()
    with CheckpointManager("dante", tmp_path, say=lines.append, allow_fresh=True) as made:
        assert made.newest_intact() is None
    assert asides(tmp_path) == [f"aside_0000000{step}_cleared" for step in (1, 2, 3)] and not kept(folder)
    assert {int(p.name[6:14]): (p / "model.pt").read_bytes() for p in folder.glob("aside_*")} == weights_of
    assert lines[-1].endswith(f" What was here is in {', '.join(sorted(p.name for p in folder.glob('aside_*')))}.")


def test_allow_fresh_changes_nothing_where_a_step_is_intact(tmp_path):
    seen = trained(tmp_path, 2)
    with manager(tmp_path, allow_fresh=True) as made, made.newest_intact() as bundle:
        assert bundle.step == 2
    assert not asides(tmp_path)
    assert equal(CheckpointManager.load_for_inference("dante", tmp_path).state_dict(), seen[2])


def test_another_writer_holds_the_lock(tmp_path):
    trained(tmp_path, 2)
    with locked(tmp_path / "dante") as other:
        for act in (lambda: manager(tmp_path).go_back(1), lambda: manager(tmp_path).prune()):
            with pytest.raises(CheckpointLocked, match=f"process {other.pid}"):
                act()
