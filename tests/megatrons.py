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
            whole = not name.startswith("decoder.layers.")  # else one block for each layer, as of pipeline ranks
            boxes = [((i, *[0] * (tensor.dim() - 1)), (1, *tensor.shape[1:])) for i in range(len(tensor))]
            writer.tensor(name, tensor, None if whole else boxes)
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


def gpt2_export(path: Path) -> tuple[Path, torch.nn.Module]:
    """A random GPT-2 of transformers as an export: its Conv1D weights turned, q, k and v head by head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    made = GPT2Config(
        n_layer=2, n_head=4, n_embd=32, n_positions=32, vocab_size=96, activation_function="gelu", initializer_range=0.3
    )
    model = GPT2LMHeadModel(made).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs = {name.removeprefix("transformer."): t for name, t in model.state_dict().items()}
    state = {"embedding.word_embeddings.weight": theirs["wte.weight"],
             "embedding.position_embeddings.weight": theirs["wpe.weight"]}  # fmt: skip
    for i in range(2):
        for a, b in GPT2_PARTS.items():
            for kind in ("weight", "bias"):
                tensor = theirs[f"h.{i}.{a}.{kind}"]
                tensor = tensor.T if tensor.dim() == 2 else tensor
                if b == QKV:  # rows q, k, v of all heads: for each head its q, k, v
                    tensor = tensor.reshape(3, 4, 8, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
                state[f"decoder.layers.{i}.{b}.{kind}"] = tensor.contiguous()
    state |= {f"decoder.final_layernorm.{kind}": theirs[f"ln_f.{kind}"] for kind in ("weight", "bias")}
    config = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 96, "kv_channels": 8}
    return write_export(path, state, config | {"max_position_embeddings": 32}), model


QKV = "self_attention.linear_qkv"
GPT2_PARTS = {
    "ln_1": "input_layernorm",
    "attn.c_attn": QKV,
    "attn.c_proj": "self_attention.linear_proj",
    "ln_2": "pre_mlp_layernorm",
    "mlp.c_fc": "mlp.linear_fc1",
    "mlp.c_proj": "mlp.linear_fc2",
}


def changed(state: dict, change: str) -> dict:
    """Tensors of another kind of model."""
    fc1 = {name: t for name, t in state.items() if name.endswith("linear_fc1.weight")}
    proj = {name.replace("weight", "bias"): t[:, 0] for name, t in state.items() if name.endswith("linear_proj.weight")}
    norms = {name.replace("weight", "bias"): t for name, t in state.items() if name.endswith("norm.weight")}
    positions = "embedding.position_embeddings.weight"
    return {
        "no gate": state | {name: t[: t.shape[0] // 2] for name, t in fc1.items()},
        "odd gate": state | {name: t[:-2] for name, t in fc1.items()},
        "no layer 0": {name: t for name, t in state.items() if "layers.0." not in name},
        "proj bias": state | proj,
        "norm bias": state | norms,
        "fc1 bias": state | {name.replace("weight", "bias"): t[:, 0] for name, t in fc1.items()}
        | {name.replace("fc1.weight", "fc2.bias"): torch.zeros(48) for name in fc1},
        "positions": state | {positions: torch.zeros(64, 64)},
        "no positions": {name: t for name, t in state.items() if name != positions},
    }[change]  # fmt: skip
