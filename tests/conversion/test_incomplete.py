"""Targets for tensors of any names: contradictions are printed, and a model that lacks tensors is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointMismatch
from core.inspection.inspect import inspect_path
from core.inspection.report import facts_of
from tests.makers.conversions import converted, tensors_of


def copied(hf: Path, folder: Path, drop: str = "", **edits) -> Path:
    folder.mkdir()
    tensors = {name: tensor for name, tensor in load_file(hf / "model.safetensors").items() if name != drop}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(json.loads((hf / "config.json").read_text()) | edits))
    return folder


@pytest.mark.parametrize("to", ["safetensors", "pt", "dcp"])
@pytest.mark.parametrize(
    "drop", ["transformer.ln_f.weight", "transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"]
)
def test_a_model_that_lacks_a_tensor_of_its_family_is_refused(hf, tmp_path, to, drop):
    source = copied(hf, tmp_path / "m", drop)
    with pytest.raises(CheckpointMismatch) as caught:
        converted(source, tmp_path / f"o.{to}", to)
    assert str(caught.value) == (
        f"{source}: Hugging Face GPT-2, but it lacks 1 of its tensors: {drop}. Name a checkpoint that has them all."
    )
    assert not (tmp_path / f"o.{to}").exists()


@pytest.mark.parametrize("to", ["safetensors", "pt", "dcp"])
def test_contradictions_are_printed_as_inspection_prints_them(hf, tmp_path, to):
    source = copied(hf, tmp_path / "m", n_layer=7, vocab_size=11)
    with inspect_path(source) as found:
        said = facts_of(found)["contradictions"]
    assert len(said) == 2 and all(word in " ".join(said) for word in ("n_layer is 7", "vocab_size is 11"))
    notes = converted(source, tmp_path / f"o.{to}", to)["notes"]
    assert [note.removeprefix("contradiction: ") for note in notes if note.startswith("contradiction: ")] == said


def test_a_selection_of_tensors_under_a_familys_names_is_kept_and_what_is_missing_is_said(tmp_path):
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(4, 4) for i in range(2)}
    save_file(tensors, tmp_path / "m.safetensors")
    notes = converted(tmp_path / "m.safetensors", tmp_path / "o.pt", "pt")["notes"]
    assert any(note.startswith("contradiction: missing: ") for note in notes)
    assert tensors_of(tmp_path / "o.pt") == tensors_of(tmp_path / "m.safetensors")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_inspection_lists_each_tensor_of_a_bare_state_dict_once(hf, tmp_path, suffix, capsys):
    import inspect_model

    tensors = {f"layer{i}.{name}": torch.zeros(2, 2) for i in range(2) for name in ("a", "b")}
    path = tmp_path / f"m.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save({**tensors, "epoch": 3}, path)
    assert inspect_model.main([str(path), "--tensors"]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(name) == 1 for name in tensors)
    assert ("epoch  :  3" in printed) is (suffix == "pt")
