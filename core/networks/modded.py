"""The mathematics of modded-nanogpt models, once for all variants and for both layouts of their weights.

Shapes: B batch, T positions, C n_embd, H heads, D = 128 head size, h = H * D, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config.modded import GPT2_END, ModdedConfig
from ..config.variants import (
    BLOCK,
    HEAD_SIZE,
    VALUE_TABLES,
    WITHOUT_ATTENTION,
    Variant,
    is_long,
    skips_of,
    value_table,
    windows_of,
)
from ..console.commands import typed
from ..errors import CheckpointMismatch
from ..families.family import plain_names
from .windows import block_mask, compiled_flex, mask

SCALE = 0.12
"""The scale of attention scores, in place of 1 / sqrt(D)."""

IGNORED = -1
"""A target that the loss ignores."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Mixes the positions of one layer: its number, and q, k, v [B, H, T, D] to [B, H, T, D]."""

Turn = tuple[Tensor, Tensor]


def rms(x: Tensor) -> Tensor:
    """Divide the last axis by its root mean square; no weights, the epsilon of the dtype."""
    return F.rms_norm(x, (x.size(-1),))


def turn_of(positions: Tensor) -> Turn:
    """Cosine and sine of the rotary angles, fp32 [..., T, 1, D / 2] each; half of the frequencies are zero.

    The frequencies are (1/1024) ** linspace(0, 1, 32), and 32 zeros.
    """
    quarter = HEAD_SIZE // 4
    rates = (1 / 1024) ** torch.linspace(0, 1, steps=quarter, dtype=torch.float32, device=positions.device)
    angles = positions.to(torch.float32)[..., None] * torch.cat([rates, rates.new_zeros(quarter)])
    return angles.cos()[..., None, :], angles.sin()[..., None, :]


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Rotate q or k [B, T, H, D] by their positions, in fp32; the sign is the opposite of Hugging Face's."""
    cos, sin = turn
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).type_as(x)


@torch.no_grad()
def uniform(weight: Tensor) -> Tensor:
    """Fill a weight [..., C_in] as upstream does: uniform, with deviation 0.5 / sqrt(C_in); not on meta."""
    bound = math.sqrt(3) * 0.5 * weight.size(-1) ** -0.5
    return weight if weight.is_meta else weight.uniform_(-bound, bound)


@torch.no_grad()
def zero(weight: Tensor) -> None:
    """Fill a weight with zeros; not on meta."""
    if not weight.is_meta:
        weight.zero_()


class CastedLinear(nn.Linear):
    """A weight without bias, used in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Fill the weight; the model itself zeroes those that start at zero."""
        uniform(self.weight)


class Attention(nn.Module):
    """Attention of one layer, for any layout of its weights."""

    def __init__(self, config: ModdedConfig) -> None:
        super().__init__()
        self.variant: Variant = config.kind
        self.n_head = config.n_head

    def forward(
        self, x: Tensor, values: Tensor | None, mix: Tensor, turn: Turn, attend: Callable[..., Tensor]
    ) -> Tensor:
        """Mix positions: x [B, T, C] to [B, T, C]; mix [2] weighs the values and the value embeddings [B, T, C]."""
        B, T, _ = x.shape
        rows, out = self.weights()
        if self.variant.normed_input:
            x = rms(x)
        qkv = F.linear(x, rows.type_as(x)).view(B, T, 3, self.n_head, HEAD_SIZE)
        q, k, v = qkv.unbind(2)
        q, k = rotate(rms(q), turn), rotate(rms(k), turn)
        if self.variant.normed_values:
            v = rms(v)
        v = mix[0] * v if values is None else mix[0] * v + mix[1] * values.view_as(v)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return F.linear(y.transpose(1, 2).reshape(B, T, -1), out.type_as(x))

    def weights(self) -> tuple[Tensor, Tensor]:
        """The rows of queries, keys and values [3h, C], and the output projection [C, h]."""
        raise NotImplementedError


