"""The models: GPT here, GPTFlexAttention and GPTBatched from modded-nanogpt; mathematics, nothing about files.

Shapes: B batch, T positions, C n_embd, H heads, K heads of keys and values, D head size, V vocabulary.
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
from .networks.attention import Attention, masks_of, places_of
from .networks.batched import GPTBatched
from .networks.bound import bound, static_bound
from .networks.flex import GPTFlexAttention
from .networks.linear import Embedding, Linear
from .networks.modded import IGNORED, CastedLinear, TrainingScriptAttention, TrainingScriptBlock, TrainingScriptMLP
from .networks.norms import make_norm, normed
from .networks.rotary import Rotary, Rotation

if TYPE_CHECKING:
    from .data.tokenizer import Tokenizer
    from .networks.generation import Cache, LayerCache

__all__ = [
    "GPT",
    "CastedLinear",
    "GPTBatched",
    "GPTFlexAttention",
    "TrainingScriptAttention",
    "TrainingScriptBlock",
    "TrainingScriptMLP",
]


class ReluSquared(nn.Module):
    """The square of ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to each number of x."""
        return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "relu_squared": ReluSquared,
    "swiglu": nn.SiLU,
    "geglu": lambda: nn.GELU(approximate="tanh"),
}
"""What each kind of feed-forward computes in its middle, or of its gate."""


class FeedForward(nn.Module):
    """Two linear layers, wider in between, where a third may be a gate."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, wide, bias = config.n_embd, config.ffn_width, config.mlp_bias
        self.gate = Linear(C, wide, bias=bias) if config.is_gated else None
        activation = ACTIVATIONS[config.mlp_type or config.activation]()
        self.net = nn.Sequential(Linear(C, wide, bias=bias), activation, Linear(wide, C, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by itself: x [B, T, C] to [B, T, C]."""
        if self.gate is None:
            return self.net(x)
        up, activation, down = self.net
        return down(activation(self.gate(x)) * up(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to its input, or both to one; the config places the norms.

    ln1 and ln2 are before attention and feed-forward, or after the two sums; ln1_post and ln2_post before the sums.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()

        def norm(*placements: str) -> nn.Module | None:
            return make_norm(config, config.n_embd) if config.norm_placement in placements else None

        self.dropout = config.dropout
        self.normed_after = config.norm_placement == "after"
        self.is_parallel = config.parallel_residual
        self.shares_norm = config.shared_attention_norm
        self.ln1 = norm("before", "both", "after")
        self.sa = Attention(config)
        self.ln1_post = norm("after_sublayer", "both")
        self.ln2 = None if self.shares_norm else norm("before", "both", "after")
        self.fwd = FeedForward(config)
        self.ln2_post = norm("after_sublayer", "both")

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Apply the layer: x [B, T, C] to [B, T, C]."""
        if self.normed_after:
            x = normed(self.ln1, x + _drop(self.sa(x, cache, rotation, mask, window), self.dropout, self.training))
            return normed(self.ln2, x + _drop(self.fwd(x), self.dropout, self.training))
        y = normed(self.ln1, x)
        attended = normed(self.ln1_post, self.sa(y, cache, rotation, mask, window))
        attended = x + _drop(attended, self.dropout, self.training)
        if not self.is_parallel:
            x = attended
        y = y if self.shares_norm else normed(self.ln2, x)
        return attended + _drop(normed(self.ln2_post, self.fwd(y)), self.dropout, self.training)


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
        self.position_embedding_table = None
        if config.pos_encoding == "learned":
            self.position_embedding_table = Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config, config.n_embd)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        self.rotary = Rotary(config) if config.pos_encoding == "rotary" else None
        self.windows = config.windows
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

    def features(self, idx: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Compute the input of the head: ids idx [B, T] to [B, T, C], after the final norm.

        A cache holds earlier positions, which idx follows. `attention_mask` [B, T] is true at real ids: padding has no
        position and is not seen; what is computed for it means nothing.

        Raises: InputError when there are more positions than block_size.
        """
        start = 0 if cache is None else cache.length
        stop = start + idx.size(1)
        if stop > self.config.block_size:
            raise InputError(
                f"sequence: found {stop} positions, expected at most block_size {self.config.block_size}. "
                "Give fewer tokens at once."
            )
        real = None if attention_mask is None else attention_mask.to(idx.device, torch.bool)
        real = real if cache is None else cache.seen(real, idx)
        positions = None if real is None else places_of(real)[:, start:]
        x = self._embedded(idx, start, positions)
        rotation = None
        if self.rotary is not None:
            here = torch.arange(start, stop, device=idx.device) if positions is None else positions
            rotation = self.rotary.rotation(here)
        masks = masks_of(self.windows, start, stop, real, idx.device)
        for i, (block, window) in enumerate(zip(self.blocks, self.windows, strict=True)):
            x = block(x, None if cache is None else cache.layers[i], rotation, masks[window], window)
        if cache is not None:
            cache.length = stop
        return self.ln_f(x)

    def _embedded(self, idx: Tensor, start: int, positions: Tensor | None) -> Tensor:
        """Look up ids idx [B, T], with their positions if these are learned: [B, T, C]."""
        x = self.token_embedding_table(idx)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.position_embedding_table is not None:
            weight = self.position_embedding_table.weight
            x = x + (weight[start : start + idx.size(1)] if positions is None else F.embedding(positions, weight))
        return _drop(x, self.config.dropout, self.training)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.token_embedding_table.weight.device

    def make_cache(self, batch: int, room: int) -> Cache:
        """Allocate keys and values for `room` positions of `batch` sequences."""
        return generation.Cache(self.config, batch, room, self.token_embedding_table.weight)

    def logits(self, features: Tensor) -> Tensor:
        """Compute logits from features [..., C]: [..., V]."""
        logits = self.lm_head(features)
        cap = self.config.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the next ids: idx [B, T] to logits [B, T, V], with or without targets, and the mean loss with them.

        `attention_mask` [B, T] is true at real ids. Targets [B, T] that are -1 or where it is false are ignored.

        Raises: InputError when T is more than block_size.
        """
        logits = self.logits(self.features(idx, attention_mask=attention_mask))
        if targets is None:
            return logits, None
        if attention_mask is not None:
            targets = targets.masked_fill(~attention_mask.to(targets.device, torch.bool), IGNORED)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    # Methods of the public API that are not mathematics live elsewhere and are bound here.
    generate = generation.generate
    configure_optimizer = bound(".loading.optimizer", "configure_optimizer", __package__)
    load = static_bound(".kinds.model_methods", "load", __package__)
    load_legacy = static_bound(".kinds.model_methods", "load_legacy", __package__)
    save = bound(".kinds.model_methods", "save", __package__)
    save_checkpoint_bundle = bound(".kinds.model_methods", "save_checkpoint_bundle", __package__)
    _repr_html_ = bound(".kinds.notebook", "model_html", __package__)
    fit = bound(".training.fit", "fit", __package__)
