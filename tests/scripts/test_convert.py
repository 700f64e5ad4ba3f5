"""convert_checkpoints.py, as it is typed and as it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import convert_checkpoints
import train
from core.bundle.training_state import STATE
from core.errors import CheckpointMismatch, InputError
from tests.conftest import ROOT
from tests.makers.migrations import fresh, listing, write
from tests.makers.models import kept, state_of

# The script


def run(*words, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "convert_checkpoints.py", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_command_without_arguments_migrates_all_that_it_can_and_exits_with_1_for_what_it_cannot(folder):
    fresh(folder)
    write(folder.parent / "torn", "latest.pt", 5)
    os.truncate(folder.parent / "torn" / "latest.pt", 3000)
    done = run(cwd=folder.parent.parent)
    assert done.returncode == 1
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: checkpoints/torn/latest.pt: ") and "3000" in error
    table, allowed = done.stdout.split("\n\n")
    rows = [line.split("  ") for line in table.splitlines()]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows[:4]] == [
        ["file", "generation", "step", "became", "size", "now"],
        ["checkpoints/dante/latest.pt", "lecture, zip", "30", "the bundle", *sizes(folder, "latest.pt", folder)],
        [
            "checkpoints/dante/final.pt",
            "lecture, zip",
            "20",
            "step_00000020",
            *sizes(folder, "final.pt", folder / "step_00000020"),
        ],
        ["checkpoints/torn/latest.pt", "unknown", "-", "not migrated: see below", "3.0 KB", "-"],
    ]
    assert [line.strip() for line in allowed.splitlines()[1:]] == [
        "checkpoints/dante/latest.pt",
        "checkpoints/dante/final.pt",
    ]


def sizes(folder: Path, name: str, target: Path) -> list[str]:
    names = ("model.pt", "optimizer.pt", "config.json", "tokenizer.json", STATE)
    after = sum((target / n).stat().st_size for n in names)
    return [f"{size / 1000:.1f} KB" for size in ((folder / name).stat().st_size, after)]


def test_script_is_imported_without_torch_and_converts_one_file_as_it_always_did(folder):
    fresh(folder)
    code = (
        "import sys; from convert_checkpoints import convert_checkpoint; assert 'torch' not in sys.modules; "
        "convert_checkpoint('dante', 'final.pt'); convert_checkpoint('dante'); convert_checkpoint('nobody')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder.parent.parent, env=environment, capture_output=True, text=True
    )
    assert done.stderr == "" and done.returncode == 0
    assert done.stdout.splitlines() == [
        "Converting dante/final.pt...",
        "Converted to new format at checkpoints/dante",
        "Converting dante/latest.pt...",
        "Converted to new format at checkpoints/dante",
        "No legacy checkpoint found: checkpoints/nobody/latest.pt",
    ]
    assert state_of(folder)["step"] == 30 and kept(folder) == ["step_00000020"]


def test_dry_run_prints_what_then_happens_and_changes_nothing(folder, capsys):
    fresh(folder)
    (folder.parent / "notes").mkdir()
    before = listing(folder.parent)
    assert convert_checkpoints.main(["--checkpoint_root", str(folder.parent), "--dry_run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert listing(folder.parent) == before and not (folder / ".lock").exists()
    assert planned["dry_run"] is True
    assert [(f["file"], f["generation"], f["step"], f["became"]) for f in planned["files"]] == [
        (str(folder / "latest.pt"), "lecture, zip", 30, "the bundle"),
        (str(folder / "final.pt"), "lecture, zip", 20, "step_00000020"),
    ]
    assert convert_checkpoints.main(["--checkpoint_root", str(folder.parent), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["files"]
    assert [f["became"] for f in made] == [f["became"] for f in planned["files"]]
    assert [f["may_be_deleted"] for f in made] == [True, True]
    assert convert_checkpoints.main([str(folder), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "already migrated: the bundle" in shown


def test_model_name_and_paths_narrow_what_is_migrated(folder, tmp_path, capsys):
    root = str(folder.parent)
    for name in ("dante", "other", "third"):
        write(folder.parent / name, "latest.pt", 30)
    write(folder.parent / "third", "final.pt", 20)
    assert convert_checkpoints.main(["--checkpoint_root", root, "--model_name", "other"]) == 0
    assert [(folder.parent / name / "model.pt").exists() for name in ("dante", "other", "third")] == [
        False,
        True,
        False,
    ]
    assert convert_checkpoints.main([str(folder.parent / "third" / "final.pt"), str(folder)]) == 0
    assert state_of(folder.parent / "third")["step"] == 20 and state_of(folder)["step"] == 30
    shown = capsys.readouterr().out
    assert "prunes kept steps" not in shown
    with pytest.raises(SystemExit) as wrong:
        convert_checkpoints.main(["--model_name", "dante", str(folder)])
    assert wrong.value.code == 2


def test_nothing_to_migrate_is_said_and_is_no_failure(folder, tmp_path, capsys):
    assert convert_checkpoints.main(["--checkpoint_root", str(folder.parent)]) == 0
    assert capsys.readouterr().out == f"{folder.parent}: no single-file checkpoint here; nothing to migrate\n"
    for words in (["--checkpoint_root", str(tmp_path / "no")], [str(tmp_path / "no.pt")]):
        with pytest.raises(convert_checkpoints.CheckpointNotFound, match=str(tmp_path / "no")):
            convert_checkpoints.main(words)
    with pytest.raises(convert_checkpoints.CheckpointNotFound, match=r"Models in .*: dante"):
        write(folder, "latest.pt", 1)
        convert_checkpoints.main(["--checkpoint_root", str(folder.parent), "--model_name", "nobody"])


def test_a_model_with_a_tied_head_is_what_other_programs_compute(tmp_path):
    (tmp_path / "text.txt").write_text("abc def gh\n" * 200)
    root = ["--checkpoint_root", str(tmp_path)]
    sizes = ["--n_layer", "1", "--n_embd", "8", "--n_head", "2", "--block_size", "8", "--batch_size", "2"]
    text = [*sizes, "--input_file", str(tmp_path / "text.txt"), "--eval_iters", "1", "--device", "cpu"]
    for name, more in (("tied", []), ("own", ["--untied_head", "--head_bias"])):
        assert train.main([*root, "--model_name", name, *text, *more, "--max_iters", "1"]) == 0
    for to, target in (("hf", "hf"), ("nanogpt", "out"), ("megatron", "m")):
        assert convert_checkpoints.main([str(tmp_path / "tied"), str(tmp_path / target), "--to", to]) == 0
        with pytest.raises(CheckpointMismatch, match=r"python train\.py --tied_head starts a model"):
            convert_checkpoints.main([str(tmp_path / "own"), str(tmp_path / f"own-{target}"), "--to", to])
    assert train.main([*root, "--model_name", "tied", "--tied_head", "--max_iters", "2", "--eval_iters", "1"]) == 0
    with pytest.raises(CheckpointMismatch, match="tied_head is True here and False in the checkpoint"):
        train.main([*root, "--model_name", "own", "--tied_head", "--max_iters", "2"])
    with pytest.raises(InputError, match="--tied_head: these models have a head of their own"):
        train.main([*root, "--model_name", "flex", "--arch", "flex_small", *text[-6:], "--tied_head"])


def test_of_several_processes_of_torchrun_the_first_converts_and_the_others_end_with_0(folder, monkeypatch, capsys):
    fresh(folder)
    monkeypatch.setenv("WORLD_SIZE", "4")
    words, target = [str(folder / "latest.pt"), str(folder.parent / "out.safetensors"), "--to", "safetensors"], []
    for rank in ("3", "1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        assert convert_checkpoints.main(words) == 0
        target.append((folder.parent / "out.safetensors").exists())
        assert bool(capsys.readouterr().out) == (rank == "0")
    assert target == [False, False, True, True]


@pytest.mark.full
def test_torchrun_of_a_conversion_ends_with_0_and_kills_nothing(folder):
    fresh(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    words = [ROOT / "convert_checkpoints.py", "latest.pt", "out.safetensors", "--to", "safetensors"]
    done = subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (folder / "out.safetensors").is_file() and "Error" not in done.stderr and "SIGTERM" not in done.stderr
