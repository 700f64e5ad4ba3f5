"""GPTBatched: a modded-nanogpt model over a batch of texts, for fine-tuning and generation.

Shapes: B texts, T positions, C n_embd, H heads, D head size, S room of a cache in positions, V rows of the head.

Every row is a document of its own. Internally, padding moves to the end of its row, where causal attention never sees
it: left padding, right padding and none compute the same, and attention needs no mask except that of the windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config.modded import ModdedConfig
from ..config.variants import BLOCK, HEAD_SIZE, WITHOUT_ATTENTION, windows_of
from ..errors import InputError
from . import generation
from .bound import bound
from .layout import as_medium
from .modded import IGNORED, SCALE, ModdedGPT
from .windows import cuts

if TYPE_CHECKING:
    from .flex import GPTFlexAttention


class BatchedCache:
    """Keys and values of all layers, [B, H, S, D] each; rows may hold different numbers of positions."""

    def __init__(self, model: GPTBatched, batch: int, room: int) -> None:
        config, weight = model.config, model.embed.weight
        shape = (2, batch, config.n_head, room, HEAD_SIZE)
        self.layers = [
            # Zeros: in rows that are shorter than the longest, masked slots are read, and NaN times 0 is NaN.
            torch.zeros(shape if i != WITHOUT_ATTENTION else 0, dtype=weight.dtype, device=weight.device)
            for i in range(config.n_layer)
        ]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.length = 0  # of the longest row

    def clear(self) -> None:
        """Forget every position, but keep the memory."""
        self.lengths.zero_()
        self.length = 0

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the keys and values [B, H, T, D] of the first positions of all rows."""
        self.layers[layer][:, :, :, : k.size(2)] = torch.stack([k, v])

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [B, H, 1, D] to each row at its own end; return those of all positions so far."""
        rows = torch.arange(len(k), device=k.device)
        self.layers[layer][:, rows, :, self.lengths] = torch.stack([k, v])[:, :, :, 0].transpose(0, 1)
        keys, values = self.layers[layer][:, :, :, : self.length + 1]
        return keys, values


class GPTBatched(ModdedGPT):
    """A modded-nanogpt model over tokens [B, T]; names follow the layout of medium, the config has the variant.

    `window` is "exact" (the variant's last windows), "full" (plain causal attention) or the long window in blocks.
    """

    merged_always = True

    @classmethod
    def from_pretrained_gpt(cls, flex: GPTFlexAttention, window: int | str | None = None) -> GPTBatched:
        """Build the model that computes what a GPTFlexAttention computes, from its weights in their dtype.

        The window is that of the other model unless given. Weights that have the same layout are shared, not copied.
        """
        wish = flex.config.window if window is None else window
        config = ModdedConfig.from_dict({**flex.config.to_dict(cls.__name__), "window": wish}, "config")
        with torch.device("meta"):
            model = cls.of_config(config)
        tensors = {name: tensor.detach() for name, tensor in flex.state_dict().items()}
        model.load_state_dict(as_medium(tensors, config.variant, config.n_layer), assign=True)
        model.requires_grad_(True)
        model.tokenizer, model.step = flex.tokenizer, flex.step
        return model.train(flex.training)

    @property
    def window(self) -> int | str:
        """The window of attention: "exact", "full", or blocks of 128 for the long layers."""
        return self.config.window

    @window.setter
    def window(self, wish: int | str) -> None:
        """Choose another window; the weights stay the same."""
        self.config = ModdedConfig.from_dict({**self.config.to_dict(type(self).__name__), "window": wish}, "window")

    def forward_features(
        self, tokens: Tensor, attention_mask: Tensor | None = None, cache: BatchedCache | None = None
    ) -> Tensor:
        """Compute the input of the head: tokens [B, T] to [B, T, C], after the final norm; zeros at padding.

        `attention_mask` [B, T] is true (or 1) at real tokens, anywhere in their row. A cache holds earlier
        positions: tokens then follow them, one per row, unless it is empty.

        Raises: InputError for other shapes, or more than max_seq_len positions.
        """
        if tokens.dim() != 2 or (attention_mask is not None and attention_mask.shape != tokens.shape):
            beside = "" if attention_mask is None else f" and a mask of {tuple(attention_mask.shape)}"
            raise InputError(f"tokens: found shape {tuple(tokens.shape)}{beside}, expected [B, T] for both.")
        stop = tokens.size(1) + (cache.length if cache is not None else 0)
        if stop > self.config.block_size:
            raise InputError(f"tokens: found {stop} positions, expected at most max_seq_len {self.config.block_size}.")
        if cache is not None and cache.length:
            return self._next(tokens, cache)
        if attention_mask is None:
            return self._all(tokens, cache, None)
        real = attention_mask.to(tokens.device, torch.bool)
        order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)  # real tokens first, in their order
        packed = self._all(tokens.gather(1, order), cache, real.sum(1))
        spread = torch.zeros_like(packed).scatter(1, order[..., None].expand_as(packed), packed)
        return spread * real[..., None]

    features = forward_features

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the next tokens: [B, T] to fp32 logits [B, T, V], and the mean loss for targets [B, T].

        Targets that are -1 or where the mask is 0 are ignored.
        """
        logits = self.logits(self.forward_features(tokens, attention_mask))
        if targets is None:
            return logits, None
        if attention_mask is not None:
            targets = targets.masked_fill(~attention_mask.to(targets.device, torch.bool), IGNORED)
        return logits, self.loss(logits, targets)

    def make_cache(self, batch: int, room: int) -> BatchedCache:
        """Allocate keys and values for `room` positions of `batch` rows."""
        return BatchedCache(self, batch, room)

    def _all(self, tokens: Tensor, cache: BatchedCache | None, lengths: Tensor | None) -> Tensor:
        """Compute all positions of rows whose padding, if any, is at their end."""
        T = tokens.size(1)
        window = self.config.window
        # Without a window that hides anything, SDPA has the fastest kernel; with one, flex attention skips blocks.
        flex = tokens.is_cuda and any(cuts(T, blocks) for blocks in windows_of(self.variant, window))
        if flex:
            tokens = F.pad(tokens, (0, -T % BLOCK))
        attend = self.attention(tokens.size(1), None, window, flex, tokens.device)

        def attend_and_fill(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is not None:
                cache.fill(layer, k[:, :, :T], v[:, :, :T])
            return attend(layer, q, k, v)

        features = self.stream(tokens, torch.arange(tokens.size(1), device=tokens.device), attend_and_fill)[:, :T]
        if cache is not None:
            cache.length = T
            cache.lengths.copy_(lengths if lengths is not None else torch.full_like(cache.lengths, T))
        return features

    def _next(self, tokens: Tensor, cache: BatchedCache) -> Tensor:
        """Compute one more position of each row, after those in the cache."""
        if tokens.size(1) != 1:
            raise InputError(f"tokens: found {tokens.size(1)} positions after a filled cache, expected 1.")
        at, keys = cache.lengths[:, None], torch.arange(cache.length + 1, device=tokens.device)
        masks = []
        for window in windows_of(self.variant, self.config.window):
            seen = keys <= at
            if window is not None:
                seen &= at // BLOCK - keys // BLOCK < window
            masks.append(seen[:, None, None])
        long, short = masks

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = cache.append(layer, k, v)
            seen = long if self.is_long(layer) else short
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE)

        features = self.stream(tokens, at, attend)
        cache.lengths += 1
        cache.length += 1
        return features

    generate = generation.generate
    save_checkpoint_bundle = bound("..kinds.model_methods", "save_checkpoint_bundle", __package__)


def batched(flex: GPTFlexAttention) -> GPTBatched:
    """The same model for batches and for generation: `GPTBatched.from_pretrained_gpt(flex)`."""
    return GPTBatched.from_pretrained_gpt(flex)
