"""States of a folder that no run of today leaves, and what is said of them."""

from __future__ import annotations

import json

import pytest

from core.bundle.bundle import open_bundle
from core.bundle.contradictions import check_fit
from core.bundle.evolution import old_settings
from core.bundle.folder import FolderReader
from core.bundle.names import is_model
from core.bundle.retention import best_step
from core.bundle.tokenizer_state import GPT2_FINGERPRINT, definition_fingerprint, proves_itself
from core.bundle.training_state import STATE, TrainingState, seal, unseal
from core.checkpoint import CheckpointManager
from core.errors import CheckpointDamaged, CheckpointMismatch, CheckpointNotFound
from tests.makers.modded_models import random_flex
from tests.makers.models import started


@pytest.fixture
def folder(tmp_path):
    """A model with steps 1 and 2, the first one kept; no loss was measured."""
    made, model, optimizer = started(tmp_path)
    with made:
        for step in (1, 2):
            made.save(model, optimizer, step=step)
            made.wait()
    return tmp_path / "dante"


def test_without_a_loss_no_step_is_the_best(folder):
    with pytest.raises(CheckpointNotFound, match=r"dante: no step has a validation loss, so none is the best\."):
        best_step(folder)


def test_a_kept_step_names_the_file_that_it_lost(folder):
    (folder / "step_00000001/optimizer.pt").unlink()
    with pytest.raises(
        CheckpointDamaged, match=r"step_00000001/optimizer\.pt: missing, but training_state\.json lists it"
    ):
        FolderReader(folder).open_kept(folder / "step_00000001")


def test_a_kept_step_without_a_training_state_is_of_the_first_version(folder):
    (folder / "step_00000001/training_state.json").unlink()
    opened = FolderReader(folder).open_kept(folder / "step_00000001")
    assert opened.state == TrainingState() and "model.pt" in opened.files
    opened.close()


def test_a_list_of_seen_files_that_is_none_is_damage(folder):
    state = unseal((folder / STATE).read_bytes(), STATE)
    files = state.files
    damaged = seal(TrainingState.from_dict({**state, "legacy": ["latest.pt"]}), files)
    with pytest.raises(CheckpointDamaged, match="legacy is not a list of files"):
        unseal(damaged, "run/training_state.json")


@pytest.mark.parametrize(
    ("state", "proven"),
    [
        (None, False),
        ({"token_kind": "gpt2"}, False),
        ({"token_kind": "gpt2", "fingerprint": GPT2_FINGERPRINT}, True),
        ({"token_kind": "gpt2", "fingerprint": "0" * 64}, False),
        ({"token_kind": "hf", "definition": {"a": 1}, "fingerprint": definition_fingerprint({"a": 1})}, True),
        ({"token_kind": "hf", "definition": {"a": 2}, "fingerprint": definition_fingerprint({"a": 1})}, False),
        ({"token_kind": "hf", "definition": "a", "fingerprint": "0" * 64}, False),
    ],
)
def test_a_vocabulary_proves_itself_by_its_fingerprint(state, proven):
    assert proves_itself(state) is proven


@pytest.mark.parametrize("optimizer", [None, [], {}, {"param_groups": []}, {"param_groups": [{"lr": "fast"}]}])
def test_an_optimizer_without_a_rate_tells_nothing_of_its_run(optimizer):
    assert old_settings(optimizer) == {}


def test_a_folder_that_cannot_be_listed_may_be_a_model(tmp_path):
    assert is_model(tmp_path / "none") and not is_model(tmp_path)


def test_a_modded_model_is_no_gpt_and_names_its_arch(tmp_path):
    with CheckpointManager("flex", tmp_path, say=lambda line: None) as saving:
        saving.save(random_flex("small"), step=1)
    with open_bundle(tmp_path / "flex") as bundle, pytest.raises(CheckpointMismatch) as caught:
        check_fit(bundle)
    assert str(caught.value).endswith(
        "model_class is 'GPTFlexAttention', expected GPT. Train it with --arch flex_small."
    )
    assert json.loads((tmp_path / "flex/config.json").read_text())["variant"] == "small"
