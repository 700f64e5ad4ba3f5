"""The default sizes and settings of each kind of model, which a flag, its config or its training state overrides."""

from __future__ import annotations

from typing import Any

GPT_HEAD = {"tied_head": True, "head_bias": False}
"""The head of every new GPT, as nanoGPT's: the token table, without a bias. Other programs can hold such a model."""

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

MODDED: dict[str, Any] = {"weight_decay": None, "grad_clip": 0.0, "warmup_iters": 0.0, "lr_schedule": "cosine"}
"""As upstream trains: the variant's weight decay, gradients as they are, no warm-up, a rate that ends low."""

MODDED_ON_CPU = {
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
