from __future__ import annotations

import json
import os
import re

import pytest
import torch

from core.checkpoint import CheckpointManager
from core.errors import CheckpointError, CheckpointNotFound, SaveFailed
from core.model import GPT
from tests.makers.models import config, equal, save_steps, tokenizer, update, weights


@pytest.fixture
def model():
    made = GPT(config())
    made.tokenizer = tokenizer()
    return made


def test_a_bundle_saved_by_the_model_loads_with_tokenizer_step_and_optimizer(tmp_path, model):
    optimizer = model.configure_optimizer(learning_rate=1e-3)
    update(model, optimizer)
    model.save_checkpoint_bundle(tmp_path / "dante", step=7, optimizer_state=optimizer.state_dict())
    loaded, tokens, step, state = GPT.load(tmp_path / "dante")
    assert equal(loaded.state_dict(), model.state_dict()) and step == 7
    assert tokens["chars"] == tokenizer().state()["chars"] and loaded.tokenizer.fingerprint == tokenizer().fingerprint
    again = loaded.configure_optimizer(learning_rate=1e-3, optimizer_state=state)
    loaded.train(), model.train()
    loaded.step = model.step
    update(model, optimizer), update(loaded, again)
    assert equal(loaded.state_dict(), model.state_dict())


def test_a_bundle_without_a_step_is_of_the_models_step(tmp_path, model):
    model.save_checkpoint_bundle(tmp_path / "fresh")
    assert GPT.load(tmp_path / "fresh")[2:] == (0, None)
    model.step = 12
    model.save_checkpoint_bundle(tmp_path / "later")
    assert GPT.load(tmp_path / "later")[2] == 12


def test_save_into_an_empty_folder_writes_only_the_weights(tmp_path, model):
    model.save(tmp_path / "alone")
    assert [p.name for p in (tmp_path / "alone").iterdir() if not p.name.startswith(".")] == ["model.pt"]
    assert equal(torch.load(tmp_path / "alone/model.pt", weights_only=True), model.state_dict())
    hint = "model.pt alone does not show its model: write model.config.to_dict() as config.json beside it."
    looked = r"no checkpoint here\. Looked for config.json \+ model.pt .*; found"
    with pytest.raises(CheckpointNotFound, match=f"{looked}.*{re.escape(hint)}$"):
        GPT.load(tmp_path / "alone")
    (tmp_path / "alone/config.json").write_text(json.dumps(model.config.to_dict()))
    loaded, ids = GPT.load(tmp_path / "alone")[0], torch.arange(5)[None]
    assert torch.equal(loaded(ids)[0], model.eval()(ids)[0])


def test_save_into_a_bundle_commits_the_same_config_and_tokenizer_without_an_optimizer(tmp_path):
    save_steps(tmp_path, 2)
    names = {name: (tmp_path / "dante" / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    bare = GPT(config(tied_head=True, head_bias=False))  # as the run's; it knows no tokenizer
    bare.step = 9
    bare.save(tmp_path / "dante")
    loaded, _, step, state = GPT.load(tmp_path / "dante")
    assert equal(loaded.state_dict(), bare.state_dict()) and (step, state) == (9, None)
    assert names == {name: (tmp_path / "dante" / name).read_bytes() for name in names}
    assert not (tmp_path / "dante/optimizer.pt").exists()
    assert (tmp_path / "dante/step_00000002/optimizer.pt").exists()
    assert json.loads((tmp_path / "dante/training_state.json").read_text())["optimizer_file"] is None


def test_load_dtype_and_map_location_are_obeyed(tmp_path, model):
    model.save_checkpoint_bundle(tmp_path / "m")
    half = GPT.load(tmp_path / "m", map_location="cpu", load_dtype="bf16")[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    exact = CheckpointManager.load_for_inference("m", tmp_path, load_dtype=torch.float64)
    assert torch.equal(exact.ln_f.weight, model.ln_f.weight.double())


def test_loaded_weights_do_not_change_with_the_file_and_the_file_not_with_them(tmp_path, model):
    model.save_checkpoint_bundle(tmp_path / "m")
    data = (tmp_path / "m/model.pt").read_bytes()
    loaded = CheckpointManager.load_for_inference("m", tmp_path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.fill_(7)
    assert (tmp_path / "m/model.pt").read_bytes() == data
    trainable = GPT.load(tmp_path / "m")[0]
    expected = weights(trainable)
    os.truncate(tmp_path / "m/model.pt", 0)
    assert equal(trainable.state_dict(), expected)


def test_a_tied_head_stays_tied_through_save_and_load(tmp_path):
    model = GPT(config(tied_head=True, head_bias=False))
    model.save_checkpoint_bundle(tmp_path / "m")
    loaded = CheckpointManager.load_for_inference("m", tmp_path)
    assert loaded.lm_head.weight is loaded.token_embedding_table.weight
    assert loaded.lm_head.weight.requires_grad and equal(loaded.state_dict(), model.state_dict())


def test_fit_as_in_the_readme_saves_into_its_folder(tmp_path, model):
    from tests.makers.runs import loader

    optimizer = model.configure_optimizer(learning_rate=1e-3)
    result = model.fit(
        data_loader=loader(), optimizer=optimizer, max_iters=6, checkpoint_dir=tmp_path / "dante", progress=False
    )
    assert result.step == 6 and result.val_loss > 0 and GPT.load(tmp_path / "dante")[2] == 6
    assert model.step == 6


def test_a_save_that_cannot_be_made_says_why_and_changes_nothing(tmp_path, model):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveFailed, match=r"file.*(Not a directory|File exists)"):
        model.save(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"file/below: (Not a directory|File exists)"):
        model.save_checkpoint_bundle(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"
