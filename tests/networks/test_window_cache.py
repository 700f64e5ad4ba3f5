"""The cache of layers with a sliding window: it keeps the window, and computes what no cache computes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config.gpt import GPTConfig
from core.errors import InputError
from core.model import GPT
from core.networks import generation

SIZES = {"vocab_size": 17, "n_embd": 12, "n_head": 2, "n_kv_head": 1, "n_layer": 2, "dropout": 0.0}
EXACT = 1e-5  # of the largest logit


def make(window, block_size=64) -> GPT:
    """A model whose weights are far from neutral."""
    model = GPT(GPTConfig(**SIZES, block_size=block_size, sliding_window=window, pos_encoding="rotary"))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.4)
    return model.eval()


@settings(max_examples=60, deadline=None)
@given(
    window=st.sampled_from([1, 3, 7, 60, [2, None], [None, 5], [4, 9]]),
    slack=st.sampled_from([0, 1, 2, 5, 128]),
    padding=st.lists(st.integers(0, 9), min_size=0, max_size=2),
    parts=st.lists(st.sampled_from([1, 1, 1, 2, 5, 12]), min_size=1, max_size=24),
)
def test_any_division_into_calls_computes_what_one_call_without_a_cache_computes(window, slack, padding, parts):
    first, rows = max(padding, default=0) + parts[0], max(1, len(padding))
    lengths = [first, *(part for i, part in enumerate(parts) if i and first + sum(parts[1 : i + 1]) <= 64)]
    total = sum(lengths)
    model, ids = make(window), torch.randint(17, (rows, total), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(total) >= torch.tensor(padding)[:, None] if padding else None
    with torch.no_grad(), mock.patch.object(generation, "SLACK", slack):
        whole = model(ids, attention_mask=mask)[0]
        cache, found = model.make_cache(rows, total), []
        for part in ids.split(lengths, dim=1):
            real = mask[:, : part.size(1)] if mask is not None and not found else None
            found.append(model.features(part, cache=cache, attention_mask=real))
        logits = model.logits(torch.cat(found, 1))
    off = (logits - whole).abs().amax(-1)
    assert (off if mask is None else off[mask]).max() <= EXACT * whole.abs().max()


@pytest.mark.parametrize("window", [4, [4, None]])
def test_text_far_beyond_window_and_slack_is_that_without_a_cache(window):
    model = make(window, block_size=400)
    prompt = torch.randint(17, (2, 30), generator=torch.Generator().manual_seed(2))
    cached = model.generate(prompt, 2 * generation.SLACK, temperature=0)
    assert torch.equal(cached, model.generate(prompt, 2 * generation.SLACK, temperature=0, use_cache=False))


@pytest.mark.parametrize(
    ("window", "positions"), [(4, [132, 132]), ([None, 4], [1000, 132]), (None, [1000] * 2), (900, [1000, 1000])]
)
def test_a_layer_has_room_for_little_more_than_its_window(window, positions):
    model = make(window, block_size=1000)
    cache = model.make_cache(3, 1000)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(3, 1, room, 6) for room in positions]
    sizes = {layer.keys.untyped_storage().nbytes() for layer in cache.layers}
    assert sizes == {2 * 3 * room * 6 * 4 for room in positions}, "keys and values, and nothing else"
    with torch.no_grad():
        model.features(torch.zeros(3, 900, dtype=torch.int64), cache=cache)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(3, 1, room, 6) for room in positions]


def test_padding_after_an_id_is_refused_where_the_cache_would_forget_too_much():
    ids, mask = torch.zeros(1, 5, dtype=torch.int64), torch.tensor([[1, 1, 0, 1, 1]])
    said = "found padding after an id, expected padding before the ids"
    for window, room, is_refused in ((4, 300, True), (4, 100, False), (None, 300, False)):
        model = make(window, block_size=400)
        with torch.no_grad():
            cache = model.make_cache(1, room)
            if is_refused:
                with pytest.raises(InputError, match=said):
                    model.features(ids, cache=cache, attention_mask=mask)
                continue
            found = model.features(ids, cache=cache, attention_mask=mask)
            assert torch.equal(found, model.features(ids, attention_mask=mask))
