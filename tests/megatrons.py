"""Megatron models as tests make them: exports of other layouts, and iterations written by DCP."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch

from tests import dcp_folders
from tests.conversions import worst

TE = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}


def exported(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of an export, without what Transformer Engine keeps, and its config."""
    file = torch.load(path, weights_only=False)  # of our own tests and fixtures
    state = {k: v for k, v in file["model_state_dict"].items() if not k.endswith("_extra_state")}
    return state, file["model_config"]


def write_export(path: Path, state: dict[str, torch.Tensor], config: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": state, "model_config": config}, path)
    return path


def without_layer(name: str) -> tuple[str, int | None]:
    """The name of a tensor of all layers, and which layer this one is of."""
    words = name.split(".")
    if words[:2] != ["decoder", "layers"]:
        return name, None
    rest = ".".join(words[3:])
    return f"decoder.layers.{TE.get(rest, rest)}", int(words[2])


def stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an iteration: all layers in one, with the names of Transformer Engine."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        found.setdefault(without_layer(name)[0], []).append(tensor)
    return {name: torch.stack(all_) if name.startswith("decoder.layers.") else all_[0] for name, all_ in found.items()}


def write_iteration(folder: Path, state: dict[str, torch.Tensor], ranks: int = 2, **args) -> Path:
    """Write what Megatron saves as torch_dist: blocks of tensor-parallel ranks, an optimizer, the run's arguments."""
    writer = dcp_folders.Writer(folder)
    for name, tensor in stacked(state).items():
        axis = tensor.dim() - 1 if "linear_proj.weight" in name or "linear_fc2.weight" in name else -2 % tensor.dim()
        size = tensor.shape[axis] // ranks
        if tensor.shape[axis] % ranks or "norm" in name or ".weight" not in name:
            writer.tensor(name, tensor)
            continue
        shape = tuple(size if k == axis else side for k, side in enumerate(tensor.shape))
        writer.tensor(
            name,
            tensor,
            [(tuple(size * r if k == axis else 0 for k in range(tensor.dim())), shape) for r in range(ranks)],
        )
    writer.tensor("optimizer.state.exp_avg.embedding.word_embeddings.weight", torch.zeros(4, 2))
    writer.value("decoder.layers.mlp.linear_fc1._extra_state/shard_0_2", io.BytesIO(b""))
    writer.metadata.mcore_data = {}  # type: ignore[attr-defined]  as Megatron's strategy adds it
    writer.close()
    common = {"args": argparse.Namespace(**args), "iteration": 100, "checkpoint_version": 3.0}
    torch.save(common | {"seen": torch.arange(3)}, folder / "common.pt")
    return folder


def hf_model(folder: Path) -> torch.nn.Module:
    """The model of a folder in float32, as transformers opens it, every weight taken from the files."""
    from transformers import AutoModelForCausalLM

    model, said = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    return model.eval()


def off_by(folder: Path, ids: torch.Tensor, expected: torch.Tensor) -> float:
    """How far the logits of a folder are from what is expected, relative to their range."""
    with torch.no_grad():
        return worst(hf_model(folder)(ids).logits, expected)
