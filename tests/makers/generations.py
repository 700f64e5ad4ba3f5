"""The programs of the past, in plain torch: their models, their optimizer and the files they wrote.

Nothing here comes from `core`: these are what its readers are compared with. Sizes: B batch, T block_size, C n_embd,
H n_head, D = C / H head size, V vocab_size.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHARS = list("\n ,.abcdefghimnor")
TOKENIZER = {"token_kind": "char", "chars": CHARS}
SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 12, "vocab_size": len(CHARS)}
EXTRA = {"mlp_type": "gelu", "use_checkpoint": False, "epoch_size": 1000, "rope_theta": 10000.0, "save_dtype": None}
"""Config fields of old programs that mean nothing to ours."""

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class _Head(nn.Module):
    """One head of generation (a)."""

    def __init__(self, C: int, D: int, T: int, dropout: float) -> None:
        super().__init__()
        self.key = nn.Linear(C, D, bias=False)
        self.query = nn.Linear(C, D, bias=False)
        self.value = nn.Linear(C, D, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(T, T)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        k, q, v = self.key(x), self.query(x), self.value(x)
        weight = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        weight = weight.masked_fill(self.tril[:t, :t] == 0, float("-inf"))
        return self.dropout(F.softmax(weight, dim=-1)) @ v


class _HeadByHead(nn.Module):
    def __init__(self, C: int, H: int, T: int, dropout: float) -> None:
        super().__init__()
        self.heads = nn.ModuleList([_Head(C, C // H, T, dropout) for _ in range(H)])
        self.proj = nn.Linear(C, C)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))


class _AllHeads(nn.Module):
    """Attention of generation (b): one matrix whose rows are q | k | v, each of them head by head."""

    def __init__(self, C: int, H: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.H = H
        self.qkv = nn.Linear(C, 3 * C, bias=bias)
        self.proj = nn.Linear(C, C, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, C = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.H, C // self.H).permute(2, 0, 3, 1, 4)
        weight = q @ k.transpose(-2, -1) * (C // self.H) ** -0.5
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        weight = self.dropout(F.softmax(weight.masked_fill(future, float("-inf")), dim=-1))
        return self.dropout(self.proj((weight @ v).transpose(1, 2).reshape(b, t, C)))


class _FeedForward(nn.Module):
    def __init__(self, C: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(C, 4 * C), _ACTIVATIONS[activation](), nn.Linear(4 * C, C), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Block(nn.Module):
    """Attention, then feed-forward (named as its generation does), each normed before and added to its input."""

    def __init__(self, attention: nn.Module, feed_forward: nn.Module, name: str, C: int) -> None:
        super().__init__()
        self.sa = attention
        self.add_module(name, feed_forward)
        self.ln1 = nn.LayerNorm(C)
        self.ln2 = nn.LayerNorm(C)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.get_submodule(self.name)(self.ln2(x))


class _Old(nn.Module):
    """What all generations share. `config` is what their files say of the model, `other` the fields we do not know."""

    native = "relu"  # the activation that a file need not name

    def __init__(
        self,
        n_layer: int,
        n_head: int,
        n_embd: int,
        block_size: int,
        vocab_size: int,
        *,
        activation: str | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        ffwd: str = "fwd",
        seed: int = 0,
        **other: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = {
            "batch_size": 5,
            "block_size": block_size,
            "vocab_size": vocab_size,
            "n_embd": n_embd,
            "n_head": n_head,
            "n_layer": n_layer,
            "dropout": dropout,
            "bias": bias,
            "device": "cpu",
            **({} if activation in (None, self.native) else {"activation": activation}),
            **other,
        }
        C = n_embd
        self.token_embedding_table = nn.Embedding(vocab_size, C)
        self.position_embedding_table = nn.Embedding(block_size, C)
        self.blocks = nn.Sequential(
            *[
                _Block(self._attention(), _FeedForward(C, activation or self.native, dropout), ffwd, C)
                for _ in range(n_layer)
            ]
        )
        self.ln_f = nn.LayerNorm(C)
        self.lm_head = nn.Linear(C, vocab_size)

    def _attention(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, T] to logits [B, T, V]."""
        positions = self.position_embedding_table(torch.arange(ids.shape[1]))
        return self.lm_head(self.ln_f(self.blocks(self.token_embedding_table(ids) + positions)))


class LectureGPT(_Old):
    """Generation (a): a key, query and value matrix for each head, and ReLU."""

    native = "relu"

    def __init__(self, *sizes: int, ffwd: str = "ffwd", **settings: Any) -> None:
        super().__init__(*sizes, ffwd=ffwd, **settings)

    def _attention(self) -> nn.Module:
        c = self.config
        return _HeadByHead(c["n_embd"], c["n_head"], c["block_size"], c["dropout"])


class FusedGPT(_Old):
    """Generation (b): one qkv matrix, and the exact GELU; `bias` is that of qkv and proj."""

    native = "gelu"

    def _attention(self) -> nn.Module:
        c = self.config
        return _AllHeads(c["n_embd"], c["n_head"], c["bias"], c["dropout"])


