"""What modded-nanogpt computes, once more in NumPy: three variants, packed documents, block windows, loss.

Written from the description of the formats alone and sharing nothing with `core`, so that an agreement means
something. Slow and literal on purpose: masks are built block by block, heads one after the other.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 128
HEAD = 128  # the head size is not in the files: every variant fixes it
EPS = float(np.finfo(np.float32).eps)  # upstream's norms take the eps of the dtype they run in
TABLES = 3  # value embeddings
NO_ATTENTION = 7  # the eighth block has none

LAYERS = {"small": 12, "small_2025_02": 12, "medium": 16}
LONG = {"small": (0, 4, 7, 11), "small_2025_02": (0, 4, 7, 11), "medium": (0, 4, 11, 15)}
FINAL_WINDOW = {"small": 14, "small_2025_02": 14, "medium": 27}
MEDIUM_SKIPS = {9: 6, 10: 4, 11: 2}


@dataclass(frozen=True)
class Weights:
    """The matrices and numbers of one checkpoint as arrays, under one set of names for all variants."""

    variant: str
    heads: int
    tensors: dict[str, np.ndarray]
    skips: np.ndarray
    lambdas: np.ndarray  # [L, 2]: the stream, the first stream
    attention_lambdas: np.ndarray  # [L, 2]: values, value embeddings

    @property
    def layers(self) -> int:
        return LAYERS[self.variant]

    def attention(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(query, key, value as [3, h, D]; output as [out, in]). All square: no shape tells a transposition."""
        if self.variant == "medium":
            merged = self.tensors[f"blocks.{i}.attn.qkvo_w"]
            return merged[:3], merged[3]
        return self.tensors[f"blocks.{i}.attn.qkv_w"], self.tensors[f"blocks.{i}.attn.c_proj.weight"]

    def mlp(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if self.variant == "medium":
            return self.tensors[f"blocks.{i}.mlp.fc_w"], self.tensors[f"blocks.{i}.mlp.proj_w"]
        return self.tensors[f"blocks.{i}.mlp.c_fc.weight"], self.tensors[f"blocks.{i}.mlp.c_proj.weight"]


def weights_of(state: dict[str, torch.Tensor], variant: str, dtype: type = np.float64) -> Weights:
    """The arrays of a state dict: prefix off, padded scalars cut to five per layer."""
    arrays = {name.removeprefix("_orig_mod."): t.detach().float().numpy().astype(dtype) for name, t in state.items()}
    n = LAYERS[variant]
    if variant == "small_2025_02":
        skips = arrays["skip_weights"]
        lambdas = np.stack([arrays[f"blocks.{i}.lambdas"] for i in range(n)])
        idle = np.zeros(2, dtype)
        mixed = np.stack([arrays.get(f"blocks.{i}.attn.lambdas", idle) for i in range(n)])
    else:
        scalars = arrays["scalars"][: 5 * n]
        skips, lambdas, mixed = scalars[:n], scalars[n : 3 * n].reshape(n, 2), scalars[3 * n :].reshape(n, 2)
    return Weights(variant, arrays["embed.weight"].shape[1] // HEAD, arrays, skips, lambdas, mixed)


def documents(ids: np.ndarray, eos: int) -> np.ndarray:
    """The number of each token's document: the end-of-text token is the first of its document."""
    return np.cumsum(ids == eos)


def window_mask(ids: np.ndarray, eos: int, window: int | None) -> np.ndarray:
    """[T, T], True where a query sees a key: the block lists taken literally; None is causal within documents."""
    T = len(ids)
    docs = documents(ids, eos)
    allowed = (docs[:, None] == docs[None, :]) & (np.arange(T)[:, None] >= np.arange(T)[None, :])
    if window is None:
        return allowed
    seen = np.zeros((T, T), bool)
    # A tail shorter than a block ends its document where the text ends: nothing follows in it.
    spans = [slice(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]
    first, last = [docs[s][0] for s in spans], [docs[s][-1] for s in spans]
    for b, queries in enumerate(spans):
        full, partial = [], []
        for k in range(b, -1, -1):  # the nearest first
            if not (first[b] <= last[k] and last[b] >= first[k]):
                continue  # no document in common
            whole = k < b and first[b] == last[k] and last[b] == first[k]
            (full if whole else partial).append(k)
        chosen = full[: max(min(len(full), window - 1), 0)]
        chosen += partial[: min(len(partial), max(window - len(full), 1))]
        for k in chosen:
            seen[queries, spans[k]] = allowed[queries, spans[k]]
    return seen


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(EPS))


def rotary(x: np.ndarray) -> np.ndarray:
    """[T, HEAD] turned by position: half of the pairs turn, the other half stay."""
    quarter = HEAD // 4
    turning = np.float32(1 / 1024) ** np.linspace(0, 1, quarter, dtype=np.float32)
    rates = np.concatenate([turning, np.zeros(quarter, np.float32)])
    angle = np.arange(len(x), dtype=np.float32)[:, None] * rates[None, :]  # fp32 is part of what upstream computes
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    x1, x2 = x[:, : HEAD // 2], x[:, HEAD // 2 :]
    return np.concatenate([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], axis=1)


def attended(weights: Weights, i: int, x: np.ndarray, ve: np.ndarray | None, seen: np.ndarray) -> np.ndarray:
    """What the attention of block `i` adds to the stream."""
    qkv, out = weights.attention(i)
    source = x if weights.variant == "medium" else rms(x)
    s0, s1 = weights.attention_lambdas[i]
    heads = []
    for head in range(weights.heads):
        part = slice(head * HEAD, (head + 1) * HEAD)
        q, k, v = (source @ matrix[part].T for matrix in qkv)
        if weights.variant == "medium":
            v = rms(v)
        v = s0 * v + (0 if ve is None else s1 * ve[:, part])
        scores = 0.12 * (rotary(rms(q)) @ rotary(rms(k)).T)
        scores = np.where(seen, scores, -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append((weight / weight.sum(-1, keepdims=True)) @ v)
    return np.concatenate(heads, axis=1) @ out.T


def hidden(weights: Weights, ids: np.ndarray, eos: int, window: int | str | None = None) -> np.ndarray:
    """[T, D] after the last norm. `window`: blocks of the long layers, None the variant's last, "full" without."""
    blocks = FINAL_WINDOW[weights.variant] if window is None else window
    long = window_mask(ids, eos, None if blocks == "full" else blocks)
    short = window_mask(ids, eos, None if blocks == "full" else blocks // 2)
    n = weights.layers
    x = x0 = rms(weights.tensors["embed.weight"][ids])
    outputs: list[np.ndarray] = []
    for i in range(n):
        if weights.variant == "medium":
            if i in MEDIUM_SKIPS:
                x = x + weights.skips[MEDIUM_SKIPS[i]] * outputs[MEDIUM_SKIPS[i]]
        elif i >= n // 2:
            x = x + weights.skips[i - n // 2] * outputs[n - 1 - i]  # a U: the last pushed is the first taken
        table = i if i < TABLES else i - (n - TABLES)
        ve = weights.tensors[f"value_embeds.{table}.weight"][ids] if 0 <= table < TABLES else None
        x = weights.lambdas[i, 0] * x + weights.lambdas[i, 1] * x0
        if i != NO_ATTENTION:
            seen = long if i in LONG[weights.variant] else short
            x = x + attended(weights, i, x, ve, seen)
        fc, proj = weights.mlp(i)
        x = x + np.maximum(rms(x) @ fc.T, 0) ** 2 @ proj.T
        outputs.append(x)
    return rms(x)


def logits(weights: Weights, features: np.ndarray) -> np.ndarray:
    """[T, V] after the variant's soft cap."""
    if weights.variant == "medium":
        raw = features @ weights.tensors["lm_head_w"].T
        return 15 * raw / np.sqrt(raw * raw + 225)
    raw = features @ weights.tensors["lm_head.weight"].T
    return 30 / (1 + np.exp(-raw / (7.5 * np.sqrt(features.shape[1]))))


def loss(of: np.ndarray, targets: np.ndarray) -> float:
    """The mean cross entropy in nats."""
    shifted = of - of.max(-1, keepdims=True)
    chosen = shifted[np.arange(len(targets)), targets]
    return float((np.log(np.exp(shifted).sum(-1)) - chosen).mean())


def random_state(variant: str, heads: int = 1, vocab: int = 61, seed: int = 0) -> OrderedDict[str, torch.Tensor]:
    """A small checkpoint's "model" entry: upstream's names and dtypes, every number away from its start value."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * std).to(dtype)

    def around(start: list[float]) -> torch.Tensor:
        return torch.tensor(start) + 0.25 * torch.randn(len(start), generator=draw)

    D, n, bf16 = heads * HEAD, LAYERS[variant], torch.bfloat16
    padded = -(-vocab // 128) * 128
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    if variant != "small_2025_02":
        extra = [1.0] * (-5 * n % 8) if variant == "small" else []  # as eight ranks pad it
        state["scalars"] = torch.cat([around([1.0] * n + [1.0, 0.0] * n + [0.5, 0.5] * n), torch.tensor(extra)])
    else:
        state["skip_weights"] = around([1.0] * (n // 2))
    for name in ("embed", *(f"value_embeds.{i}" for i in range(TABLES))):
        state[f"{name}.weight"] = normal(vocab, D, std=1.0, dtype=bf16)
    for i in range(n):
        block = f"blocks.{i}"
        if variant == "medium":
            if i != NO_ATTENTION:
                state[f"{block}.attn.qkvo_w"] = normal(4, D, D, std=D**-0.5, dtype=bf16)
            state[f"{block}.mlp.fc_w"] = normal(4 * D, D, std=D**-0.5, dtype=bf16)
            state[f"{block}.mlp.proj_w"] = normal(D, 4 * D, std=0.1 * D**-0.5, dtype=bf16)
            continue
        if variant == "small_2025_02":
            state[f"{block}.lambdas"] = around([1.0, 0.0])
        if i != NO_ATTENTION:
            if variant == "small_2025_02":
                state[f"{block}.attn.lambdas"] = around([0.5, 0.5])
            state[f"{block}.attn.qkv_w"] = normal(3, D, D, std=D**-0.5)
            state[f"{block}.attn.c_proj.weight"] = normal(D, D, std=D**-0.5)
        state[f"{block}.mlp.c_fc.weight"] = normal(4 * D, D, std=D**-0.5)
        state[f"{block}.mlp.c_proj.weight"] = normal(D, 4 * D, std=0.1 * D**-0.5)
    if variant == "medium":
        state["lm_head_w"] = normal(padded, D, std=0.25)
    else:
        state["lm_head.weight"] = normal(padded, D, std=2.0)
    return state
