"""Random GPTs under the names of other programs, and their logits from a forward pass of their own (numpy, float64)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy import ndarray as Array

GELUS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


@dataclass
class SmallGPT:
    """A model of GPT-2's shape, by what decides its logits."""

    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32
    block_size: int = 12
    vocab_size: int = 29
    bias: bool = True
    activation: str = "gelu"
    scale: float = 0.0  # of the scores; 0: head_size ** -0.5
    normed_after: bool = False
    eps: float = 1e-5
    seed: int = 0
    weights: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        random, C = torch.Generator().manual_seed(self.seed), self.n_embd

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random) * 0.3

        self.weights = {"wte.weight": draw(self.vocab_size, C), "wpe.weight": draw(self.block_size, C)}
        shapes = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        for i in range(self.n_layer):
            for name, shape in {"ln_1": (C,), "ln_2": (C,), **shapes}.items():
                self.weights[f"h.{i}.{name}.weight"] = draw(*shape) + (1 if len(shape) == 1 else 0)
                if self.bias:
                    self.weights[f"h.{i}.{name}.bias"] = draw(shape[0])
        self.weights["ln_f.weight"] = 1 + draw(C)
        if self.bias:
            self.weights["ln_f.bias"] = draw(C)

    @property
    def sizes(self) -> dict[str, int | bool]:
        """The fields of nanoGPT's model_args, without dropout."""
        names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
        return {name: getattr(self, name) for name in names}

    def nanogpt(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Its state dict under nanoGPT's names, the head in the storage of the token table."""
        named = {f"{prefix}transformer.{name}": tensor for name, tensor in self.weights.items()}
        return named | {f"{prefix}lm_head.weight": named[f"{prefix}transformer.wte.weight"]}

    def lecture(self) -> dict[str, torch.Tensor]:
        """Its state dict under the lecture's names: a layer for each head, and a head with a bias of zeros."""
        w, D = self.weights, self.n_embd // self.n_head
        made = {"token_embedding_table.weight": w["wte.weight"], "position_embedding_table.weight": w["wpe.weight"]}
        parts = {"attn.c_proj": "sa.proj", "mlp.c_fc": "ffwd.net.0", "mlp.c_proj": "ffwd.net.2"}
        for i in range(self.n_layer):
            for word, rows in zip(("query", "key", "value"), w[f"h.{i}.attn.c_attn.weight"].chunk(3), strict=True):
                for j in range(self.n_head):
                    made[f"blocks.{i}.sa.heads.{j}.{word}.weight"] = rows[j * D : (j + 1) * D].clone()
            for theirs, ours in {**parts, "ln_1": "ln1", "ln_2": "ln2"}.items():
                for kind in ("weight", "bias"):
                    made[f"blocks.{i}.{ours}.{kind}"] = w[f"h.{i}.{theirs}.{kind}"]
        head = {"lm_head.weight": w["wte.weight"].clone(), "lm_head.bias": torch.zeros(self.vocab_size)}
        return made | {f"ln_f.{kind}": w[f"ln_f.{kind}"] for kind in ("weight", "bias")} | head

    def logits(self, ids: torch.Tensor, *, qkv_bias: bool = True) -> torch.Tensor:
        """Its logits: ids [B, T] to [B, T, V]; the lecture's names have no `qkv_bias`."""
        w = {name: tensor.double().numpy() for name, tensor in self.weights.items()}

        def linear(x: Array, name: str, has_bias: bool = True) -> Array:
            return x @ w[f"{name}.weight"].T + (w.get(f"{name}.bias", 0) if has_bias else 0)

        def norm(x: Array, name: str) -> Array:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + self.eps)
            return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

        def attention(x: Array, i: int) -> Array:
            B, T, C = x.shape
            heads = linear(x, f"h.{i}.attn.c_attn", qkv_bias).reshape(B, T, 3, self.n_head, -1).transpose(2, 0, 3, 1, 4)
            q, k, v = heads
            scores = q @ k.swapaxes(-1, -2) * (self.scale or q.shape[-1] ** -0.5)
            scores = np.where(np.tril(np.ones((T, T))) > 0, scores, -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = scores / scores.sum(-1, keepdims=True) @ v
            return linear(mixed.transpose(0, 2, 1, 3).reshape(B, T, C), f"h.{i}.attn.c_proj")

        def feed(x: Array, i: int) -> Array:
            return linear(GELUS[self.activation](linear(x, f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")

        x = w["wte.weight"][ids.numpy()] + w["wpe.weight"][: ids.shape[1]]
        for i in range(self.n_layer):
            if self.normed_after:
                x = norm(x + attention(x, i), f"h.{i}.ln_1")
                x = norm(x + feed(x, i), f"h.{i}.ln_2")
            else:
                x = x + attention(norm(x, f"h.{i}.ln_1"), i)
                x = x + feed(norm(x, f"h.{i}.ln_2"), i)
        return torch.from_numpy(norm(x, "ln_f") @ w["wte.weight"].T)

    def ids(self) -> torch.Tensor:
        """Two sequences of its length."""
        random = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(self.vocab_size, (2, self.block_size), generator=random)

    def groups(self, are_old: bool) -> dict:
        """nanoGPT's AdamW state: what has two sides decays, or before 2023-05-06 the matrices of layers, sorted."""
        names = list(self.weights)
        if are_old:
            first = sorted(name for name in names if name.endswith("weight") and (".attn." in name or ".mlp." in name))
            rest = sorted(name for name in names if name not in first)
        else:
            first = [name for name in names if self.weights[name].dim() >= 2]
            rest = [name for name in names if name not in first]
        state = {
            k: {"step": torch.tensor(3.0), **{m: torch.full_like(self.weights[name], k + 1.0) for m in MOMENTS}}
            for k, name in enumerate([*first, *rest])
        }
        now = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
        decaying, others = list(range(len(first))), list(range(len(first), len(names)))
        groups = [{**now, "weight_decay": 0.1, "params": decaying}, {**now, "weight_decay": 0.0, "params": others}]
        return {"state": state, "param_groups": groups}


MOMENTS = ("exp_avg", "exp_avg_sq")
