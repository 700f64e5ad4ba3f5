"""A batch computes what its rows compute alone: padding, cache, checkpointing and windows change no result."""

from __future__ import annotations

import pytest
import torch

from core.errors import InputError
from core.networks.generation import sample
from tests.makers.modded_models import END, VARIANTS, VOCAB, apart, packed, random_batched, random_flex

pytestmark = pytest.mark.usefixtures("one_thread")
each_variant = pytest.mark.parametrize("variant", VARIANTS)

SAME = 1e-5  # fp32: the same numbers, added up in another order
LENGTHS = (150, 1, 210)


def rows() -> list[torch.Tensor]:
    return [packed(length, (0,), seed) for seed, length in enumerate(LENGTHS)]


def padded(texts, side, filler):
    """Tokens and mask [B, T]; padding is ids drawn by `filler`, real ones among them."""
    longest = max(map(len, texts)) + 3  # no row without padding
    tokens = torch.randint(0, VOCAB, (len(texts), longest), generator=torch.Generator().manual_seed(filler))
    real = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        first = {"left": longest - len(text), "right": 0}.get(side)
        at = (
            torch.arange(len(text)) + first
            if first is not None
            else torch.randperm(longest, generator=torch.Generator().manual_seed(row))[: len(text)].sort().values
        )
        tokens[row, at], real[row, at] = text, True
    return tokens, real


@pytest.mark.parametrize(("variant", "window"), [*((variant, 1) for variant in VARIANTS), ("small", "exact")])
@torch.no_grad()
def test_padding_on_any_side_changes_no_logit(variant, window):
    model, texts = random_batched(variant, window=window), rows()
    alone = [model(text[None])[0][0] for text in texts]
    for side in ("left", "right", "scattered"):
        tokens, real = padded(texts, side, filler=1)
        logits, _ = model(tokens, attention_mask=real.long() if side == "left" else real)
        for row, expected in enumerate(alone):
            assert apart(logits[row, real[row]], expected) < SAME, (side, row)


@each_variant
@torch.no_grad()
def test_what_the_padding_holds_changes_nothing(variant):
    model, texts = random_batched(variant, window=1), rows()
    for side in ("left", "right"):
        features, losses = [], []
        for filler in range(3):
            tokens, real = padded(texts, side, filler)
            targets = torch.full_like(tokens, filler)  # ids at padding too: the mask says what counts
            targets[real] = torch.cat([text.roll(-1) for text in texts])
            found = model.forward_features(tokens, attention_mask=real)
            assert not found[~real].any()
            features.append(found[real])
            losses.append(model(tokens, targets, attention_mask=real)[1].item())
        assert all(torch.equal(features[0], other) for other in features)
        counted = torch.nn.functional.cross_entropy(model.logits(features[0]), targets[real])
        assert losses == pytest.approx([counted.item()] * 3, rel=1e-6)


@torch.no_grad()
def test_no_id_is_taken_for_padding_or_for_an_end():
    """Id 0 and the end-of-text id are tokens like others inside a row: a row is one document."""
    model = random_batched("small")
    ids = packed(60, (0, 30), 5)
    ids[[10, 20]] = 0
    whole = model(ids[None])[0][0]
    changed = ids.clone()
    changed[0] = END + 1
    assert apart(whole[31:], model(changed[None])[0][0, 31:]) > 1e-2, "what follows an end does not see what was before"
    assert apart(whole[:10], model(ids[None, :10])[0][0]) < SAME


@each_variant
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cached_generation_equals_uncached_beyond_the_windows(variant, temperature):
    model = random_batched(variant, window=1)  # one block, so both windows cut from position 128 on
    prompt = packed(250, (0,), 7)
    settings = {"temperature": temperature, "seed": 11}
    cached = model.generate(prompt, 20, **settings)  # over the edge of a block at 256
    assert cached.tolist() == model.generate(prompt, 20, use_cache=False, **settings).tolist()
    assert len(set(cached[250:].tolist())) > 2


@each_variant
@torch.no_grad()
def test_three_hundred_cached_tokens_are_those_of_one_forward_pass(variant):
    """By induction the same as generating without a cache, in one pass instead of three hundred."""
    model, settings = random_batched(variant, window=1), {"temperature": 3.0}
    text = model.generate(packed(5, (0,), 8), 300, seed=2, **settings)
    logits, _ = model(text[None])
    draws = torch.Generator().manual_seed(2)
    expected = [int(sample(logits[:, i, :VOCAB], generator=draws, **settings)) for i in range(4, 304)]
    assert text[5:].tolist() == expected
    assert len(set(text[-128:].tolist())) > 20, "a text that repeats itself shows little"


