"""A model that train.py starts without a word about its head leaves for every program that `--list` names."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from core.conversion.text import matrix
from core.model import GPT
from tests.makers.conversions import converted, hf_logits, our_logits, worst
from tests.makers.models import TEXT
from tests.makers.small_gpts import SmallGPT

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "eval_iters": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model of train.py, of whose choices only sizes are given, and whose biases are no zeros any more."""
    root = tmp_path_factory.mktemp("default")
    (root / "text.txt").write_text(TEXT * 40)
    given = {**SIZES, "max_iters": 20, "device": "cpu", "input_file": root / "text.txt", "checkpoint_root": root}
    train.main([f"--{name}={value}" for name, value in {**given, "model_name": "dante"}.items()])
    return root / "dante"


@pytest.fixture
def small(trained) -> SmallGPT:
    """A forward pass of its own for the model, to be given its weights under nanoGPT's names."""
    config = json.loads((trained / "config.json").read_text())
    names = {field.name for field in fields(SmallGPT) if field.init}
    return SmallGPT(**{name: value for name, value in config.items() if name in names and name != "bias"})


def test_its_head_is_the_token_table_stored_once_and_without_a_bias(trained):
    config = json.loads((trained / "config.json").read_text())
    assert (config["tied_head"], config["head_bias"], config["format_version"]) == (True, False, 2)
    weights = torch.load(trained / "model.pt", weights_only=True)
    assert "lm_head.bias" not in weights
    assert weights["lm_head.weight"].data_ptr() == weights["token_embedding_table.weight"].data_ptr()
    model = GPT.load(trained)[0]
    assert all(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("to", matrix()["fused"])
def test_it_becomes_every_format_of_the_list(trained, tmp_path, to):
    assert converted(trained, tmp_path / "out", to)["format"] == to
    assert (tmp_path / "out").exists()


def test_nanogpt_computes_its_logits(trained, small, tmp_path):
    converted(trained, tmp_path / "ckpt.pt", "nanogpt")
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert content["model_args"]["bias"] is True and content["iter_num"] == 20
    small.weights = {name.removeprefix("transformer."): tensor for name, tensor in content["model"].items()}
    assert worst(our_logits(trained, small.ids()), small.logits(small.ids())) < 2e-6


def test_gpt2_of_hugging_face_computes_its_logits(trained, small, tmp_path):
    converted(trained, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["tie_word_embeddings"], config["activation_function"]) == (True, "gelu")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    stored = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    small.weights = {name: t.T if ".c_" in name and t.dim() == 2 else t for name, t in stored.items()}
    assert worst(our_logits(trained, small.ids()), small.logits(small.ids())) < 2e-6


@pytest.mark.full
def test_transformers_computes_its_logits(trained, small, tmp_path):
    converted(trained, tmp_path / "hf", "hf")
    assert worst(hf_logits(tmp_path / "hf", small.ids()), our_logits(trained, small.ids())) < 2e-6
    converted(trained, tmp_path / "ckpt.pt", "nanogpt")
    converted(tmp_path / "ckpt.pt", tmp_path / "again", "hf")
    assert worst(hf_logits(tmp_path / "again", small.ids()), our_logits(trained, small.ids())) < 2e-6


def test_nanogpt_resumes_it_with_its_moments_and_starts_those_of_added_biases(trained, tmp_path):
    facts = converted(trained, tmp_path / "ckpt.pt", "nanogpt", include_optimizer=True)
    (said,) = (note for note in facts["notes"] if note.startswith("no moments for "))
    assert said == (
        "no moments for transformer.h.0.attn.c_attn.bias, transformer.h.0.attn.c_proj.bias, "
        "transformer.h.1.attn.c_attn.bias and 1 more, which are filled in: nanoGPT starts them at its next step"
    )
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    parameters = {name: torch.nn.Parameter(t) for name, t in content["model"].items() if name != "lm_head.weight"}
    groups = [[name for name, p in parameters.items() if (p.dim() >= 2) is decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW([{"params": [parameters[name] for name in names]} for names in groups])
    optimizer.load_state_dict(content["optimizer"])  # as nanoGPT's configure_optimizers and train.py
    ours = GPT.load(trained)[3]
    names = [name for group in ours["param_groups"] for name in group["param_names"]]
    pairs = {"transformer.wte.weight": "token_embedding_table.weight", "transformer.ln_f.bias": "ln_f.bias"}
    for theirs, mine in {**pairs, "transformer.h.1.mlp.c_fc.weight": "blocks.1.fwd.net.0.weight"}.items():
        moments = optimizer.state[parameters[theirs]]
        same = ours["state"][names.index(mine)]
        assert all(torch.equal(moments[key], same[key]) for key in ("exp_avg", "exp_avg_sq"))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    steps = {name: int(optimizer.state[p]["step"]) for name, p in parameters.items()}
    assert {name for name, step in steps.items() if step == 1} == {n for n in steps if ".attn." in n and "bias" in n}
    assert set(steps.values()) == {1, 21}
