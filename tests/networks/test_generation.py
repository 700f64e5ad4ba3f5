"""Generation: the cache changes nothing but the time, the window moves by halves, and draws follow the distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config.gpt import GPTConfig
from core.data.tokenizer import CharTokenizer, Gpt2Tokenizer
from core.errors import InputError
from core.model import GPT
from core.networks.generation import sample, start_ids, stream

VOCAB, BLOCK = 29, 16


def make(**fields) -> GPT:
    torch.manual_seed(1)
    model = GPT(
        GPTConfig(**{"block_size": BLOCK, "vocab_size": VOCAB, "n_embd": 32, "n_head": 4, "n_layer": 3} | fields)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return make()


@pytest.fixture(scope="module")
def speaker() -> GPT:
    """A model with a tokenizer of 26 letters and the line's end, and two rows of padding."""
    made = make()
    made.tokenizer = CharTokenizer(list("\nabcdefghijklmnopqrstuvwxyz"))
    return made


DRAWS = [{"temperature": 0.0}, {"seed": 3}, {"seed": 3, "top_k": 4}, {"seed": 3, "top_p": 0.7, "temperature": 1.5}]


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize("length", [1, 5, BLOCK, 40])
def test_cached_and_uncached_tokens_are_equal(model, draw, length):
    prompt = torch.randint(VOCAB, (2, length))
    cached = model.generate(prompt, 3 * BLOCK, **draw)
    assert cached.shape == (2, length + 3 * BLOCK)
    assert torch.equal(cached[:, :length], prompt)
    assert torch.equal(cached, model.generate(prompt, 3 * BLOCK, use_cache=False, **draw))


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_tiny_windows_work(block_size):
    model = make(block_size=block_size)
    cached = model.generate([4], 12, seed=0)
    assert len(cached) == 13
    assert cached == model.generate([4], 12, seed=0, use_cache=False)


def test_cached_features_are_close_at_every_position(model):
    ids = torch.randint(VOCAB, (2, BLOCK))
    with torch.inference_mode():
        model.eval()
        cache = model.make_cache(2, BLOCK)
        steps = [model.features(ids[:, :5], cache)] + [
            model.features(ids[:, t : t + 1], cache) for t in range(5, BLOCK)
        ]
        torch.testing.assert_close(torch.cat(steps, dim=1), model.features(ids), atol=1e-5, rtol=1e-5)


def test_a_full_window_drops_its_older_half(model):
    """By hand: the likeliest id from the whole context until it is full, then from its newer half, growing again."""
    model.eval()
    ids, start = [7, 3], 0
    for _ in range(2 * BLOCK):
        if len(ids) - start > BLOCK:
            start = len(ids) - BLOCK // 2
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[start:]]))[0][0, -1].argmax()))
    assert model.generate([7, 3], 2 * BLOCK, temperature=0.0) == ids


def test_the_window_rule_computes_a_long_pass_once_per_half(model, monkeypatch):
    widths = []
    plain = model.features
    monkeypatch.setattr(model, "features", lambda idx, cache=None: (widths.append(idx.size(1)), plain(idx, cache))[1])
    model.generate([1] * BLOCK, BLOCK + 1, temperature=0.0)
    half = BLOCK // 2
    assert widths == ([BLOCK, half] + [1] * half + [half] + [1] * half)[: BLOCK + 1]


def test_a_prompt_longer_than_the_window_is_read_from_its_end(model):
    long = torch.randint(VOCAB, (1, 3 * BLOCK))
    tail = model.generate(long[:, -BLOCK:], 5, temperature=0.0)[:, BLOCK:]
    assert torch.equal(model.generate(long, 5, temperature=0.0)[:, 3 * BLOCK :], tail)


def test_rows_of_a_batch_do_not_mix(model):
    prompt = torch.randint(VOCAB, (3, 6))
    together = model.generate(prompt, 20, temperature=0.0)
    for row, alone in zip(together, prompt, strict=True):
        assert torch.equal(row, model.generate(alone, 20, temperature=0.0))


def test_stream_yields_what_generate_returns(model):
    assert list(stream(model, [5, 6], 30, seed=9)) == model.generate([5, 6], 30, seed=9)[2:]


