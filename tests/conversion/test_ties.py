"""A head that is its token table: decided by the values of both and by what the program says, in one place."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointMismatch
from core.families.tie import is_tied
from core.inspection.inspect import inspect_path
from core.model import GPT
from tests.makers.conversions import converted

HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"


def test_the_decision():
    for said, shares, same in itertools.product((None, True, False), *[(True, False)] * 2):
        expected = shares or (same and said is not False)
        assert is_tied(said, shares=shares, same=lambda same=same: same) is expected


def nanogpt_with(nanogpt: Path, folder: Path, head: str) -> Path:
    """The fixture with its head sharing the table's storage, as a copy of its values, or with other values."""
    content = torch.load(nanogpt / "ckpt.pt", weights_only=True)
    table = content["model"][TABLE]
    content["model"][HEAD] = {"shared": table, "copy": table.clone(), "other": table + 1}[head]
    torch.save(content, folder / "ckpt.pt")
    return folder / "ckpt.pt"


@pytest.mark.parametrize("head", ["shared", "copy", "other"])
def test_inspection_and_conversion_agree_about_the_head_of_a_nanogpt_file(nanogpt, tmp_path, head):
    path = nanogpt_with(nanogpt, tmp_path, head)
    with inspect_path(path) as found:
        assert found.identity.architecture is not None
        assert found.identity.architecture.tied_head is (head != "other")
    notes = converted(path, tmp_path / "b", "bundle")["notes"]
    model = GPT.load(tmp_path / "b")[0]
    assert model.config.tied_head is (head != "other")
    wanted = torch.load(path, weights_only=True)["model"][HEAD]
    assert torch.equal(model.state_dict()[HEAD], wanted)
    assert any("kept as a head of its own" in note for note in notes) is (head == "other")


@pytest.mark.parametrize("says", [None, True, False])
@pytest.mark.parametrize("head", ["absent", "copy", "other"])
def test_a_head_beside_its_table_in_a_folder_of_transformers(hf, tmp_path, says, head):
    folder = tmp_path / "m"
    folder.mkdir()
    tensors = load_file(hf / "model.safetensors")
    if head != "absent":
        tensors[HEAD] = tensors[TABLE].clone() + (head == "other")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {k: v for k, v in json.loads((hf / "config.json").read_text()).items() if k != "tie_word_embeddings"}
    (folder / "config.json").write_text(json.dumps(config | ({} if says is None else {"tie_word_embeddings": says})))
    if (head == "other" and says is not False) or (head == "absent" and says is False):
        with pytest.raises(CheckpointMismatch, match="tie_word_embeddings"):
            converted(folder, tmp_path / "b", "bundle")
        return
    converted(folder, tmp_path / "b", "bundle")
    model = GPT.load(tmp_path / "b")[0]
    assert model.config.tied_head is (says is not False)
    assert torch.equal(model.state_dict()[HEAD], tensors.get(HEAD, tensors[TABLE]))


@pytest.mark.parametrize("to", ["hf", "nanogpt"])
def test_a_config_of_ours_that_ties_a_head_of_other_values_is_refused(nanogpt, tmp_path, to):
    converted(nanogpt_with(nanogpt, tmp_path, "other"), tmp_path / "b", "bundle")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"tied_head": True}))
    with pytest.raises(CheckpointMismatch, match=r"tied_head is true in the config, but lm_head.weight is a tensor"):
        converted(tmp_path / "b", tmp_path / "o", to)
    assert not (tmp_path / "o").exists()
