"""The models: GPT here, GPTFlexAttention and GPTBatched from modded-nanogpt; mathematics, nothing about files.

Shapes: B batch, T positions, C n_embd, H heads, D = C / H head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config.gpt import GPTConfig
from .errors import InputError
from .networks import generation
from .networks.batched import GPTBatched
from .networks.bound import bound, static_bound
from .networks.flex import GPTFlexAttention
from .networks.modded import IGNORED

if TYPE_CHECKING:
    from .data.tokenizer import Tokenizer
    from .networks.generation import Cache, LayerCache

__all__ = ["GPT", "GPTBatched", "GPTFlexAttention"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
}

# F.linear reads weights at 12 GB/s when it has few rows (MKL's gemm), this operator at 27 (oneDNN), of 34 that two
# cores can read at all. It is what torch.compile emits for a linear layer, and is missing in builds without oneDNN.
_FEW_ROWS = 32
_ONEDNN = torch.ops.mkldnn._linear_pointwise if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None


class Linear(nn.Linear):
    """nn.Linear that leaves initialisation to GPT and is fast for the few rows of a generation step."""

    def reset_parameters(self) -> None:
        """Do nothing: GPT initialises all weights at once, or takes them from a file."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., C_in]."""
        if (
            not torch.is_grad_enabled()
            and _ONEDNN is not None
            and x.numel() <= _FEW_ROWS * self.in_features
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.compiler.is_compiling()
        ):
            return _ONEDNN(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that leaves initialisation to GPT."""

    def reset_parameters(self) -> None:
        """Do nothing: GPT initialises all weights at once, or takes them from a file."""


class Attention(nn.Module):
    """Causal self-attention; the rows of qkv are q | k | v, each of them head by head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.scale = config.score_scale
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.has_proj_bias)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Mix positions: x [B, T, C] to [B, T, C]; a cache brings the keys and values of earlier positions."""
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(x).split(C, dim=-1))
        if cache is not None:
            k, v = cache.append(k, v)
        # With a cache, either it was empty (q and k cover the same positions) or there is one query that sees all keys.
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1, scale=self.scale)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(
            Linear(config.n_embd, 4 * config.n_embd, bias=config.mlp_bias),
            ACTIVATIONS[config.activation](),
            Linear(4 * config.n_embd, config.n_embd, bias=config.mlp_bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by itself: x [B, T, C] to [B, T, C]."""
        return self.net(x)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to its input; the norm stands before it or after the sum."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.normed_after = config.norm_placement == "after"
        self.ln1 = _norm(config)
        self.sa = Attention(config)
        self.ln2 = _norm(config)
        self.fwd = FeedForward(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Apply the layer: x [B, T, C] to [B, T, C]."""
        if self.normed_after:
            x = self.ln1(x + _drop(self.sa(x, cache), self.dropout, self.training))
            return self.ln2(x + _drop(self.fwd(x), self.dropout, self.training))
        x = x + _drop(self.sa(self.ln1(x), cache), self.dropout, self.training)
        return x + _drop(self.fwd(self.ln2(x)), self.dropout, self.training)


def _norm(config: GPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.norm_bias)


def _drop(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout that costs nothing where p is 0; F.dropout would still draw a mask."""
    return F.dropout(x, p) if training and p > 0 else x


class GPT(nn.Module):
    """A GPT whose config has every choice that weights of its family may need.

    Under `torch.device("meta")` nothing is allocated or initialised; the weights are then set by
    `load_state_dict(..., assign=True)` and `retie()`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.step = 0  # optimizer updates made
        self.token_embedding_table = Embedding(config.vocab_size, config.n_embd)
        self.position_embedding_table = Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = _norm(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        self.retie()
        if not self.token_embedding_table.weight.is_meta:
            self._initialise()

    def retie(self) -> None:
        """Make the head's weight the token embedding again where the config ties them; assignment separates them."""
        if self.config.tied_head:
            self.lm_head.weight = self.token_embedding_table.weight

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise as GPT-2: normal with deviation 0.02, less where a layer adds to the residual stream; biases 0.

        2 * n_layer layers add to it, so their deviation is divided by the root of that (GPT-2 paper, section 2.3).
        """
        residual = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=residual if name.endswith((".proj.weight", ".net.2.weight")) else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Compute the input of the head: ids idx [B, T] to [B, T, C], after the final norm.

        A cache holds earlier positions: idx follows them, and is one position long unless the cache is empty.

        Raises: InputError when there are more positions than block_size.
        """
        start = 0 if cache is None else cache.length
        stop = start + idx.size(1)
        if stop > self.config.block_size:
            raise InputError(
                f"sequence: found {stop} positions, expected at most block_size {self.config.block_size}. "
                "Give fewer tokens at once."
            )
        x = self.token_embedding_table(idx) + self.position_embedding_table.weight[start:stop]
        x = _drop(x, self.config.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.length = stop
        return self.ln_f(x)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.token_embedding_table.weight.device

    def make_cache(self, batch: int, room: int) -> Cache:
        """Allocate keys and values for `room` positions of `batch` sequences."""
        return generation.Cache(self.config, batch, room, self.token_embedding_table.weight)

    def logits(self, features: Tensor) -> Tensor:
        """Compute logits from features [..., C]: [..., V]."""
        return self.lm_head(features)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the next ids: idx [B, T] to logits [B, T, V], with or without targets, and the mean loss with them.

        Targets [B, T] that are -1 are ignored.

        Raises: InputError when T is more than block_size.
        """
        logits = self.logits(self.features(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    # Methods of the public API that are not mathematics live elsewhere and are bound here.
    generate = generation.generate
    configure_optimizer = bound(".loading.optimizer", "configure_optimizer", __package__)
    load = static_bound(".kinds.model_methods", "load", __package__)
    load_legacy = static_bound(".kinds.model_methods", "load_legacy", __package__)
    save = bound(".kinds.model_methods", "save", __package__)
    save_checkpoint_bundle = bound(".kinds.model_methods", "save_checkpoint_bundle", __package__)
    fit = bound(".training.fit", "fit", __package__)
