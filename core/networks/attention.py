"""Attention of a GPT, and which positions it sees.

Shapes: B batch, H heads, K heads of keys and values, T queries, S keys, C n_embd, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear
from .norms import make_norm, normed
from .rotary import LAYOUTS, Rotation

if TYPE_CHECKING:
    from ..config.gpt import GPTConfig
    from .generation import LayerCache


class Attention(nn.Module):
    """Causal self-attention; the rows of qkv are q | k | v, each of them head by head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_size = D = config.head_width
        self.widths = (config.n_head * D, config.kv_heads * D, config.kv_heads * D)
        self.n_kv_head = config.kv_heads
        self.is_grouped = config.kv_heads != config.n_head
        self.dropout = config.dropout
        self.scale = config.score_scale
        self.rotate = LAYOUTS[config.rotary_layout]
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention
        if config.attention_cap is not None:
            self.attend = partial(capped_attention, cap=config.attention_cap)
        self.qkv = Linear(config.n_embd, sum(self.widths), bias=config.bias)
        of_head, of_all = config.qk_norm == "head", config.qk_norm == "width"
        self.q_norm = make_norm(config, D) if of_head else None
        self.k_norm = make_norm(config, D) if of_head else None
        self.q_norm_wide = make_norm(config, self.widths[0]) if of_all else None
        self.k_norm_wide = make_norm(config, self.widths[1]) if of_all else None
        self.proj = Linear(self.widths[0], config.n_embd, bias=config.has_proj_bias)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Mix positions: x [B, T, C] to [B, T, C]; a cache brings the keys and values of earlier positions.

        Without a mask, attention is causal, or of one query to the keys of its window.
        """
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        q, k = normed(self.q_norm_wide, q), normed(self.k_norm_wide, k)
        q, k, v = (part.view(B, T, -1, self.head_size).transpose(1, 2) for part in (q, k, v))
        q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        if rotation is not None:
            q, k = self.rotate(q, rotation), self.rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
            mask = None if mask is None else mask[..., -k.size(2) :]  # a layer with a window keeps the last positions
        dropout = self.dropout if self.training else 0.0
        if T == 1:
            if window is not None and mask is None:
                k, v = k[:, :, -window:], v[:, :, -window:]
            if self.is_grouped:
                q = q.reshape(B, self.n_kv_head, -1, self.head_size)  # a group's queries see the same keys
        y = self.attend(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=T > 1 and mask is None,
            scale=self.scale,
            enable_gqa=self.is_grouped and T > 1,
        )
        y = y.transpose(1, 2) if T > 1 else y
        return self.proj(y.reshape(B, T, -1))


def places_of(real: Tensor) -> Tensor:
    """Count the real ids before each one: bool [B, S] to positions [B, S]; padding has that of a neighbour."""
    return (real.cumsum(1) - 1).clamp_(min=0)


def masks_of(
    windows: Iterable[int | None], start: int, stop: int, real: Tensor | None, device: torch.device
) -> dict[int | None, Tensor | None]:
    """Make the mask of queries start to stop over keys 0 to stop, for each window: bool [T, S] or [B, 1, T, S].

    None where the causal mask says all, or one query sees every key of its window. `real` [B, S] is false at padding.
    """
    made: dict[int | None, Tensor | None] = {}
    for window in set(windows):
        is_causal = start == 0 and (window is None or stop <= window)
        if real is None and (is_causal or stop - start == 1):
            made[window] = None
            continue
        key = torch.arange(stop, device=device)
        query = key[start:, None]
        seen = key <= query
        if window is not None:
            place = key if real is None else places_of(real)[:, None]
            seen = seen & (place[..., start:, None] - place[..., None, :] < window)
        if real is not None:
            # Padding sees itself: the softmax of nothing is NaN, and NaN times 0 is NaN in the next layer.
            seen = (seen & real[:, None, None]) | (key == query)
        made[window] = seen
    return made


def capped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
    cap: float,
) -> Tensor:
    """Compute F.scaled_dot_product_attention with scores of at most `cap`, by a tanh: q [B, H, T, D] to the same."""
    if enable_gqa:
        k, v = (part.repeat_interleave(q.size(1) // part.size(1), dim=1) for part in (k, v))
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * (scale / cap))
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout_p)
    return weights @ v
