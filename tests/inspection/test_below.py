"""What is listed of a folder that is no checkpoint itself: what really opens, by its path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import inspect_model
from core.errors import CheckpointNotFound
from core.inspection.below import checkpoints_below
from tests.makers.models import save_steps

GPT2 = {"wte.weight": torch.zeros(4, 4), "h.0.attn.c_attn.weight": torch.zeros(4, 12)}


def hf(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(GPT2, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def trainer(root: Path) -> list[str]:
    names = ["checkpoint-400", "checkpoint-500"]
    for name in names:
        folder = hf(root / name)
        torch.save({"last_epoch": 3}, folder / "scheduler.pt")
        torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
        (folder / "trainer_state.json").write_text('{"global_step": 400}')
    (root / "runs/Nov30").mkdir(parents=True)
    return names


def litgpt(root: Path) -> list[str]:
    names = ["final", "step-00000010"]
    for name in names:
        (root / name).mkdir(parents=True)
        weights = {"transformer.wte.weight": torch.zeros(4, 4), "transformer.h.0.attn.qkv.weight": torch.zeros(12, 4)}
        weights["lm_head.weight"] = torch.zeros(4, 4)
        torch.save({"model": weights, "step_count": 10}, root / name / "lit_model.pth")
        (root / name / "model_config.yaml").write_text("n_layer: 1\n")
    return names


def hub(root: Path) -> list[str]:
    names = [f"models--a--{name}/snapshots/0123abcd" for name in ("b", "c")]
    for name in names:
        folder = hf(root / name)
        blobs = folder.parent.parent / "blobs"
        blobs.mkdir()
        (folder / "model.safetensors").rename(blobs / "ab12")
        (folder / "model.safetensors").symlink_to("../../blobs/ab12")
        (folder.parent.parent / "refs").mkdir()
        (folder.parent.parent / "refs/main").write_text("0123abcd")
    return names


def ours(root: Path) -> list[str]:
    save_steps(root / "monday", 1, "dante")
    return ["monday/dante"]


@pytest.mark.parametrize("make", [trainer, litgpt, hub, ours])
def test_the_checkpoints_of_a_run_or_a_cache_are_listed_by_their_paths(tmp_path, make, capsys):
    root = tmp_path / "run"
    root.mkdir()
    names = make(root)
    assert inspect_model.main([str(root)]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    how = ", or by --step N or newest" * (make in (trainer, litgpt))
    assert first == f"{root} holds {len(names)} checkpoint{'s' * (len(names) > 1)}; name one by its path{how}:"
    assert [row.split()[0] for row in rows] == names
    assert inspect_model.main([str(root), "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    for name, model in zip(names, models, strict=True):
        assert model["name"] == name and model["bytes"] > 0 and model.keys() == {"name", "program", "step", "bytes"}
        assert inspect_model.main([str(root / name)]) == 0
        assert f"Location: {root / name}" in capsys.readouterr().out


def test_a_root_in_which_nothing_opens_is_a_failure_with_each_reason(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/latest.pt").write_bytes(b"x\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text("{")
    assert inspect_model.main([str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err == f"error: {tmp_path}: none of its 2 models opens; each is listed with the reason.\n"
    assert "unreadable" in said.out and "no checkpoint here" in said.out
    hf(tmp_path / "c")
    assert inspect_model.main([str(tmp_path)]) == 0
    assert "step not recorded" in capsys.readouterr().out


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["a.pt", "b.pt"]])
def test_a_folder_below_which_nothing_opens_says_what_was_looked_for_or_names_its_files(tmp_path, files):
    (tmp_path / "empty/deeper").mkdir(parents=True)
    for name in files:
        torch.save({"a": torch.zeros(1)}, tmp_path / name) if name.endswith("pt") else (tmp_path / name).write_text("x")
    if "a.pt" in files:
        hf(tmp_path / "empty/model")
    said = r"files that may each be one: a\.pt, b\.pt" if "a.pt" in files else "Looked for"
    with pytest.raises(CheckpointNotFound, match=said):
        inspect_model.main([str(tmp_path)])


def test_links_and_hidden_folders_are_not_followed_and_depth_has_an_end(tmp_path):
    hf(tmp_path / "elsewhere/model")
    root = tmp_path / "root"
    hf(root / ".hidden/model")
    hf(root / "1/2/3/4/5/model")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    assert checkpoints_below(root) == []
    hf(root / "1/2/3/model")
    assert [one["name"] for one in checkpoints_below(root)] == ["1/2/3/model"]


def test_checkpoints_are_listed_by_their_numbers(tmp_path):
    for step in (400, 1000, 50):
        hf(tmp_path / f"checkpoint-{step}")
    assert [one["name"] for one in checkpoints_below(tmp_path)] == [f"checkpoint-{n}" for n in (50, 400, 1000)]
