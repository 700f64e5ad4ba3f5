"""Conversions of nanoGPT: the same logits, moments and bytes there and back; damage and options on its file."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from core.errors import CheckpointMismatch
from core.model import GPT
from tests.makers.conversions import converted, expected, hf_logits, our_logits, tensors_of, worst
from tests.makers.models import SMALL, config, started, train_and_save


@pytest.mark.parametrize("file", ["ckpt.pt", "ckpt_orig_mod.pt"])
def test_nanogpt_becomes_a_bundle_with_the_same_logits_and_a_folder_of_hugging_face(nanogpt, tmp_path, file):
    ids, logits = expected(nanogpt)
    converted(nanogpt / file, tmp_path / "bundle", "bundle", meta=nanogpt / "meta.pkl")
    assert (our_logits(tmp_path / "bundle", ids) - logits).abs().max() < 1e-5
    converted(nanogpt / file, tmp_path / "hf", "hf", meta=nanogpt / "meta.pkl")
    converted(tmp_path / "bundle", tmp_path / "hf2", "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(tmp_path / "hf2")


@pytest.mark.full
def test_transformers_computes_the_logits_of_nanogpt_whose_head_is_tied_or_untied(nanogpt, tmp_path):
    ids, logits = expected(nanogpt)
    converted(nanogpt / "ckpt.pt", tmp_path / "hf", "hf", meta=nanogpt / "meta.pkl")
    converted(nanogpt / "ckpt.pt", tmp_path / "untied", "hf", tied=False)
    converted(tmp_path / "untied", tmp_path / "tied", "hf", tied=True)
    for folder in ("hf", "untied", "tied"):
        assert worst(hf_logits(tmp_path / folder, ids), logits) < 2e-6


def test_nanogpt_brings_its_optimizer_step_best_loss_and_vocabulary(nanogpt, tmp_path):
    converted(nanogpt / "ckpt.pt", tmp_path / "b", "bundle", meta=nanogpt / "meta.pkl")
    state = json.loads((tmp_path / "b/training_state.json").read_text())
    source = torch.load(nanogpt / "ckpt.pt", weights_only=True)
    assert state["step"] == source["iter_num"] == 40
    assert state["best"] == {"step": 40, "val_loss": float(source["best_val_loss"])}
    chars = json.loads((tmp_path / "b/tokenizer.json").read_text())["chars"]
    meta = pickle.loads((nanogpt / "meta.pkl").read_bytes())
    assert chars == [meta["itos"][k] for k in range(meta["vocab_size"])]
    made = torch.load(tmp_path / "b/optimizer.pt", weights_only=True)
    assert [len(group["params"]) for group in made["param_groups"]] == [
        len(group["params"]) for group in source["optimizer"]["param_groups"]
    ]
    names = [name for group in made["param_groups"] for name in group["param_names"]]
    assert names[0] == "token_embedding_table.weight" and len(names) == len(made["state"])
    for number, entry in source["optimizer"]["state"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(made["state"][number][key]))


def test_nanogpt_comes_back_from_a_bundle_bit_for_bit_with_its_optimizer(nanogpt, tmp_path):
    converted(nanogpt / "ckpt.pt", tmp_path / "b", "bundle")
    converted(tmp_path / "b", tmp_path / "back.pt", "nanogpt", include_optimizer=True)
    first, second = (torch.load(p, weights_only=True) for p in (nanogpt / "ckpt.pt", tmp_path / "back.pt"))
    assert list(first["model"]) == list(second["model"])
    assert all(torch.equal(first["model"][name], tensor) for name, tensor in second["model"].items())
    head, table = (second["model"][name] for name in ("lm_head.weight", "transformer.wte.weight"))
    assert head.data_ptr() == table.data_ptr()
    for number, entry in first["optimizer"]["state"].items():
        assert all(torch.equal(entry[key], second["optimizer"]["state"][number][key]) for key in entry)
    assert second["model_args"] == {name: first["model_args"][name] for name in second["model_args"]}
    assert second["iter_num"] == 40 and second["best_val_loss"] == float(first["best_val_loss"])
    params = [group["params"] for group in second["optimizer"]["param_groups"]]
    assert params == [group["params"] for group in first["optimizer"]["param_groups"]]


def test_an_optimizer_that_nanogpt_has_not_is_refused(tmp_path):
    made, model, _ = started(tmp_path, "a")
    train_and_save(made, model, torch.optim.AdamW(model.parameters()), 1)
    with pytest.raises(
        CheckpointMismatch, match=r"its optimizer has 1 groups of parameters, which are not all matrices"
    ):
        converted(tmp_path / "a", tmp_path / "a.pt", "nanogpt", include_optimizer=True)
    made, model, optimizer = started(tmp_path, "b", config={**SMALL, "bias": True})
    train_and_save(made, model, optimizer, 1)
    converted(tmp_path / "b", tmp_path / "b.pt", "nanogpt", include_optimizer=True)
    content = torch.load(tmp_path / "b.pt", weights_only=True)
    shapes = [t.ndim for name, t in content["model"].items() if name != "lm_head.weight"]
    groups = [len(group["params"]) for group in content["optimizer"]["param_groups"]]
    assert groups == [sum(n >= 2 for n in shapes), sum(n < 2 for n in shapes)]


def test_nanogpt_refuses_a_head_of_its_own_and_gets_zero_biases(tmp_path):
    GPT(config(head_bias=False)).save_checkpoint_bundle(tmp_path / "untied")
    with pytest.raises(CheckpointMismatch) as caught:
        converted(tmp_path / "untied", tmp_path / "ckpt.pt", "nanogpt")
    assert str(caught.value).endswith(
        "its head is not its token table, and nanoGPT has one tensor for both. --to bundle and --to hf keep two; "
        "python train.py --tied_head starts a model that GPT-2 and nanoGPT compute."
    )
    GPT(config(head_bias=False, tied_head=True)).save_checkpoint_bundle(tmp_path / "tied")
    converted(tmp_path / "tied", tmp_path / "ckpt.pt", "nanogpt")
    made = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert made["model_args"]["bias"] and not made["model"]["transformer.h.0.attn.c_attn.bias"].any()


def test_a_head_of_its_own_in_a_file_of_nanogpt_is_kept_and_said(nanogpt, tmp_path):
    content = torch.load(nanogpt / "ckpt.pt", weights_only=True)
    head = content["model"]["lm_head.weight"] = content["model"]["transformer.wte.weight"] + 1
    torch.save(content, tmp_path / "untied.pt")
    said = "its head has other values than its token table: kept as a head of its own"
    assert said in converted(tmp_path / "untied.pt", tmp_path / "untied", "bundle")["notes"]
    assert said not in converted(nanogpt / "ckpt.pt", tmp_path / "tied", "bundle")["notes"]
    model = GPT.load(tmp_path / "untied")[0]
    assert not model.config.tied_head and torch.equal(model.lm_head.weight, head)


def test_train_starts_from_a_converted_model_and_its_optimizer_state_stays_out_of_safetensors(nanogpt, tmp_path):
    converted(nanogpt / "ckpt.pt", tmp_path / "x.safetensors", "safetensors")
    assert "transformer.wte.weight" in load_file(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointMismatch, match="an optimizer state is more than tensors"):
        converted(nanogpt / "ckpt.pt", tmp_path / "y.safetensors", "safetensors", include_optimizer=True)
    converted(nanogpt / "ckpt.pt", tmp_path / "z.pt", "pt", include_optimizer=True)
    made = torch.load(tmp_path / "z.pt", weights_only=True)
    assert made.keys() == {"model", "optimizer"} and len(made["optimizer"]["state"]) == 21


def test_the_head_can_be_untied_and_tied_again(nanogpt, tmp_path):
    converted(nanogpt / "ckpt.pt", tmp_path / "hf", "hf", tied=False)
    assert json.loads((tmp_path / "hf/config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in tensors_of(tmp_path / "hf")
    converted(nanogpt / "ckpt.pt", tmp_path / "b", "bundle", tied=False)
    model = GPT.load(tmp_path / "b")[0]
    assert not model.config.tied_head and model.lm_head.weight is not model.token_embedding_table.weight
    assert model.lm_head.weight.data_ptr() != model.token_embedding_table.weight.data_ptr()
    converted(tmp_path / "hf", tmp_path / "tied", "hf", tied=True)
    assert "lm_head.weight" not in tensors_of(tmp_path / "tied")