def test_stream_yields_each_id_before_the_next_is_computed(model, monkeypatch):
    passes = []
    plain = model.features
    monkeypatch.setattr(model, "features", lambda idx, cache=None: (passes.append(1), plain(idx, cache))[1])
    ids = stream(model, [5], 30, seed=9)
    next(ids)
    assert len(passes) == 1
    next(ids)
    assert len(passes) == 2
    ids.close()


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_left_as_found(training):
    model = make(dropout=0.5).train(training)
    model.generate([1], 3, seed=0)
    assert model.training is training and model.blocks[0].training is training
    ids = stream(model, [1], 3, seed=0)
    next(ids)
    assert not model.training
    ids.close()
    assert model.training is training


def test_global_random_state_is_untouched(model):
    before = torch.get_rng_state()
    model.generate([1], 8)
    model.generate([1], 8, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_decides_and_without_one_texts_differ(model):
    assert model.generate([1], 20, seed=4) == model.generate([1], 20, seed=4)
    assert model.generate([1], 20, seed=4) != model.generate([1], 20, seed=5)
    assert model.generate([1], 20) != model.generate([1], 20)


def test_a_generator_goes_on_where_it_was(model):
    generator = torch.Generator().manual_seed(4)
    first, second = (model.generate([1], 20, generator=generator) for _ in range(2))
    assert first == model.generate([1], 20, seed=4) != second


def test_the_result_can_be_trained_on(model):
    ids = model.generate(torch.tensor([[1, 2]]), 5, seed=0)
    assert not ids.is_inference()
    loss = model(ids[:, :-1], ids[:, 1:])[1]
    loss.backward()
    assert loss.isfinite()
    model.zero_grad()


@pytest.mark.parametrize("prompt", [[3, 4], torch.tensor([3, 4]), torch.tensor([[3, 4]], dtype=torch.int32)])
def test_result_is_of_the_prompts_kind(model, prompt):
    result = model.generate(prompt, 6, temperature=0.0)
    assert type(result) is type(prompt)
    if isinstance(prompt, torch.Tensor):
        assert result.dtype == prompt.dtype and result.shape == (*prompt.shape[:-1], 8)
    assert torch.as_tensor(result).flatten().tolist() == model.generate([3, 4], 6, temperature=0.0)


@pytest.mark.parametrize("prompt", ["ab", [3, 4], torch.tensor([[3, 4]])])
def test_no_new_tokens_returns_the_prompt(speaker, prompt):
    result = speaker.generate(prompt, 0)
    assert torch.equal(result, prompt) if isinstance(prompt, torch.Tensor) else result == prompt


def test_text_begins_with_the_prompt(speaker):
    text = speaker.generate("hello", 40, seed=2)
    ids = speaker.generate(speaker.tokenizer.encode("hello").tolist(), 40, seed=2)
    assert text == speaker.tokenizer.decode(ids)
    assert text.startswith("hello") and len(text) == 45


def test_empty_text_starts_after_a_lines_end(speaker):
    assert "\n" + speaker.generate("", 20, seed=2) == speaker.generate("\n", 20, seed=2)


def test_start_ids_of_each_tokenizer():
    assert start_ids(Gpt2Tokenizer()) == [50256]
    assert start_ids(CharTokenizer(["a", "\n"])) == [1]
    assert start_ids(CharTokenizer(["a", "b"])) == [0]


def test_padding_rows_are_never_drawn(speaker):
    with torch.no_grad():
        speaker.lm_head.bias[27:] = 1e4
    try:
        drawn = speaker.generate(torch.zeros(50, 1, dtype=torch.int64), 10, seed=0)
        likeliest = speaker.generate([1], 10, temperature=0.0)
    finally:
        with torch.no_grad():
            speaker.lm_head.bias[27:] = 0
    assert drawn.max() < 27 and max(likeliest) < 27


WRONG = [
    ({"temperature": -1.0}, r"temperature: found -1\.0"),
    ({"temperature": float("nan")}, r"temperature: found nan"),
    ({"temperature": float("inf")}, r"temperature: found inf"),
    ({"top_k": 0}, r"top_k: found 0, expected at least 1"),
    ({"top_p": 0.0}, r"top_p: found 0\.0"),
    ({"top_p": 1.5}, r"top_p: found 1\.5"),
    ({"max_new_tokens": -2}, r"max_new_tokens: found -2"),
]


@pytest.mark.parametrize(("setting", "message"), WRONG, ids=lambda x: str(x))
def test_wrong_settings_are_named(model, setting, message):
    with pytest.raises(InputError, match=message):
        model.generate([1], **{"max_new_tokens": 5} | setting)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"found ids of shape \(1, 0\)"),
        ([1, VOCAB], rf"found id {VOCAB}, expected ids from 0 to {VOCAB - 1}"),
        ([-1], r"found id -1"),
        ("abc", r"this model has no tokenizer"),
        (torch.zeros(1, 1, 1), r"found ids of shape \(1, 1, 1\)"),
    ],
    ids=["empty", "large", "negative", "text", "3-D"],
)
def test_wrong_prompts_are_named(model, prompt, message):
    with pytest.raises(InputError, match=message):
        model.generate(prompt, 5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1]], r"attention_mask: found shape \(1, 2\) for ids of \(1, 3\), expected the same"),
        ([[0, 0, 0]], "with a real id in every row"),
    ],
)
def test_wrong_masks_are_named(model, mask, message):
    with pytest.raises(InputError, match=message):
        model.generate(torch.ones(1, 3, dtype=torch.int64), 2, attention_mask=torch.tensor(mask))


