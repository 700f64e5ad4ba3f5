"""Which position sees which: causal attention within a document, through windows of whole blocks.

Shapes: T positions, N = T / 128 blocks. The windows of modded-nanogpt take the nearest of the blocks that a block of
queries may see; since documents are runs of neighbouring positions, that is the same as "fewer than W blocks
back", which a test holds against the block lists of the original.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config.variants import BLOCK


def documents(ids: Tensor, eos_token_id: int) -> Tensor:
    """Number the document of each position: ids [T] to int64 [T]. The end-of-text token begins its document."""
    return (ids == eos_token_id).cumsum(0)


def sees(docs: Tensor | None, window: int | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """Make the rule by which query q sees key k, in the form that flex attention takes.

    `docs` [T] has the document number of each position, None is one document; `window` is in blocks, None for none.
    """

    def rule(batch: Any, head: Any, q: Tensor, k: Tensor) -> Tensor:
        seen = q >= k
        if docs is not None:
            seen = seen & (docs[q] == docs[k])
        if window is not None:
            seen = seen & (k // BLOCK + window > q // BLOCK)  # expanded, only booleans are [T, T]
        return seen

    return rule


def cuts(T: int, window: int | None) -> bool:
    """Whether a window hides anything of T positions."""
    return window is not None and window * BLOCK < T


def mask(T: int, docs: Tensor | None, window: int | None, device: torch.device) -> Tensor | None:
    """Expand the rule to bool [T, T] for SDPA; None where it is plain causal attention."""
    if not cuts(T, window):
        window = None
    if docs is not None and bool(docs[0] == docs[-1]):
        docs = None
    if docs is None and window is None:
        return None
    positions = torch.arange(T, device=device)
    return sees(docs, window)(None, None, positions[:, None], positions[None, :])


def block_mask(T: int, docs: Tensor | None, window: int | None, device: torch.device) -> Any:
    """Build the BlockMask of flex attention, which skips blocks that no query sees; T is a multiple of 128.

    Its block lists come from the first and last document of each block: [N, N] numbers, never [T, T].
    """
    from torch.nn.attention.flex_attention import BlockMask

    number = torch.arange(T // BLOCK, device=device)
    some = number[:, None] >= number
    if window is not None:
        some &= number[:, None] - number < window
    whole = some & (number[:, None] > number)
    if docs is not None:
        first, last = docs.view(-1, BLOCK)[:, 0], docs.view(-1, BLOCK)[:, -1]
        some &= first[:, None] <= last
        whole &= first == last[:, None]
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees(docs, window)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Turn bool [N, N] into the number of blocks per row [1, 1, N] and a list [1, 1, N, N] that begins with them."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """Flex attention, compiled at its first use: run eagerly, it ignores the block lists of a mask."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
