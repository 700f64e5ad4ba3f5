"""Tiny models of litgpt: fields of its Config for each kind, random tensors, and its forward from its formulas.

As in Lightning-AI/litgpt, litgpt/model.py and litgpt/config.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core.containers.flat_yaml import dump_flat_yaml

Values = dict[str, Any]
State = dict[str, Tensor]

CLASS: Values = {
    "name": "",
    "norm_class_name": "LayerNorm",
    "norm_eps": 1e-5,
    "norm_qk": False,
    "norm_qk_type": "default",
    "norm_1": True,
    "norm_2": True,
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "parallel_residual": True,
    "shared_attention_norm": False,
    "bias": True,
    "attn_bias": False,
    "lm_head_bias": False,
    "attention_scores_scalar": None,
    "sliding_window_size": None,
    "sliding_window_indices": None,
    "attention_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_base": 10000,
    "rotary_percentage": 0.25,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "rope_interleave": False,
    "mlp_class_name": "GptNeoxMLP",
    "gelu_approximate": "none",
    "scale_embeddings": False,
}
"""Defaults of its Config."""

SIZES: Values = {
    "block_size": 64,
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 4,
    "n_query_groups": 4,
    "head_size": 8,
    "intermediate_size": 40,
    "vocab_size": 45,
    "padded_vocab_size": 48,
    "padding_multiple": 16,
    "hf_config": {},
    "n_expert": 0,
    "latent_attention": None,
}

LLAMA: Values = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "bias": False,
    "parallel_residual": False,
    "rotary_percentage": 1.0,
    "n_query_groups": 2,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16}
PHI: Values = {
    "rotary_percentage": 0.5,
    "shared_attention_norm": True,
    "lm_head_bias": True,
    "gelu_approximate": "tanh",
}
GEMMA: Values = {
    **LLAMA,
    "name": "Gemma-2b",
    "mlp_class_name": "GemmaMLP",
    "gelu_approximate": "tanh",
    "scale_embeddings": True,
    "n_query_groups": 1,
    "head_size": 12,
    "norm_eps": 1e-2,
}
GEMMA2: Values = {
    **GEMMA,
    "n_query_groups": 2,
    "post_attention_norm": True,
    "post_mlp_norm": True,
    "attention_scores_scalar": 24,
    "attention_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "sliding_window_size": 4,
    "sliding_window_indices": [1, 0, 1],
}
OLMO2: Values = {
    **LLAMA,
    "name": "OLMo-2-1124-7B",
    "norm_qk": True,
    "norm_qk_type": "olmo2",
    "norm_1": False,
    "norm_2": False,
    "post_attention_norm": True,
    "post_mlp_norm": True,
}
KINDS: dict[str, Values] = {
    "llama2": LLAMA,
    "llama3": {**LLAMA, "rope_base": 500000, "rope_adjustments": LLAMA3},
    "llama_condensed": {**LLAMA, "rope_condense_ratio": 4},
    "llama_of_pairs": {**LLAMA, "rope_interleave": True},
    "mistral": {**LLAMA, "sliding_window_size": 4, "sliding_window_indices": [1, 1, 1]},
    "qwen2": {**LLAMA, "attn_bias": True, "norm_eps": 1e-6, "rope_base": 1000000},
    "qwen3": {**LLAMA, "norm_qk": True, "head_size": 20, "norm_eps": 1e-6},
    "phi": PHI,
    "pythia": {"rotary_percentage": 0.5},
    "pythia_serial": {"rotary_percentage": 0.5, "parallel_residual": False, "gelu_approximate": "tanh"},
    "olmo2": OLMO2,
    "olmo2_of_one_width": {**OLMO2, "n_query_groups": 4},
    "gemma": GEMMA,
    "gemma2": GEMMA2,
}
"""Fields of each kind, where they differ from the defaults and sizes above."""


def config_of(kind: str, **changed: Any) -> Values:
    """The whole config of a kind."""
    return {**CLASS, **SIZES, **KINDS[kind], **changed}


def state_of(c: Values, seed: int = 0) -> State:
    """Random tensors of a config, each far from neutral, under the names of today."""
    torch.manual_seed(seed)
    C, H, G, D, wide = (c[name] for name in ("n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size"))
    made: State = {}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        made[f"{name}.weight"] = torch.randn(rows, columns) * 0.3
        if bias:
            made[f"{name}.bias"] = torch.randn(rows) * 0.3

    def norm(name: str, width: int = C) -> None:
        made[f"{name}.weight"] = torch.randn(width) * 0.2 + ("Gemma" not in c["name"])
        if c["norm_class_name"] == "LayerNorm":
            made[f"{name}.bias"] = torch.randn(width) * 0.2

    linear("lm_head", c["padded_vocab_size"], C, c["lm_head_bias"])
    linear("transformer.wte", c["padded_vocab_size"], C, False)
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}."
        if c["norm_1"]:
            norm(f"{at}norm_1")
        linear(f"{at}attn.qkv", (H + 2 * G) * D, C, c["bias"] or c["attn_bias"])
        linear(f"{at}attn.proj", C, H * D, c["bias"])
        if c["norm_qk"]:
            wider = c["norm_qk_type"] == "olmo2"
            norm(f"{at}attn.norm_q", H * D if wider else D)
            norm(f"{at}attn.norm_k", G * D if wider else D)
        if c["norm_2"] and not c["shared_attention_norm"]:
            norm(f"{at}norm_2")
        for part in ("fc",) if c["mlp_class_name"] == "GptNeoxMLP" else ("fc_1", "fc_2"):
            linear(f"{at}mlp.{part}", wide, C, c["bias"])
        linear(f"{at}mlp.proj", C, wide, c["bias"])
        for name in ("post_attention_norm", "post_mlp_norm"):
            if c[name]:
                norm(at + name)
    norm("transformer.ln_f")
    return made


def interleaved(state: State, c: Values) -> State:
    """The same model as files before 2025 have it: the rows of q, k and v group by group, under another name."""
    D, groups, share = c["head_size"], c["n_query_groups"], c["n_head"] // c["n_query_groups"]
    made = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            q, k, v = tensor.split([c["n_head"] * D, groups * D, groups * D])
            rows = zip(q.split(share * D), k.split(D), v.split(D), strict=True)
            name, tensor = name.replace("attn.qkv", "attn.attn"), torch.cat([one for group in rows for one in group])
        made[name] = tensor
    return made


def write(folder: Path, c: Values, state: State, *, raw: bool = True) -> Path:
    """Write a checkpoint folder of litgpt."""
    folder.mkdir(parents=True)
    torch.save(state if raw else {"model": state}, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_bytes(dump_flat_yaml(c))
    return folder


class Reference:
    """litgpt's forward, from its formulas, in float64."""

    def __init__(self, state: State, c: Values) -> None:
        self.w, self.c = {name: tensor.double() for name, tensor in state.items()}, {**CLASS, **c}

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V] of ids [B, T]."""
        c = self.c
        x = self.w["transformer.wte.weight"][ids]
        x = x * c["n_embd"] ** 0.5 if c["scale_embeddings"] else x
        for i in range(c["n_layer"]):
            at = f"transformer.h.{i}."
            y = self.norm(x, f"{at}norm_1")
            attended = self.norm(self.attention(y, i, f"{at}attn."), f"{at}post_attention_norm")
            if c["parallel_residual"]:
                y = y if c["shared_attention_norm"] else self.norm(x, f"{at}norm_2")
                x = attended + x
            else:
                x = attended + x
                y = self.norm(x, f"{at}norm_2")
            x = self.norm(self.mlp(y, f"{at}mlp."), f"{at}post_mlp_norm") + x
        logits = self.linear(self.norm(x, "transformer.ln_f"), "lm_head")
        return self.capped(logits, c["final_logit_softcapping"])

    @staticmethod
    def capped(x: Tensor, most: float | None) -> Tensor:
        """Scores or logits that stay below a number."""
        return x if most is None else torch.tanh(x / most) * most

    def linear(self, x: Tensor, name: str) -> Tensor:
        """A linear layer."""
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """A norm of the config's class; nothing where the model has none of this name."""
        if f"{name}.weight" not in self.w:
            return x
        weight, eps = self.w[f"{name}.weight"], self.c["norm_eps"]
        if self.c["norm_class_name"] == "LayerNorm":
            return F.layer_norm(x, x.shape[-1:], weight, self.w[f"{name}.bias"], eps)
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
        return x * (1 + weight if "Gemma" in self.c["name"] else weight)

    def mlp(self, x: Tensor, at: str) -> Tensor:
        """The feed-forward part."""
        form = self.c["gelu_approximate"]
        if self.c["mlp_class_name"] == "GptNeoxMLP":
            return self.linear(F.gelu(self.linear(x, f"{at}fc"), approximate=form), f"{at}proj")
        gate = self.linear(x, f"{at}fc_1")
        gate = F.silu(gate) if self.c["mlp_class_name"] == "LLaMAMLP" else F.gelu(gate, approximate=form)
        return self.linear(gate * self.linear(x, f"{at}fc_2"), f"{at}proj")

    def attention(self, x: Tensor, i: int, at: str) -> Tensor:
        """Attention, with grouped heads."""
        c, (B, T, _) = self.c, x.shape
        H, G, D = c["n_head"], c["n_query_groups"], c["head_size"]
        q, k, v = self.linear(x, f"{at}qkv").split([H * D, G * D, G * D], dim=-1)
        if c["norm_qk_type"] == "olmo2":
            q, k = self.norm(q, f"{at}norm_q"), self.norm(k, f"{at}norm_k")
        q, k, v = (one.view(B, T, -1, D).transpose(1, 2) for one in (q, k, v))
        if c["norm_qk_type"] == "default":
            q, k = self.norm(q, f"{at}norm_q"), self.norm(k, f"{at}norm_k")
        q, k = self.turned(q), self.turned(k)
        k, v = (one.repeat_interleave(H // G, dim=1) for one in (k, v))
        scores = q @ k.mT / math.sqrt(c["attention_scores_scalar"] or D)
        scores = self.capped(scores, c["attention_logit_softcapping"])
        distance = torch.arange(T)[:, None] - torch.arange(T)
        seen = distance >= 0
        if c["sliding_window_size"] is not None and (c["sliding_window_indices"] or [1] * c["n_layer"])[i]:
            seen &= distance < c["sliding_window_size"]
        y = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        return self.linear(y.transpose(1, 2).reshape(B, T, H * D), f"{at}proj")

    def turned(self, x: Tensor) -> Tensor:
        """Turn the first numbers of each head; neighbours are partners with rope_interleave."""
        c, n = self.c, int(self.c["rotary_percentage"] * self.c["head_size"])
        theta = 1.0 / c["rope_base"] ** (torch.arange(0, n, 2).double() / n)
        adjusted = c["rope_adjustments"] or {}
        if "low_freq_factor" in adjusted:
            low, high = adjusted["low_freq_factor"], adjusted["high_freq_factor"]
            ratio = adjusted["original_max_seq_len"] * theta / (2 * math.pi)
            smooth = ((ratio - low) / (high - low)).clamp(0, 1)
            theta = (1 - smooth) * theta / adjusted["factor"] + smooth * theta
        elif "factor" in adjusted:
            theta = theta / adjusted["factor"]
        angles = torch.outer(torch.arange(x.shape[-2]).double() / c["rope_condense_ratio"], theta).repeat(1, 2)
        part, rest = x[..., :n], x[..., n:]
        if c["rope_interleave"]:
            part = part.unflatten(-1, (-1, 2)).mT.flatten(-2)
        a, b = part.chunk(2, dim=-1)
        return torch.cat((part * angles.cos() + torch.cat((-b, a), -1) * angles.sin(), rest), -1)
