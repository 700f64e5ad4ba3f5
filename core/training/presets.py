"""What a run does unless a flag, the model's own config or its training state says otherwise."""

from __future__ import annotations

from typing import Any

GPT_ON_CPU = {
    "batch_size": 16,
    "block_size": 64,
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 4,
    "dropout": 0.0,
    "max_iters": 1500,
    "learning_rate": 1e-3,
    "warmup_iters": 100.0,
    "dtype": "fp32",
    "compile": False,
}
"""A model that learns to write in little more than a minute on two cores."""

GPT_ON_CUDA = {
    "max_iters": 5000,
    "learning_rate": 3e-4,
    "warmup_iters": 100.0,
    "dtype": "bf16",
    "compile": True,
}
"""The defaults of GPTConfig at the speed of the device."""

RUN = {
    "lr_schedule": "constant",
    "lr_decay_iters": None,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "gradient_accumulation_steps": 1,
    "ema": 0.0,
    "eval_interval": 250,
    "eval_iters": 20,
    "save_interval": None,
    "save_every_minutes": None,
    "seed": 1337,
}
"""Whatever is trained, and wherever."""

SPEEDRUN: dict[str, Any] = {"weight_decay": None, "grad_clip": 0.0, "warmup_iters": 0.0, "lr_schedule": "cosine"}
"""As upstream trains: the variant's weight decay, gradients as they are, no warm-up, a rate that ends low."""

SPEEDRUN_ON_CPU = {
    "n_layer": 6,
    "n_head": 1,
    "n_embd": 128,
    "block_size": 256,
    "max_iters": 800,
    "eval_interval": 200,
    "eval_iters": 10,
    "dtype": "fp32",
    "compile": False,
}
"""A toy of the same mathematics, which learns to write in a minute on one core."""

SMALL_ON_CUDA = {"n_layer": 12, "n_head": 6, "n_embd": 768, "block_size": 48 * 1024, "max_iters": 1770}
MEDIUM_ON_CUDA = {"n_layer": 16, "n_head": 8, "n_embd": 1024, "block_size": 64 * 1024, "max_iters": 5960}
"""Upstream's sizes; eight of its ranks are one of ours with --gradient_accumulation_steps 8."""


def preset(variant: str | None, muon_rate: float | None, on_cpu: bool) -> dict[str, Any]:
    """Choose what a run does by default; `variant` and its rate are those of modded-nanogpt, None is a GPT."""
    if variant is None:
        return dict(GPT_ON_CPU if on_cpu else GPT_ON_CUDA)
    large = {**(MEDIUM_ON_CUDA if variant == "medium" else SMALL_ON_CUDA), "dtype": "bf16", "compile": False}
    sizes = SPEEDRUN_ON_CPU if on_cpu else large
    return {**SPEEDRUN, **sizes, "lr_decay_iters": sizes["max_iters"], "learning_rate": muon_rate}
