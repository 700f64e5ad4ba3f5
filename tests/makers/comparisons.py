"""Pairs of checkpoints to compare, and what the comparison says of them."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch

from core.containers.container import Container
from core.containers.open import open_container
from core.containers.spec import TensorSpec
from core.families.identify import UNKNOWN, Identity
from core.inspection.diff.comparison import Comparison, compare
from core.inspection.diff.side import Side
from core.inspection.diff.text import comparison_facts, comparison_lines
from core.inspection.inspect import Inspection, inspect_path

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def compared(a: Path, b: Path, **settings) -> Comparison:
    with inspect_path(a) as first, inspect_path(b) as second:
        return compare(Side(first), Side(second), **settings)


def saved(path: Path, tensors: dict, **content) -> Path:
    torch.save({"model": tensors, **content} if content else tensors, path)
    return path


def text(found: Comparison) -> str:
    json.dumps(comparison_facts(found), allow_nan=False)
    return "\n".join(comparison_lines(found))


def hf_folder(folder: Path, model: dict[str, torch.Tensor], bare: bool = False, biases: float = 0.0) -> Path:
    """The HF GPT-2 folder of a nanoGPT model, written by hand as FORMATS §3 tells it."""
    found = {}
    for name, tensor in model.items():
        if name == "lm_head.weight":
            continue
        mine = name.removeprefix("transformer.") if bare else name
        found[mine] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor.clone()
        if tensor.ndim < 2 or name.endswith(TRANSPOSED):
            found[mine.replace(".weight", ".bias")] = torch.full(found[mine].shape[-1:], biases)
    folder.mkdir()
    safetensors.torch.save_file(found, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "gpt2", "n_positions": 64, "n_embd": 64, "n_head": 4, "n_layer": 3, "vocab_size": 34}
    (folder / "config.json").write_text(json.dumps({**config, "activation_function": "gelu"}))
    return folder


def with_optimizer(path: Path, state: dict, **group) -> Side:
    """A checkpoint of a model with one tensor."""
    optimizer = {"state": state, "param_groups": [{"params": [0], **group}]}
    container = open_container(saved(path, {"w": torch.zeros(2)}, optimizer=optimizer))
    return side_of(container, {"w": container.tensors["model.w"]}, optimizer=container.content["optimizer"])


def side_of(container: Container, weights: dict[str, TensorSpec], **parts) -> Side:
    """A checkpoint of an unknown family with these parts."""
    identity = Identity(UNKNOWN, program="", prefix="", reason="")
    return Side(Inspection(container.path, container, weights, key="", identity=identity, **{"config": None, **parts}))
