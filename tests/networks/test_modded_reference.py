"""The models agree with the reference at any size, window and layout of documents; so do masks and kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.networks.windows import block_mask, mask
from tests.makers import modded_reference as reference
from tests.makers.modded_models import (
    END,
    HIDDEN,
    LOGITS,
    VARIANTS,
    VOCAB,
    apart,
    packed,
    random_batched,
    random_checkpoint,
    random_flex,
)

pytestmark = pytest.mark.usefixtures("one_thread")
each_variant = pytest.mark.parametrize("variant", VARIANTS)
few = {"deadline": None, "derandomize": True}

windows = st.sampled_from([1, 2, 3, 4, 6, None, "full"])


@st.composite
def layouts(draw, longest):
    """A number of positions, and where documents begin: the first need not begin with the end-of-text token."""
    length = draw(st.integers(1, longest))
    # Near the edges of blocks is where a wrong rule shows.
    edges = [edge for block in range(0, length, 128) for edge in (block - 1, block, block + 1) if 0 <= edge < length]
    return length, sorted(draw(st.sets(st.one_of(st.integers(0, length - 1), st.sampled_from(edges)), max_size=6)))


def computed(variant, heads, ids, window):
    weights = random_checkpoint(variant, heads)[1]
    features = reference.hidden(weights, ids.numpy(), END, window)
    return features, reference.logits(weights, features)


@each_variant
@settings(max_examples=3, **few)
@given(layout=layouts(400), window=windows, heads=st.sampled_from([1, 2]), seed=st.integers(0, 99))
@example(layout=(449, [0]), window=1, heads=1, seed=0)
@example(layout=(450, [40, 128, 300]), window=3, heads=2, seed=1)
@torch.no_grad()
def test_flex_attention_model_agrees_with_the_reference(variant, layout, window, heads, seed):
    ids = packed(*layout, seed)
    features, logits = computed(variant, heads, ids, window)
    model = random_flex(variant, heads)
    targets = ids.roll(-1)
    found, loss = model(ids, targets, window=window)
    assert apart(model.forward_features(ids, window=window), features) < HIDDEN
    assert apart(found, logits) < LOGITS
    assert loss.item() == pytest.approx(reference.loss(logits, targets.numpy()), rel=1e-5)


@each_variant
@settings(max_examples=2, **few)
@given(length=st.integers(1, 300), window=windows, seed=st.integers(0, 99))
@example(length=299, window=1, seed=0)
@torch.no_grad()
def test_batched_model_agrees_with_the_reference_on_a_document(variant, length, window, seed):
    ids = packed(length, (0,), seed)
    _, logits = computed(variant, 1, ids, window)
    model = random_batched(variant, window="exact" if window is None else window)
    found, loss = model(ids[None], ids.roll(-1)[None])
    assert apart(found[0], logits) < LOGITS
    assert loss.item() == pytest.approx(reference.loss(logits, ids.roll(-1).numpy()), rel=1e-5)


@each_variant
@torch.no_grad()
def test_the_last_windows_of_a_variant_cut_where_they_should(variant):
    """Without a wish the windows are 14 and 7 blocks (medium: 27 and 13): the first row that loses a key shows it."""
    short = {"medium": 13}.get(variant, 7)
    ids = packed(short * 128 + 100)
    model = random_flex(variant)
    last, full = model(ids)[0], model(ids, window="full")[0]
    edge = short * 128
    assert apart(last[:edge], full[:edge]) < LOGITS
    assert apart(last[edge:], full[edge:]) > 1e-2
    # 27 // 2 and 13 are the same, 14 // 2 and 7 too: named and numbered windows agree.
    assert torch.equal(model(ids, window=reference.FINAL_WINDOW[variant])[0], last)


def expanded(blocks: torch.nn.attention.flex_attention.BlockMask, T: int) -> np.ndarray:
    """What a kernel sees that takes a BlockMask literally: whole blocks unmasked, partial ones through the rule."""
    seen = np.zeros((T, T), bool)
    at = torch.arange(T)
    allowed = blocks.mask_mod(None, None, at[:, None], at[None, :]).numpy()
    for row in range(T // 128):
        queries = slice(row * 128, row * 128 + 128)
        whole = blocks.full_kv_indices[0, 0, row, : blocks.full_kv_num_blocks[0, 0, row]].tolist()
        partial = blocks.kv_indices[0, 0, row, : blocks.kv_num_blocks[0, 0, row]].tolist()
        assert len({*whole, *partial}) == len(whole) + len(partial), "a block is listed twice"
        for k in whole:
            seen[queries, k * 128 : k * 128 + 128] = True
        for k in partial:
            keys = slice(k * 128, k * 128 + 128)
            seen[queries, keys] = allowed[queries, keys]
    return seen


@settings(max_examples=40, **few)
@given(layout=layouts(1280), window=st.sampled_from([1, 2, 3, 4, 5, 7, 10, None]))
def test_masks_are_the_block_lists_taken_literally(layout, window):
    length, starts = layout[0] + -layout[0] % 128, layout[1]
    ids = packed(length, starts).numpy()
    literal = reference.window_mask(ids, END, window)
    docs = torch.from_numpy(reference.documents(ids, END))
    made = mask(length, docs, window, torch.device("cpu"))
    dense = np.tril(np.ones((length, length), bool)) if made is None else made.numpy()
    assert np.array_equal(dense, literal)
    assert np.array_equal(expanded(block_mask(length, docs, window, torch.device("cpu")), length), literal)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_literal_rule_keeps_the_nearest_blocks(window):
    """By hand: one document over five blocks; the last block of queries sees its own and window - 1 before it."""
    seen = reference.window_mask(packed(640).numpy(), END, window)
    assert seen[639].nonzero()[0].tolist() == list(range((5 - window) * 128, 640))
    assert seen[512].nonzero()[0].tolist() == list(range((5 - window) * 128, 513))


@pytest.mark.slow
@pytest.mark.full  # a compiler takes half a minute
@each_variant
@torch.no_grad()
def test_compiled_flex_attention_agrees_with_the_expanded_mask_on_a_cpu(variant):
    ids = packed(500, (0, 40, 128, 300))
    model = random_flex(variant)
    for window in (2, "full"):
        model.kernel = "sdpa"
        expected = model.forward_features(ids, window=window)
        model.kernel = "flex"
        assert apart(model.forward_features(ids, window=window), expected) < HIDDEN
    assert apart(model(ids, window=2)[0], computed(variant, 1, ids, 2)[1]) < LOGITS


def test_the_random_checkpoints_are_not_at_their_start():
    """A forgotten lambda or projection could not be seen where it is one or zero."""
    for variant in VARIANTS:
        state, weights = random_checkpoint(variant)
        assert all(tensor.float().std() > 0.005 for tensor in state.values())
        assert min(np.abs(part).min() for part in (weights.lambdas, weights.skips)) > 0
        assert state["embed.weight"].shape[0] == VOCAB
