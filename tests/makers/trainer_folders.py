"""Folders of steps as transformers' Trainer and accelerate leave them; every moment has values of its own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

WIDTH, ROWS, CONTEXT = 16, 32, 8

CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_head": 4,
    "n_embd": WIDTH,
    "n_positions": CONTEXT,
    "vocab_size": ROWS,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


def gpt2(layers: int = 2, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of a GPT-2 by the names of transformers, in the order of its modules."""
    made = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (ROWS, WIDTH), "wpe.weight": (CONTEXT, WIDTH)}
    linear = {"attn.c_attn": (WIDTH, 3 * WIDTH), "attn.c_proj": (WIDTH, WIDTH)}
    forward = {"mlp.c_fc": (WIDTH, 4 * WIDTH), "mlp.c_proj": (4 * WIDTH, WIDTH)}
    modules = {"ln_1": (WIDTH,), **linear, "ln_2": (WIDTH,), **forward}
    for i in range(layers):
        for name, shape in modules.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    shapes |= {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    return {f"transformer.{name}": torch.randn(shape, generator=made) for name, shape in shapes.items()}


def moments_of(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """AdamW's entry of each parameter."""
    made = torch.Generator().manual_seed(5)
    return {
        name: {
            "step": torch.tensor(7.0),
            "exp_avg": torch.randn(weight.shape, generator=made),
            "exp_avg_sq": torch.rand(weight.shape, generator=made),
        }
        for name, weight in weights.items()
    }


def groups_of(weights: dict[str, torch.Tensor]) -> list[list[str]]:
    """The parameters that the Trainer decays, and the others."""
    decayed = [name for name in weights if name.endswith("weight") and ".ln_" not in name]
    return [decayed, [name for name in weights if name not in decayed]]


def state_of(weights: dict[str, torch.Tensor], *, by_name: bool = False) -> dict[str, Any]:
    """AdamW's state, keyed by numbers as torch.optim does, or by names as get_optimizer_state_dict does."""
    groups, moments = groups_of(weights), moments_of(weights)
    key = {name: name if by_name else i for i, name in enumerate(name for group in groups for name in group)}
    rest = {"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-8}
    return {
        "state": {key[name]: moments[name] for group in groups for name in group},
        "param_groups": [
            {**rest, "weight_decay": decay, "params": [key[name] for name in group]}
            for decay, group in zip((0.01, 0.0), groups, strict=True)
        ],
    }


def write_trainer(folder: Path, step: int = 500, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a step of the Trainer: weights in safetensors, whose names are sorted, config, optimizer, and the rest."""
    folder.mkdir(parents=True)
    weights = gpt2() if weights is None else weights
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    layers = sum(name.endswith("ln_1.weight") for name in weights)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "n_layer": layers}))
    torch.save(state_of(weights), folder / "optimizer.pt")
    write_run(folder, step)
    return folder


def write_run(folder: Path, step: int, suffix: str = "pt") -> None:
    """Write what the Trainer leaves of the run itself."""
    (folder / "trainer_state.json").write_text(
        json.dumps({"global_step": step, "epoch": step / 400, "max_steps": 1000})
    )
    torch.save({"last_epoch": step, "_last_lr": [2e-5, 2e-5]}, folder / f"scheduler.{suffix}")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state_0.pth")
    torch.save({"lr": 1.0}, folder / "training_args.bin")


def save_dcp(content: dict[str, Any], folder: Path) -> Path:
    """Write a DCP folder in one process."""
    with warnings.catch_warnings(action="ignore"):
        dcp.save(content, checkpoint_id=folder)
    return folder


def write_fsdp(folder: Path, weights: dict[str, torch.Tensor], step: int = 500) -> Path:
    """Write a step of the Trainer, or accelerate, whose FSDP saved in shards."""
    folder.mkdir(parents=True)
    save_dcp({"model": weights}, folder / "pytorch_model_fsdp_0")
    save_dcp({"optimizer": state_of(weights, by_name=True)}, folder / "optimizer_0")
    write_run(folder, step)
    return folder