def fuse(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights, gradients or moments of either generation the names and layout of today (FORMATS, section 1).

    The rows of qkv are those of query, key and value, in this order, of each the rows of head 0, head 1, and so on.
    """
    fused = {}
    for name, tensor in tensors.items():
        layer, is_head, rest = name.partition(".sa.heads.")
        if not is_head:
            fused[name.replace(".ffwd.", ".fwd.")] = tensor
        elif rest == "0.query.weight":
            heads = range(sum(n.startswith(f"{layer}.sa.heads.") and n.endswith(".query.weight") for n in tensors))
            parts = [
                tensors[f"{layer}.sa.heads.{j}.{part}.weight"] for part in ("query", "key", "value") for j in heads
            ]
            fused[f"{layer}.sa.qkv.weight"] = torch.cat(parts)
    return fused


def rounded(model: _Old, dtype: torch.dtype = torch.bfloat16) -> _Old:
    """A copy whose weights went through a narrower type."""
    again = copy.deepcopy(model)
    with torch.no_grad():
        for p in again.parameters():
            p.copy_(p.to(dtype))
    return again


# Training


def adamw(model: nn.Module, *, groups: int = 1, named: bool = False, **settings: Any) -> torch.optim.AdamW:
    """The optimizer of the old programs: one group in the model's order, or two as nanoGPT makes them."""
    parameters = list(model.named_parameters())
    parts = [parameters]
    if groups == 2:
        parts = [[(n, p) for n, p in parameters if p.dim() >= 2], [(n, p) for n, p in parameters if p.dim() < 2]]
    decays = (settings.pop("weight_decay", 0.01), 0.0)
    made = [
        {"params": part if named else [p for _, p in part], "weight_decay": decay}
        for part, decay in zip(parts, decays, strict=False)
    ]
    return torch.optim.AdamW(made, **{"lr": 3e-3, **settings})


def batch(model: _Old, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and targets [2, T], a function of the seed."""
    T, V = model.config["block_size"], model.config["vocab_size"]
    ids = torch.randint(V, (2, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def trained(model: _Old, steps: int = 3, **settings: Any) -> torch.optim.AdamW:
    """Train for a few steps, so that weights and moments are real, and return the optimizer."""
    optimizer = adamw(model, **settings)
    for step in range(steps):
        ids, targets = batch(model, step)
        F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def aged(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer state as torch 1.8 wrote it: counts are plain numbers, groups have five settings."""
    old = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
    return {
        "state": {i: {**entry, "step": int(entry["step"])} for i, entry in state["state"].items()},
        "param_groups": [{key: group[key] for key in old} for group in state["param_groups"]],
    }


# Files


def write_single_file(
    path: Path,
    model: _Old,
    optimizer: torch.optim.Optimizer | dict[str, Any] | None = None,
    *,
    step: int | None,
    config: str = "dict",
    tokenizer: dict[str, Any] = TOKENIZER,
    prefix: str = "",
    stream: bool = False,
    training_config: dict[str, Any] | None = None,
    module: str = "gpt_of_then",
    location: str = "cpu",
) -> Path:
    """Write `latest.pt` or `final.pt`; the config is a "dict", a "namespace", or an "object" of a `module` that goes.

    `stream` is torch's format from before 1.6; a `step` of None is left out; `location` is where torch writes that the
    tensors were.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"model_state_dict": _prefixed(model, prefix), "tokenizer": tokenizer}
    if step is not None:
        content["step"] = step
    if optimizer is not None:
        content["optimizer_state_dict"] = _state(optimizer)
    if training_config is not None:
        content["training_config"] = training_config
    here = mock.patch("torch.serialization.location_tag", return_value=location)
    with _module_that_goes(module, model.config) as GPTConfig, here:
        forms = {"dict": dict, "namespace": argparse.Namespace, "object": GPTConfig}
        content["config"] = forms[config](**model.config)
        torch.save(content, path, _use_new_zipfile_serialization=not stream)
    return path


def write_old_bundle(
    folder: Path,
    model: _Old,
    optimizer: torch.optim.Optimizer | dict[str, Any] | None = None,
    *,
    step: int,
    wrapped: bool = False,
    checkpoint_dtype: str | None = None,
    prefix: str = "",
    training_config: dict[str, Any] | None = None,
) -> Path:
    """Write a folder of the first bundles; `wrapped` is the second layout of model.pt, which may be in "bf16"."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = _prefixed(model, prefix)
    state: dict[str, Any] = {"step": step}
    if wrapped:
        if checkpoint_dtype == "bf16":
            weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
        content = {"state_dict": weights, "checkpoint_dtype": checkpoint_dtype, "model_dtype": "float32"}
        state |= {"model_dtype_at_save": "float32", "checkpoint_dtype": checkpoint_dtype}
    else:
        content = weights
    if training_config is not None:
        state["training_config"] = training_config
    torch.save(content, folder / "model.pt")
    if optimizer is not None:
        torch.save(_state(optimizer), folder / "optimizer.pt")
        state["optimizer_file"] = "optimizer.pt"
    for name, values in {"config": model.config, "tokenizer": TOKENIZER, "training_state": state}.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2))
    return folder


def _prefixed(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    state = model.state_dict()
    for name in list(state) if prefix else ():
        state[prefix + name] = state.pop(name)
    return state


def _state(optimizer: torch.optim.Optimizer | dict[str, Any]) -> dict[str, Any]:
    return optimizer if isinstance(optimizer, dict) else optimizer.state_dict()


@contextlib.contextmanager
def _module_that_goes(name: str, fields: Mapping[str, Any]) -> Iterator[type]:
    """A module `name` with a dataclass GPTConfig, as it was when a file was written; afterwards there is none."""
    before = sys.modules.get(name)
    lines = ["from dataclasses import dataclass", "@dataclass", "class GPTConfig:"]
    lines += [f"    {field}: object = {value!r}" for field, value in fields.items()]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "then.py"
        source.write_text("\n".join(lines))
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None and spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        sys.modules[name] = made
        try:
            spec.loader.exec_module(made)
            yield made.GPTConfig
        finally:
            del sys.modules[name]
            if before is not None:
                sys.modules[name] = before