class MergedAttention(Attention):
    """The layout of medium: all four matrices in one parameter, [4, h, C], of which the last is `out`."""

    def __init__(self, config: ModdedConfig) -> None:
        super().__init__(config)
        self.qkvo_w = nn.Parameter(torch.empty(4, config.n_embd, config.n_embd))
        zero(uniform(self.qkvo_w)[3])

    def weights(self) -> tuple[Tensor, Tensor]:
        """Cut both from the one parameter."""
        return self.qkvo_w[:3].flatten(end_dim=1), self.qkvo_w[3]


class TrainingScriptAttention(Attention):
    """The layout of small: `qkv_w` [3, h, C] and the output projection as a layer; 2025-02 keeps its lambdas here."""

    def __init__(self, config: ModdedConfig) -> None:
        super().__init__(config)
        self.qkv_w = nn.Parameter(torch.empty(3, config.n_embd, config.n_embd))
        self.c_proj = CastedLinear(config.n_embd, config.n_embd)
        if config.variant == "small_2025_02":
            self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))
        uniform(self.qkv_w)
        zero(self.c_proj.weight)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Those of the parameter and of the layer."""
        return self.qkv_w.flatten(end_dim=1), self.c_proj.weight


class MLP(nn.Module):
    """Feed-forward of one layer, for any layout of its weights."""

    def __init__(self, config: ModdedConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by itself: x [B, T, C] to [B, T, C]."""
        first, second = self.weights()
        return F.linear(F.relu(F.linear(x, first.type_as(x))).square(), second.type_as(x))

    def weights(self) -> tuple[Tensor, Tensor]:
        """The first matrix [4C, C], and the second [C, 4C]."""
        raise NotImplementedError


class MergedMLP(MLP):
    """The layout of medium: bare parameters."""

    def __init__(self, config: ModdedConfig) -> None:
        super().__init__(config)
        self.fc_w = nn.Parameter(torch.empty(4 * config.n_embd, config.n_embd))
        self.proj_w = nn.Parameter(torch.zeros(config.n_embd, 4 * config.n_embd))
        uniform(self.fc_w)

    def weights(self) -> tuple[Tensor, Tensor]:
        """The parameters."""
        return self.fc_w, self.proj_w


