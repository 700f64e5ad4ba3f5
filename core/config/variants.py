"""Variant: the differences in computation between three versions of modded-nanogpt, as data, without torch.

Taken from KellerJordan/modded-nanogpt: train_gpt.py of 2025-06 (commit 16e2da07) and of 2025-02 (587b45fb), and
train_gpt_medium.py (06743860).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

HEAD_SIZE = 128
"""Width of an attention head: fixed in the programs, and not in their files."""

BLOCK = 128
"""Positions in one block of an attention window."""

WITHOUT_ATTENTION = 7
"""The one layer that is a feed-forward only."""

VALUE_TABLES = 3
"""Tables of value embeddings: the first three layers read them in turn, and the last three again."""


@dataclass(frozen=True, eq=False, repr=False)
class Variant:
    """One version of the program: everything in which the same weights compute something else in another version."""

    name: str
    program: str  # its name in the line `Format:`
    normed_input: bool  # whether attention reads the normed stream, or the stream as it is
    normed_values: bool  # whether values are normed like queries and keys
    skips: Mapping[int, int] | None  # layer: the layer whose output it adds; None is a U-net
    cap: float  # no logit is larger than this
    signed: bool  # whether logits are from -cap to cap, or from 0
    long_layers: tuple[int, ...]  # of the depth that upstream has; the others see half of the window
    depth: int  # layers that upstream has
    window: int  # of the long layers at the end of training, in blocks
    short_window: int  # of the others
    muon_rate: float  # learning rate of the matrices
    adam_rates: Mapping[str, float] = field(default_factory=dict)  # of head, embeddings and scalars
    weight_decay: float = 0.0  # of the matrices
    mlp_decay: float = 1.0  # times that, of the matrices of feed-forwards
    coefficients: tuple[tuple[float, float, float], ...] = ((3.4445, -4.7750, 2.0315),) * 5  # of Muon's iteration


SMALL = Variant(
    name="small",
    program="small (from train_gpt_small.py)",
    normed_input=True,
    normed_values=False,
    skips=None,
    cap=30.0,
    signed=False,
    long_layers=(0, 4, 7, 11),
    depth=12,
    window=14,
    short_window=7,
    muon_rate=0.05,
    adam_rates={"head": 0.22, "embed": 0.6, "scalar": 0.04},
)
SMALL_2025_02 = replace(SMALL, name="small_2025_02", program="small (from train_gpt_small.py of 2025-02)")
MEDIUM = Variant(
    name="medium",
    program="medium (from train_gpt_medium.py)",
    normed_input=False,
    normed_values=True,
    skips={9: 6, 10: 4, 11: 2},
    cap=15.0,
    signed=True,
    long_layers=(0, 4, 11, 15),
    depth=16,
    window=27,
    short_window=13,
    muon_rate=0.025,
    adam_rates={"head": 1 / 320, "embed": 0.3, "scalar": 0.015},
    weight_decay=0.01,
    mlp_decay=2.0,
    coefficients=(
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
)

VARIANTS = {variant.name: variant for variant in (SMALL, SMALL_2025_02, MEDIUM)}


def skips_of(variant: Variant, n_layer: int) -> dict[int, tuple[int, int]]:
    """Which layers add an earlier output first: {layer: (its weight among the skip weights, the layer it adds)}."""
    if variant.skips is not None:
        return {i: (source, source) for i, source in variant.skips.items() if i < n_layer}
    half = n_layer // 2
    return {i: (i - half, n_layer - 1 - i) for i in range(half, n_layer)}


def value_table(n_layer: int, i: int) -> int | None:
    """Which table of value embeddings layer i reads; None for those in the middle."""
    if i < VALUE_TABLES:
        return i
    return i - (n_layer - VALUE_TABLES) if i >= n_layer - VALUE_TABLES else None


def is_long(variant: Variant, n_layer: int, i: int) -> bool:
    """Whether layer i has the long window; at another depth than upstream's, the layers at the same share of it."""
    last = variant.depth - 1
    return i in {round(long * (n_layer - 1) / last) for long in variant.long_layers}


def windows_of(variant: Variant, wish: int | str | None) -> tuple[int | None, int | None]:
    """The long and the short window in blocks: the variant's last ones, others, or None for plain causal attention.

    A number is the long window; the short one is half of it, as upstream halves it while windows grow.
    """
    if wish == "full":
        return None, None
    if isinstance(wish, int):
        return wish, max(1, wish // 2)
    return variant.window, variant.short_window
