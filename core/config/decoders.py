"""The decoders of today that train.py starts from scratch: the choices of each family, and the sizes that follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .gpt import GPTConfig

LLAMA: dict[str, Any] = {
    "pos_encoding": "rotary",
    "norm_type": "rmsnorm",
    "mlp_type": "swiglu",
    "bias": False,
    "norm_bias": False,
    "mlp_bias": False,
    "tied_head": True,
    "head_bias": False,
}
"""Llama, with the head of its small models (Llama 3.2, SmolLM2)."""

DECODERS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "qk_norm": "head", "rope_theta": 1e6, "norm_eps": 1e-6},
}
"""Choices of each, by its name for --arch."""

SIGNS = ("pos_encoding", "norm_type", "norm_placement", "mlp_type", "qk_norm", "parallel_residual")
"""Choices that tell one from another; weights of a family vary in others, such as biases, windows and rope_theta."""


def complete(arch: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Add the choices of an architecture to the fields of a new model, and the sizes that nobody specified.

    The feed-forward has 8/3 of the width, so that its three matrices are as large as the two of 4 times the width; two
    heads of queries share keys and values, or three where only that divides them. Heads of Qwen3 are twice as wide as
    their share of the width, as in its smallest model.
    """
    if arch not in DECODERS:
        return dict(fields)
    default = GPTConfig(**DECODERS[arch])
    n_embd, n_head = (fields.get(name, getattr(default, name)) for name in ("n_embd", "n_head"))
    share = next(share for share in (2, 3, 1) if n_head % share == 0)
    sizes = {"n_ffn": -(-8 * n_embd // 3 // 64) * 64, "n_kv_head": n_head // share}
    if default.qk_norm is not None:
        sizes["head_size"] = 2 * (n_embd // n_head)
    return {**DECODERS[arch], **sizes, **fields}


def arch_of_config(config: GPTConfig) -> str:
    """The architecture that a config is of, by its name for --arch; gpt where it is none of `DECODERS`."""
    for arch, choices in DECODERS.items():
        if all(getattr(config, name) == choices.get(name, GPTConfig.NEUTRAL[name]) for name in SIGNS):
            return arch
    return "gpt"