class TrainingScriptMLP(MLP):
    """The layout of small: two layers."""

    def __init__(self, config: ModdedConfig) -> None:
        super().__init__(config)
        self.c_fc = CastedLinear(config.n_embd, 4 * config.n_embd)
        self.c_proj = CastedLinear(4 * config.n_embd, config.n_embd)
        zero(self.c_proj.weight)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Those of the layers."""
        return self.c_fc.weight, self.c_proj.weight


class Block(nn.Module):
    """One layer: attention, except in layer 7, then feed-forward, each added to a blend of the stream and its start."""

    attention: type[Attention] = MergedAttention
    feed_forward: type[MLP] = MergedMLP

    def __init__(self, config: ModdedConfig, i: int) -> None:
        super().__init__()
        self.attn = self.attention(config) if i != WITHOUT_ATTENTION else None
        self.mlp = self.feed_forward(config)

    def forward(
        self,
        x: Tensor,
        start: Tensor,
        values: Tensor | None,
        blend: Tensor,
        mix: Tensor | None,
        turn: Turn,
        attend: Callable[..., Tensor],
    ) -> Tensor:
        """Apply the layer: x [B, T, C] to [B, T, C]; blend [2] weighs the stream and its start."""
        x = blend[0] * x + blend[1] * start
        if self.attn is not None:
            x = x + self.attn(x, values, mix, turn, attend)
        return x + self.mlp(rms(x))


class TrainingScriptBlock(Block):
    """The layout of small; 2025-02 keeps the blend here."""

    attention = TrainingScriptAttention
    feed_forward = TrainingScriptMLP

    def __init__(self, config: ModdedConfig, i: int) -> None:
        super().__init__(config, i)
        if config.variant == "small_2025_02":
            self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))


class ModdedGPT(nn.Module):
    """The common part of GPTFlexAttention and GPTBatched: the stream through the layers, and the head.

    `window` is "exact" (the variant's last windows), "full" (plain causal attention) or the long window in blocks of
    128. The head has `vocab_size` rows rounded up to 128, unless `head_rows` says otherwise. Under
    `torch.device("meta")` nothing is allocated.

    `load_state_dict` takes a file of the program as it is: prefixes are stripped, and `scalars` padded for several
    ranks are cut; the cut tail is in `state_dict` again.
    """

    merged_always = False
    """Whether weights have the layout of medium regardless of what the variant computes."""

    def __init__(
        self,
        vocab_size: int,
        num_layers: int,
        num_heads: int,
        model_dim: int,
        max_seq_len: int,
        variant: str = "small",
        eos_token_id: int = GPT2_END,
        *,
        window: int | str = "exact",
        head_rows: int | None = None,
    ) -> None:
        super().__init__()
        rows = math.ceil(vocab_size / BLOCK) * BLOCK if head_rows is None else head_rows
        sizes = (vocab_size, rows, num_layers, num_heads, model_dim, max_seq_len)
        config = ModdedConfig(variant, *sizes, eos_token_id, window)
        merged = self.merged_always or variant == "medium"
        self.config = config
        self.variant = config.kind
        self.tokenizer: Any = None
        self.step = 0  # optimizer updates made
        self.gradient_checkpointing = False
        self.apart = config.variant == "small_2025_02" and not merged  # whether each module keeps its own scalars
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.value_embeds = nn.ModuleList(nn.Embedding(config.vocab_size, config.n_embd) for _ in range(VALUE_TABLES))
        block = Block if merged else TrainingScriptBlock
        self.blocks = nn.ModuleList(block(config, i) for i in range(config.n_layer))
        if merged:
            self.lm_head_w = nn.Parameter(torch.zeros(config.head_rows, config.n_embd))
        else:
            self.lm_head = CastedLinear(config.n_embd, config.head_rows)
            zero(self.lm_head.weight)
        if self.apart:
            self.skip_weights = nn.Parameter(torch.ones(config.n_layer // 2))
        else:
            self.scalars = nn.Parameter(start_scalars(config.n_layer))
        self.scalars_tail: Tensor | None = None
        self.register_load_state_dict_pre_hook(_take_apart)
        self.register_state_dict_post_hook(_put_together)

    @classmethod
    def of_config(cls, config: ModdedConfig) -> Self:
        """Build the model of a config."""
        sizes = (config.vocab_size, config.n_layer, config.n_head, config.n_embd, config.block_size)
        model = cls(*sizes, config.variant, config.eos_token_id, head_rows=config.head_rows)
        model.config = config
        return model

    @property
    def head(self) -> Tensor:
        """The weight of the head, [V, C]."""
        return self.lm_head_w if hasattr(self, "lm_head_w") else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embed.weight.device

    def _weights_of_layers(self) -> tuple[Any, list[Any], list[Any]]:
        """Skip weights, and for each layer its blend [2] and its mix of values [2], from where the layout has them."""
        if self.apart:
            attentions: list[Any] = [block.attn for block in self.blocks]
            mixes = [None if attn is None else attn.lambdas for attn in attentions]
            return self.skip_weights, [block.lambdas for block in self.blocks], mixes
        L = self.config.n_layer
        skips, blends, mixes = self.scalars.split([L, 2 * L, 2 * L])
        return skips, list(blends.view(L, 2)), list(mixes.view(L, 2))

    def stream(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run ids [B, T] at positions [T] or [B, T] through all layers: [B, T, C], after the final norm."""
        L = self.config.n_layer
        weights, blends, mixes = self._weights_of_layers()
        tables = [table(ids) for table in self.value_embeds]
        skips, turn = skips_of(self.variant, L), turn_of(positions)
        sources = {source for _, source in skips.values()}
        outputs: dict[int, Tensor] = {}
        x = start = rms(self.embed(ids))
        for i, block in enumerate(self.blocks):
            if i in skips:
                number, source = skips[i]
                x = x + weights[number] * outputs[source]
            values = None if (table := value_table(L, i)) is None else tables[table]
            inputs = (x, start, values, blends[i], mixes[i], turn, partial(attend, i))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
            if i in sources:
                outputs[i] = x
        return rms(x)

    def logits(self, features: Tensor) -> Tensor:
        """Compute logits from features [..., C], through the variant's soft cap: fp32 [..., V]."""
        raw = F.linear(features, self.head.type_as(features)).float()
        cap = self.variant.cap
        if self.variant.signed:
            return cap * raw * torch.rsqrt(raw.square() + cap**2)
        return cap * torch.sigmoid(raw / (7.5 * features.size(-1) ** 0.5))

    def attention(self, T: int, docs: Tensor | None, window: int | str, flex: bool, device: torch.device) -> Attend:
        """Make the attention of all layers over T positions, through the windows of a wish (`windows_of`).

        `docs` [T] has the document number of each position, None is one document. With `flex` it is compiled flex
        attention, for which T is a multiple of 128.
        """
        make: Callable[..., Any] = block_mask if flex else mask
        long, short = windows_of(self.variant, window)
        masks = {True: make(T, docs, long, device), False: make(T, docs, short, device)}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen = masks[self.is_long(layer)]
            if flex:
                return compiled_flex()(q, k, v, block_mask=seen, scale=SCALE)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=SCALE)

        return attend

    def is_long(self, i: int) -> bool:
        """Whether layer i has the long window."""
        return is_long(self.variant, self.config.n_layer, i)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean loss of logits [..., V] for targets [...]; those that are -1 are ignored."""
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def start_scalars(n_layer: int) -> Tensor:
    """The scalars of a new model [5L]: L skip weights (a U-net reads half), L blends, L mixes of values."""
    return torch.cat([torch.ones(n_layer), *([torch.tensor([1.0, 0.0])] * n_layer), torch.full((2 * n_layer,), 0.5)])


def _take_apart(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the entries of a state dict their plain names, and cut the tail of padded scalars."""
    if not prefix:  # only at the top: within another module, the names belong to that module
        for plain, name in plain_names(list(state)).items():
            state[plain] = state.pop(name)
    _refuse_other_layout(module, state, prefix)
    scalars = state.get(f"{prefix}scalars")
    if scalars is None or module.apart or scalars.dim() != 1:
        return
    size = module.scalars.numel()
    module.scalars_tail = scalars[size:].detach().clone() if len(scalars) > size else None
    state[f"{prefix}scalars"] = scalars[:size]


def _refuse_other_layout(module: Any, state: Mapping[str, Any], prefix: str) -> None:
    """Refuse matrices of layers none of which has a place here; with strict=False torch would fill none of them."""
    there = {name: value for name, value in state.items() if name.startswith(f"{prefix}blocks.")}
    matrices = [name for name, value in there.items() if isinstance(value, Tensor) and value.dim() > 1]
    own = [f"{prefix}{name}" for name, p in module.named_parameters() if name.startswith("blocks.") and p.dim() > 1]
    if matrices and not set(own).intersection(matrices):
        raise CheckpointMismatch(
            f"{type(module).__name__} ({module.config.variant}): the weights of its layers have the layout of "
            f"{own[0]}, and those given that of {matrices[0]}: none of them has a place, and nothing was loaded. "
            f"{typed('core.pretrained')}.load_pretrained_checkpoint(path) finds the layout of a file, and converts it."
        )


def _put_together(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put the tail of padded scalars back, so that the program that wrote it can read the state."""
    if module.scalars_tail is not None:
        name = f"{prefix}scalars"
        state[name] = torch.cat([state[name], module.scalars_tail.to(state[name])])
