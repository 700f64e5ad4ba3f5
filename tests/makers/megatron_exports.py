"""Megatron models as tests make them: exports of several layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import CheckpointError
from tests.makers.conversions import converted, worst

LLAMA, QWEN, GPT2 = "megatron_llama_gqa", "megatron_qwen2_tied_qkvbias", "megatron_gpt2style_mha_learnedpos"
RUN = {
    LLAMA: {"rotary_base": 500000, "norm_epsilon": 1e-5, "swiglu": True, "add_bias_linear": False},
    QWEN: {
        "rotary_base": 1000000,
        "norm_epsilon": 1e-6,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
    },
    GPT2: {"add_bias_linear": True, "add_qkv_bias": False, "bias_gelu_fusion": False, "norm_epsilon": 1e-5},
}


THETA = {"choices": {"rope_theta": 500000.0}}
"""What an export does not show: the base of its rotary positions."""


def export_of(fixtures: Path, name: str) -> Path:
    return fixtures / name / "exported_model.pt"


def refused(source: Path, target: Path, to: str = "hf", **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        converted(source, target, to, **options)
    assert not target.exists()
    return str(caught.value)


def exported(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of an export, without what Transformer Engine keeps, and its config."""
    file = torch.load(path, weights_only=False)  # of our own tests and fixtures
    state = {k: v for k, v in file["model_state_dict"].items() if not k.endswith("_extra_state")}
    return state, file["model_config"]


def write_export(path: Path, state: dict[str, torch.Tensor], config: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": state, "model_config": config}, path)
    return path


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
    qk_norms = {
        name.replace("linear_proj", f"{part}_layernorm"): t[0, :16]
        for name, t in state.items()
        if name.endswith("linear_proj.weight")
        for part in "qk"
    }
    positions = "embedding.position_embeddings.weight"
    return {
        "no gate": state | {name: t[: t.shape[0] // 2] for name, t in fc1.items()},
        "odd gate": state | {name: t[:-2] for name, t in fc1.items()},
        "no layer 0": {name: t for name, t in state.items() if "layers.0." not in name},
        "proj bias": state | proj,
        "norm bias": state | norms,
        "qk norm": state | qk_norms,
        "fc1 bias": state | {name.replace("weight", "bias"): t[:, 0] for name, t in fc1.items()}
        | {name.replace("fc1.weight", "fc2.bias"): torch.zeros(48) for name in fc1},
        "positions": state | {positions: torch.zeros(64, 64)},
        "no positions": {name: t for name, t in state.items() if name != positions},
    }[change]  # fmt: skip
