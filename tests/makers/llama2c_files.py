"""Checkpoints as llama2.c's train.py writes them, and its forward from its formulas: turns as complex products.

As in karpathy/llama2.c, model.py and train.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]

ARGUMENTS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 40,
    "multiple_of": 8,
    "max_seq_len": 24,
    "dropout": 0.0,
}
CONFIG: dict[str, Any] = {
    "out_dir": "out",
    "batch_size": 6,
    "max_seq_len": 24,
    "vocab_source": "custom",
    "vocab_size": 40,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 8,
    "dropout": 0.0,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-4,
    "max_iters": 100,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 10,
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
}
"""Its globals, as far as they are of these types; lr_decay_iters and min_lr are set after they are recorded."""


def state_of(arguments: dict[str, Any], seed: int = 0, *, tied: bool = True) -> State:
    """Random tensors, in the order of the modules; the head is the token table."""
    torch.manual_seed(seed)
    dim, heads, groups = arguments["dim"], arguments["n_heads"], arguments["n_kv_heads"] or arguments["n_heads"]
    wide = arguments.get("hidden_dim")
    if wide is None:
        many = arguments["multiple_of"]
        wide = many * ((int(2 * 4 * dim / 3) + many - 1) // many)
    rows = {"wq": dim, "wk": groups * dim // heads, "wv": groups * dim // heads, "wo": dim}
    made: State = {"tok_embeddings.weight": torch.randn(arguments["vocab_size"], dim) * 0.3}
    for i in range(arguments["n_layers"]):
        made |= {f"layers.{i}.attention.{name}.weight": torch.randn(n, dim) * 0.3 for name, n in rows.items()}
        sides = {"w1": (wide, dim), "w2": (dim, wide), "w3": (wide, dim)}
        made |= {f"layers.{i}.feed_forward.{name}.weight": torch.randn(side) * 0.3 for name, side in sides.items()}
        made |= {f"layers.{i}.{name}_norm.weight": 1 + torch.randn(dim) * 0.2 for name in ("attention", "ffn")}
    made["norm.weight"] = 1 + torch.randn(dim) * 0.2
    made["output.weight"] = made["tok_embeddings.weight"] if tied else torch.randn(arguments["vocab_size"], dim) * 0.3
    return made


def logits(state: State, arguments: dict[str, Any], ids: Tensor) -> Tensor:
    """Logits [B, T, V] in float64; neighbours are the parts of a complex number, as in Meta's code."""
    w = {name: tensor.double() for name, tensor in state.items()}
    heads, groups = arguments["n_heads"], arguments["n_kv_heads"] or arguments["n_heads"]
    size, (B, T), eps = arguments["dim"] // heads, ids.shape, arguments.get("norm_eps", 1e-5)
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, size, 2).double() / size)
    angles = torch.outer(torch.arange(T).double(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    x = w["tok_embeddings.weight"][ids]
    for i in range(arguments["n_layers"]):
        at = f"layers.{i}."
        y = norm(x, f"{at}attention_norm")
        q, k, v = (F.linear(y, w[f"{at}attention.w{part}.weight"]).view(B, T, -1, size) for part in "qkv")
        q, k = turned(q), turned(k)
        k, v = (one.repeat_interleave(heads // groups, dim=2).transpose(1, 2) for one in (k, v))
        scores = q.transpose(1, 2) @ k.mT / size**0.5
        seen = torch.ones(T, T).tril().bool()
        mixed = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + F.linear(mixed, w[f"{at}attention.wo.weight"])
        y = norm(x, f"{at}ffn_norm")
        gate, up = (F.linear(y, w[f"{at}feed_forward.{name}.weight"]) for name in ("w1", "w3"))
        x = x + F.linear(F.silu(gate) * up, w[f"{at}feed_forward.w2.weight"])
    return F.linear(norm(x, "norm"), w["output.weight"])


def write(path: Path, state: State, arguments: dict[str, Any], *, prefix: str = "", **entries: Any) -> Path:
    """Write a ckpt.pt, with AdamW's state after two updates, each moment a function of its weight."""
    parameters = [t for name, t in state.items() if name != "output.weight" or t is not state["tok_embeddings.weight"]]
    groups = [[t for t in parameters if t.dim() >= 2], [t for t in parameters if t.dim() < 2]]
    order = [t for group in groups for t in group]
    rest = {"lr": 5e-4 * 2 / 10, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": False}
    numbers = [list(range(len(groups[0]))), list(range(len(groups[0]), len(order)))]
    optimizer = {
        "state": {k: {"step": torch.tensor(2.0), "exp_avg": 3 * t, "exp_avg_sq": t * t} for k, t in enumerate(order)},
        "param_groups": [
            {**rest, "weight_decay": decay, "params": group} for decay, group in zip((0.1, 0.0), numbers, strict=True)
        ],
    }
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": optimizer,
        "model_args": arguments,
        "iter_num": 2,
        "best_val_loss": torch.tensor(3.25),
        "config": CONFIG,
    }
    torch.save({name: value for name, value in {**checkpoint, **entries}.items() if value is not None}, path)
    return path
