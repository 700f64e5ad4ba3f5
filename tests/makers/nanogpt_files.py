"""Files as nanoGPT writes them, of any size and age, made of plain torch; each moment carries a number of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Order = Callable[[Sequence[str], dict[str, torch.Tensor]], tuple[list[str], list[str]]]

CHARS = {char: i for i, char in enumerate(sorted(set("abcdefgh \n")))}
"""The vocabulary of a meta.pkl, from which its `itos` follows."""

CONFIG: dict[str, Any] = {
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "decay_lr": True,
    "warmup_iters": 5,
    "lr_decay_iters": 100,
    "max_iters": 100,
    "grad_clip": 1.0,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.99,
    "batch_size": 12,
    "gradient_accumulation_steps": 5,
    "block_size": 8,
    "dataset": "letters",
    "dtype": "float32",
    "device": "cpu",
    "compile": False,
}


def rate_of(config: dict[str, Any], it: int) -> float:
    """nanoGPT's learning rate at an iteration (train.py, get_lr)."""
    if not config["decay_lr"]:
        return config["learning_rate"]
    if it < config["warmup_iters"]:
        return config["learning_rate"] * (it + 1) / (config["warmup_iters"] + 1)
    if it > config["lr_decay_iters"]:
        return config["min_lr"]
    ratio = (it - config["warmup_iters"]) / (config["lr_decay_iters"] - config["warmup_iters"])
    return config["min_lr"] + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (config["learning_rate"] - config["min_lr"])


def names_of(layers: int, *, bias: bool) -> list[str]:
    """The parameters in the order of the modules."""
    kinds = ("weight", "bias") if bias else ("weight",)
    modules = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    inside = [f"transformer.h.{i}.{module}.{kind}" for i in range(layers) for module in modules for kind in kinds]
    return [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        *inside,
        *(f"transformer.ln_f.{kind}" for kind in kinds),
    ]


def TODAY(names: Sequence[str], weights: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """The groups since 2023-05-06."""
    return [n for n in names if weights[n].dim() >= 2], [n for n in names if weights[n].dim() < 2]


def SORTED(names: Sequence[str], weights: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """The groups before: Linear weights, and the rest."""
    linear = {n for n in names if n.endswith("weight") and (".attn." in n or ".mlp." in n)}
    return sorted(linear), sorted(set(names) - linear)


def ckpt(
    path: Path,
    *,
    order: Order,
    layers: int = 1,
    width: int = 32,
    rows: int = 65,
    block: int = 8,
    bias: bool = False,
    prefix: str = "",
    head_twice: bool = False,
    step: Any = 40,
    step_name: str = "iter_num",
    config: dict[str, Any] | None = CONFIG,
) -> dict[str, int]:
    """Write a checkpoint; returns the number that fills the moments of each parameter."""
    sides = {"c_attn": (3 * width, width), "attn.c_proj": (width, width), "c_fc": (4 * width, width)}
    sides |= {"mlp.c_proj": (width, 4 * width), "wte": (rows, width), "wpe": (block, width), "ln_": (width,)}
    weights = {}
    for name in names_of(layers, bias=bias):
        shape = next(sides[part] for part in sides if part in name)
        weights[name] = torch.randn(shape[:1] if name.endswith("bias") else shape) * 0.1
    groups = order(list(weights), weights)
    marks = {name: number for number, name in enumerate([*groups[0], *groups[1]])}
    state = {
        number: {
            "step": torch.tensor(40.0),
            "exp_avg": torch.full_like(weights[name], float(number)),
            "exp_avg_sq": torch.full_like(weights[name], float(number)),
        }
        for name, number in marks.items()
    }
    common = {"lr": rate_of(CONFIG, 40), "betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": False}
    param_groups = [
        {**common, "weight_decay": decay, "params": [marks[name] for name in group]}
        for decay, group in zip((0.1, 0.0), groups, strict=True)
    ]
    table = weights["transformer.wte.weight"]
    weights["lm_head.weight"] = table.clone() if head_twice else table
    sizes = {"n_layer": layers, "n_head": 2, "n_embd": width, "block_size": block, "vocab_size": rows}
    content = {
        "model": {prefix + name: tensor for name, tensor in weights.items()},
        "optimizer": {"state": state, "param_groups": param_groups},
        "model_args": {**sizes, "bias": bias, "dropout": 0.0},
        step_name: step,
        "best_val_loss": torch.tensor(3.2),
    }
    torch.save(content | ({} if config is None else {"config": config}), path)
    return marks