@pytest.fixture
def nan_in_new_memory():
    """Memory that nobody has written to holds NaN, as it may at any time."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@each_variant
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_several_lengths_continue_as_each_alone(variant, use_cache, nan_in_new_memory):
    model = random_batched(variant, window=1)
    texts = [packed(length, (0,), length) for length in (120, 9, 133)]
    alone = [model.generate(text, 12, temperature=0)[len(text) :].tolist() for text in texts]
    for side in ("left", "right"):
        tokens, real = padded(texts, side, filler=2)
        together = model.generate(tokens, 12, temperature=0, attention_mask=real, use_cache=use_cache)
        assert together[:, -12:].tolist() == alone


def gradients(model, *inputs, **settings) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(*inputs, **settings)[1].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@each_variant
def test_gradient_checkpointing_gives_equal_gradients(variant):
    model = random_batched(variant, window=1)
    tokens, real = padded(rows(), "right", 0)
    expected = gradients(model, tokens, tokens.roll(-1, 1), attention_mask=real)
    model.gradient_checkpointing = True
    found = gradients(model, tokens, tokens.roll(-1, 1), attention_mask=real)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def as_medium(name: str, found: dict[str, torch.Tensor], layers: int) -> torch.Tensor:
    """What a parameter of GPTBatched is made of, under the names of the small layouts."""
    if name in found:
        return found[name]
    if name == "lm_head_w":
        return found["lm_head.weight"]
    if name == "scalars":  # 2025-02: half of the skips, and nothing for the block without attention
        blends = [found[f"blocks.{i}.lambdas"] for i in range(layers)]
        mixes = [found.get(f"blocks.{i}.attn.lambdas", torch.zeros(2)) for i in range(layers)]
        return torch.cat([found["skip_weights"], torch.zeros(layers // 2), *blends, *mixes])
    block = name.rpartition(".")[0]
    if name.endswith("qkvo_w"):
        return torch.cat([found[f"{block}.qkv_w"], found[f"{block}.c_proj.weight"][None]])
    return found[f"{block}.{'c_fc' if name.endswith('fc_w') else 'c_proj'}.weight"]


@each_variant
def test_gradients_are_those_of_the_flex_attention_model(variant):
    ids = packed(200, (0,), 3)
    flex, batched = random_flex(variant), random_batched(variant, window=1)
    flex.kernel = "sdpa"
    theirs = gradients(flex, ids, ids.roll(-1), window=1)
    ours = gradients(batched, ids[None], ids.roll(-1)[None])
    assert ours.keys() == dict(batched.named_parameters()).keys()
    for name, found in ours.items():
        expected = as_medium(name, theirs, flex.config.n_layer)
        assert expected.abs().max() > 0, name
        assert apart(found, expected) < 1e-4 * expected.abs().max().item(), name


@pytest.mark.parametrize(("variant", "edge"), [("small", 7 * 128), ("small_2025_02", 7 * 128), ("medium", 13 * 128)])
@torch.no_grad()
def test_full_attention_is_exact_up_to_the_short_window(variant, edge):
    model = random_batched(variant)
    tokens = packed(edge + 20, (0,), 4)[None]
    exact = model.forward_features(tokens)
    model.window = "full"
    full = model.forward_features(tokens)
    assert apart(exact[:, :edge], full[:, :edge]) < 2e-5
    assert apart(exact[:, edge:], full[:, edge:]) > 1e-3


def test_an_unknown_kernel_is_refused():
    model = random_flex("small")
    model.kernel = "flash"
    with pytest.raises(InputError) as caught:
        model(packed(20, (0,), 1))
    assert str(caught.value) == "kernel: found 'flash', expected auto, flex, sdpa."


def test_wrong_shapes_are_refused_by_name():
    model = random_batched("small")
    with pytest.raises(InputError, match="tokens: found shape \\(5,\\)"):
        model(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(InputError, match="mask of \\(1, 4\\)"):
        model(torch.zeros(1, 5, dtype=torch.int64), attention_mask=torch.ones(1, 4))
    with pytest.raises(InputError, match="at most max_seq_len 2048"):
        model(torch.zeros(1, 2049, dtype=torch.int64))
    cache = model.make_cache(1, 8)
    model.forward_features(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(InputError, match="found 2 positions after a filled cache, expected 1"):
        model.forward_features(torch.zeros(1, 2, dtype=torch.int64), cache=cache)


def test_packed_ids_of_another_shape_or_too_many_are_refused():
    model = random_flex("small")
    with pytest.raises(InputError, match=r"ids: found shape \(1, 4\), expected one packed sequence"):
        model(torch.zeros(1, 4, dtype=torch.int64))
    model.config.block_size = 3
    with pytest.raises(InputError, match="ids: found 4 positions, expected at most max_seq_len 3"):
        model(torch.zeros(4, dtype=torch.int64))


def test_the_window_is_that_of_the_config_and_may_be_another():
    model = random_batched("small")
    assert model.window == model.config.window == "exact"
    model.window = "full"
    assert model.window == model.config.window == "full"