def test_a_padded_prompt_without_room_is_refused(model):
    long = model.config.block_size + 1
    with pytest.raises(InputError, match=f"prompt: found {long} positions, expected at most "):
        model.generate(torch.ones(1, long, dtype=torch.int64), 2, attention_mask=torch.ones(1, long, dtype=torch.int64))


def test_a_character_without_an_id_is_shown(speaker):
    with pytest.raises(InputError, match=r"'é'"):
        speaker.generate("caf\u00e9", 5)


def test_stream_refuses_several_sequences(model):
    with pytest.raises(InputError, match=r"found 3 sequences, expected 1"):
        next(stream(model, torch.zeros(3, 2, dtype=torch.int64), 5))


# Sampling

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


def frequencies(logits: torch.Tensor, draws: int = 40_000, **settings) -> torch.Tensor:
    drawn = sample(logits.expand(draws, -1), generator=torch.Generator().manual_seed(0), **settings)
    return torch.bincount(drawn, minlength=len(logits)) / draws


def test_draws_follow_the_softmax():
    torch.testing.assert_close(frequencies(LOGITS), LOGITS.softmax(0), atol=0.01, rtol=0)


def test_temperature_divides_logits():
    torch.testing.assert_close(frequencies(LOGITS, temperature=0.5), (LOGITS / 0.5).softmax(0), atol=0.01, rtol=0)


def test_top_k_keeps_the_likeliest():
    kept = torch.tensor([-torch.inf, 2.0, -torch.inf, 1.0, -torch.inf])
    torch.testing.assert_close(frequencies(LOGITS, top_k=2), kept.softmax(0), atol=0.01, rtol=0)


def test_top_k_above_the_vocabulary_keeps_all():
    torch.testing.assert_close(frequencies(LOGITS, top_k=99), LOGITS.softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, [1]), (0.6, [1, 3]), (0.83, [0, 1, 3]), (1.0, [0, 1, 2, 3, 4])])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    """The probabilities are 0.55, 0.20, 0.12, 0.08, 0.03 for the ids 1, 3, 0, 4, 2."""
    expected = torch.full_like(LOGITS, -torch.inf)
    expected[kept] = LOGITS[kept]
    torch.testing.assert_close(frequencies(LOGITS, top_p=top_p), expected.softmax(0), atol=0.01, rtol=0)


def test_top_p_counts_among_the_top_k():
    """Of ids 1 and 3 alone, id 1 has 0.73: it reaches 0.7 by itself."""
    assert frequencies(LOGITS, top_k=2, top_p=0.7)[1] == 1


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(0.001, 1.0),
    temperature=st.floats(0.0, 3.0),
    seed=st.integers(0, 2**32),
)
def test_a_draw_is_always_one_that_is_allowed(logits, top_k, top_p, temperature, seed):
    row = torch.tensor([logits])
    generator = torch.Generator().manual_seed(seed)
    drawn = sample(row, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    assert drawn.shape == (1,) and drawn.dtype == torch.int64
    above = sum(value > logits[drawn] for value in logits)
    assert above < (top_k or len(logits))
    if temperature == 0:
        assert above == 0
