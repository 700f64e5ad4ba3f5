"""The decoder from its formulas, in NumPy and float64: one query at a time, positions as complex numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy import ndarray as Array

from core.config.gpt import GPTConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""A scaling of rotary positions, in the spelling of transformers."""

ERF = np.vectorize(math.erf)
MIDDLES = {
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "swiglu": lambda x: x / (1 + np.exp(-x)),
}
MIDDLES["geglu"] = MIDDLES["gelu_tanh"]


class Reference:
    """The logits of a model's weights under a config."""

    def __init__(self, state: Mapping[str, torch.Tensor], config: GPTConfig) -> None:
        self.w = {name: tensor.detach().double().numpy() for name, tensor in state.items()}
        self.config = config
        self.size = config.head_size or config.n_embd // config.n_head
        self.groups = config.n_kv_head or config.n_head

    def logits(self, ids: list[int]) -> Array:
        """Logits [T, V] of one sequence."""
        c = self.config
        x = self.w["token_embedding_table.weight"][ids] * c.embedding_scale
        if c.pos_encoding == "learned":
            x = x + self.w["position_embedding_table.weight"][: len(ids)]
        for i in range(c.n_layer):
            x = self.layer(x, i)
        logits = self.linear(self.norm(x, "ln_f"), "lm_head")
        return logits if c.logit_cap is None else c.logit_cap * np.tanh(logits / c.logit_cap)

    def layer(self, x: Array, i: int) -> Array:
        """One layer, written out for each place of its norms."""
        c, at = self.config, f"blocks.{i}"

        def attend(y: Array) -> Array:
            return self.attention(y, i)

        def feed(y: Array) -> Array:
            return self.feed(y, f"{at}.fwd")

        def norm(y: Array, name: str) -> Array:
            return self.norm(y, f"{at}.{name}")

        if c.parallel_residual:
            other = norm(x, "ln1" if c.shared_attention_norm else "ln2")
            return x + attend(norm(x, "ln1")) + feed(other)
        match c.norm_placement:
            case "before":
                x = x + attend(norm(x, "ln1"))
                return x + feed(norm(x, "ln2"))
            case "after":
                x = norm(x + attend(x), "ln1")
                return norm(x + feed(x), "ln2")
            case "after_sublayer":
                x = x + norm(attend(x), "ln1_post")
                return x + norm(feed(x), "ln2_post")
        x = x + norm(attend(norm(x, "ln1")), "ln1_post")
        return x + norm(feed(norm(x, "ln2")), "ln2_post")

    def linear(self, x: Array, name: str) -> Array:
        """A linear layer, with its bias where it has one."""
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def norm(self, x: Array, name: str) -> Array:
        """A norm of the config's kind over the last side."""
        kind, eps = self.config.norm_type, self.config.norm_eps
        if kind.startswith("layernorm"):
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
        weight = self.w.get(f"{name}.weight", 1.0)
        return x * (weight + 1 if kind.endswith("_1p") else weight) + self.w.get(f"{name}.bias", 0.0)

    def feed(self, x: Array, name: str) -> Array:
        """The feed-forward part."""
        middle, up = MIDDLES[self.config.mlp_type or self.config.activation], self.linear(x, f"{name}.net.0")
        gated = f"{name}.gate.weight" in self.w
        return self.linear(middle(self.linear(x, f"{name}.gate")) * up if gated else middle(up), f"{name}.net.2")

    def attention(self, x: Array, i: int) -> Array:
        """Attention, one query at a time."""
        c, name, D, T = self.config, f"blocks.{i}.sa", self.size, len(x)
        rows = np.split(self.linear(x, f"{name}.qkv"), [c.n_head * D, (c.n_head + self.groups) * D], axis=-1)
        if c.qk_norm == "width":
            rows[:2] = [self.norm(one, f"{name}.{part}_norm_wide") for one, part in zip(rows, "qk", strict=False)]
        q, k, v = (one.reshape(T, -1, D) for one in rows)
        if c.qk_norm == "head":
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        if c.pos_encoding == "rotary":
            q, k = self.turned(q), self.turned(k)
        scale = {"head_size": D**-0.5, "n_embd": c.n_embd**-0.5}.get(c.attention_scale, c.attention_scale)
        window = c.sliding_window[i] if isinstance(c.sliding_window, list) else c.sliding_window
        mixed = np.zeros((T, c.n_head, D))
        for t in range(T):
            first = 0 if window is None else max(0, t - window + 1)
            for head in range(c.n_head):
                group = head // (c.n_head // self.groups)
                scores = k[first : t + 1, group] @ q[t, head] * scale
                if c.attention_cap is not None:
                    scores = c.attention_cap * np.tanh(scores / c.attention_cap)
                weights = np.exp(scores - scores.max())
                mixed[t, head] = weights / weights.sum() @ v[first : t + 1, group]
        return self.linear(mixed.reshape(T, -1), f"{name}.proj")

    def turned(self, x: Array) -> Array:
        """Turn x [T, H, D]: partners are the parts of a complex number."""
        c = self.config
        width = int(self.size * c.rotary_percent)
        frequencies = c.rope_theta ** (-np.arange(0, width, 2) / width)
        if c.rope_scaling is not None:
            frequencies = self.scaled(frequencies)
        turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
        rest = x[..., width:]
        if c.rotary_layout == "halves":
            z = (x[..., : width // 2] + 1j * x[..., width // 2 : width]) * turn
            return np.concatenate([z.real, z.imag, rest], -1)
        z = (x[..., 0:width:2] + 1j * x[..., 1:width:2]) * turn
        return np.concatenate([np.stack([z.real, z.imag], -1).reshape(*x.shape[:2], width), rest], -1)

    def scaled(self, frequencies: Array) -> Array:
        """Scaled frequencies; YaRN's are compared with transformers only."""
        s = self.config.rope_scaling
        if s["rope_type"] == "linear":
            return frequencies / s["factor"]
        made = []
        for frequency in frequencies:
            length = 2 * math.pi / frequency
            turns = s["original_max_position_embeddings"] / length
            if turns > s["high_freq_factor"]:
                made.append(frequency)
            elif turns < s["low_freq_factor"]:
                made.append(frequency / s["factor"])
            else:
                smooth = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
                made.append((1 - smooth) * frequency / s["factor"] + smooth * frequency)
        return np.array(made)
