"""Every choice of the decoder, against its formulas in NumPy; the cache and padding change nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import model as core_model
from core.config.gpt import MLP_TYPES, NORM_PLACEMENTS, NORM_TYPES, GPTConfig
from core.errors import InputError
from core.families.gpt import shapes
from core.model import GPT
from core.networks import attention, norms, rotary
from tests.makers.decoder_reference import LLAMA3, Reference

T, VOCAB = 9, 17
SIZES = {"block_size": 16, "vocab_size": VOCAB, "n_embd": 12, "n_head": 2, "n_layer": 2, "dropout": 0.0}
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5]
EXACT = 1e-5  # of the largest logit
SEEN = 1e-3


def make(**fields) -> GPT:
    """A model whose weights are far from neutral, so that leaving one out shows."""
    model = GPT(GPTConfig(**{**SIZES, **fields}))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.4)
    return model.eval()


def off(model: GPT, config: GPTConfig | None = None) -> float:
    """How far the logits are from the formulas under a config, as a part of the largest."""
    expected = Reference(model.state_dict(), config or model.config).logits(IDS)
    with torch.no_grad():
        found = model(torch.tensor([IDS]))[0][0].double().numpy()
    return float(abs(found - expected).max() / abs(expected).max())


@st.composite
def configs(draw) -> dict:
    """Fields of a decoder, any choice with any other that it may stand with."""
    groups, share = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (4, 1)]))
    size = draw(st.sampled_from([4, 6, 8]))
    free = draw(st.booleans())
    fields = {
        "n_head": groups * share,
        "n_kv_head": groups,
        "n_embd": 10 if free else size * groups * share,
        "head_size": size if free else None,
        "n_ffn": draw(st.sampled_from([None, 7, 20])),
        "mlp_type": draw(st.sampled_from([None, *MLP_TYPES])),
        "norm_type": draw(st.sampled_from(NORM_TYPES)),
        "norm_placement": draw(st.sampled_from(NORM_PLACEMENTS)),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "qk_norm": draw(st.sampled_from([None, "head", "width"])),
        "pos_encoding": draw(st.sampled_from(["learned", "rotary", "none"])),
        "sliding_window": draw(st.sampled_from([None, 3, [2, None], [None, 5]])),
        "attention_scale": draw(st.sampled_from(["head_size", "n_embd", 0.3])),
        "attention_cap": draw(st.sampled_from([None, 1.5])),
        "logit_cap": draw(st.sampled_from([None, 2.0])),
        "embedding_scale": draw(st.sampled_from([1.0, 3.5])),
        **{name: draw(st.booleans()) for name in ("bias", "mlp_bias", "norm_bias", "head_bias", "tied_head")},
        **{name: draw(st.sampled_from([None, False, True])) for name in ("proj_bias", "qkv_bias")},
    }
    if fields["pos_encoding"] == "rotary":
        fields |= {
            "rope_theta": draw(st.sampled_from([100.0, 10000.0])),
            "rotary_percent": draw(st.sampled_from([1.0, 0.5] if size != 6 else [1.0])),
            "rotary_layout": draw(st.sampled_from(["halves", "pairs"])),
            "rope_scaling": draw(st.sampled_from([None, {"type": "linear", "factor": 4.0}, LLAMA3])),
        }
    if fields["norm_placement"] == "before" and draw(st.booleans()):
        fields |= {"parallel_residual": True, "shared_attention_norm": draw(st.booleans())}
    return fields


slow_draws = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@slow_draws
@given(configs())
def test_logits_equal_the_formulas(fields):
    model = make(**fields)
    assert off(model) < EXACT
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes(model.config)
    assert list(model.state_dict()) == list(shapes(model.config))


@slow_draws
@given(configs())
def test_cache_and_padding_change_nothing(fields):
    model, ids = make(**fields), torch.tensor([IDS])
    with torch.no_grad():
        whole = model(ids)[0][0]
        cache = model.make_cache(1, T)
        parts = [model.features(part, cache=cache) for part in ids.split([4, 3, 1, 1], dim=1)]
        assert_near(model.logits(torch.cat(parts, 1))[0], whole)
        mask = torch.arange(T + 4) >= torch.tensor([[0], [4]])
        padded = torch.stack([torch.tensor([7, 7, 7, 7, *IDS])] * 2)
        assert_near(model(padded, attention_mask=mask)[0][1, 4:], whole)
        assert_near(model(padded[:1])[0], model(padded, attention_mask=mask)[0][:1])
        prefix = model.make_cache(2, T + 4)
        shares = list(padded.split([T + 2, 1, 1], dim=1))
        parts = [model.features(shares[0], cache=prefix, attention_mask=mask[:, : T + 2])]
        parts += [model.features(part, cache=prefix) for part in shares[1:]]
        assert_near(model.logits(torch.cat(parts, 1))[1, 4:], whole)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()


MODERN = {
    "n_head": 4,
    "n_kv_head": 2,
    "head_size": 8,
    "pos_encoding": "rotary",
    "rope_theta": 50.0,
    "rope_scaling": LLAMA3,
    "norm_type": "rmsnorm",
    "mlp_type": "swiglu",
    "qk_norm": "head",
    "sliding_window": 4,
    "attention_cap": 1.5,
    "logit_cap": 2.0,
    "embedding_scale": 2.0,
}
PARALLEL = {"pos_encoding": "rotary", "parallel_residual": True, "rotary_percent": 2 / 3, "norm_eps": 1e-2}
FLIPS = [
    (MODERN, {"rope_theta": 500.0}),
    (MODERN, {"rope_scaling": None}),
    (MODERN, {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    (MODERN, {"rope_scaling": {**LLAMA3, "low_freq_factor": 0.5}}),
    (MODERN, {"rotary_percent": 0.5}),
    (MODERN, {"rotary_layout": "pairs"}),
    (MODERN, {"norm_type": "rmsnorm_1p"}),
    (MODERN, {"norm_type": "layernorm"}),
    (MODERN, {"norm_eps": 1e-1}),
    (MODERN, {"mlp_type": "geglu"}),
    (MODERN, {"qk_norm": None}),
    (MODERN, {"sliding_window": 5}),
    (MODERN, {"sliding_window": [4, None]}),
    (MODERN, {"sliding_window": None}),
    (MODERN, {"attention_cap": None}),
    (MODERN, {"attention_cap": 4.0}),
    (MODERN, {"logit_cap": None}),
    (MODERN, {"embedding_scale": 1.0}),
    (MODERN, {"attention_scale": "n_embd"}),
    ({**MODERN, "norm_placement": "both"}, {"norm_placement": "before"}),
    ({**MODERN, "norm_placement": "both"}, {"norm_placement": "after_sublayer"}),
    ({**MODERN, "qk_norm": "width", "n_head": 1, "n_kv_head": 1}, {"qk_norm": None}),
    ({"norm_placement": "after"}, {"norm_placement": "before"}),
    ({"norm_type": "layernorm_1p"}, {"norm_type": "layernorm"}),
    ({"norm_type": "layernorm_1p"}, {"norm_type": "rmsnorm"}),
    ({"mlp_type": "relu_squared"}, {"mlp_type": "relu"}),
    ({"mlp_type": "relu_squared"}, {"mlp_type": "gelu"}),
    ({"mlp_type": "gelu_tanh"}, {"mlp_type": "relu"}),
    (PARALLEL, {"parallel_residual": False}),
    (PARALLEL, {"shared_attention_norm": True}),
    (PARALLEL, {"pos_encoding": "none", "rotary_percent": 1.0}),
    (PARALLEL, {"norm_eps": 1e-5}),
]


@pytest.mark.parametrize(
    ("fields", "flip"), FLIPS, ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items())[-60:]
)
def test_each_choice_made_otherwise_is_seen(fields, flip):
    model = make(**fields)
    assert off(model) < EXACT
    assert off(model, GPTConfig(**{**SIZES, **fields, **flip})) > SEEN


def wider(masks):
    """The masks of windows that are one position wider."""

    def made(windows, *rest):
        widened = masks([window and window + 1 for window in windows], *rest)
        return {window: widened[window and window + 1] for window in windows}

    return made


def turned_back(x, rotation):
    return rotary.rotate_halves(x, (rotation[0], -rotation[1]))


def queries_only(x, rotation):
    return rotary.rotate_halves(x, rotation) if x.size(1) == MODERN["n_head"] else x


def gate_of_up(self, x):
    up, activation, down = self.net.children()
    return down(self.gate(x) * activation(up(x)))


MISTAKES = {
    "angles of the other sign": lambda patch: patch.setitem(rotary.LAYOUTS, "halves", turned_back),
    "keys that stay": lambda patch: patch.setitem(rotary.LAYOUTS, "halves", queries_only),
    "partners that are neighbours": lambda patch: patch.setitem(rotary.LAYOUTS, "halves", rotary.rotate_pairs),
    "a window one wider": lambda patch: patch.setattr(core_model, "masks_of", wider(attention.masks_of)),
    "gate and up exchanged": lambda patch: patch.setattr(core_model.FeedForward, "forward", gate_of_up),
    "a factor without its 1": lambda patch: patch.setattr(norms.RMSNorm1p, "forward", torch.nn.RMSNorm.forward),
    "groups of other heads": lambda patch: patch.setattr(torch.Tensor, "repeat_interleave", repeated),
}


def repeated(x, times, dim):
    return x.repeat(1, times, 1, 1)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_of_a_loader_is_seen(mistake, monkeypatch):
    fields = {**MODERN, "norm_type": "rmsnorm_1p"}
    assert off(make(**fields)) < EXACT
    MISTAKES[mistake](monkeypatch)
    assert off(make(**fields)) > SEEN


def test_positions_follow_the_cache():
    model, ids = make(**{**MODERN, "sliding_window": None}), torch.tensor([IDS])
    with torch.no_grad():
        whole = model(ids)[0][0, -1]

        def cached(shift: int) -> float:
            cache = model.make_cache(1, T + 1)
            model.features(ids[:, :-1], cache=cache)
            cache.length += shift
            found = model.logits(model.features(ids[:, -1:], cache=cache))[0, -1]
            return float((found - whole).abs().max() / whole.abs().max())

        assert cached(0) < EXACT < SEEN < cached(1)


def test_one_place_of_padding_would_be_seen():
    model, ids = make(**MODERN), torch.tensor([[7, 7, *IDS]])
    mask = torch.arange(T + 2)[None] >= 2
    with torch.no_grad():
        whole = model(ids[:, 2:])[0][0]

        def wrong() -> float:
            found = model(ids, attention_mask=mask)[0][0, 2:]
            return float((found - whole).abs().max() / whole.abs().max())

        assert wrong() < EXACT
        mask[0, 1] = True
        assert wrong() > SEEN


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("fields", [MODERN, PARALLEL, {}], ids=["modern", "parallel", "gpt"])
def test_a_padded_batch_continues_as_each_prompt_alone(fields, use_cache):
    model = make(**fields)
    prompts = [IDS[:3], IDS[:7], IDS[:1]]
    ids = torch.tensor([[0] * (7 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (7 - len(p)) + [1] * len(p) for p in prompts])
    found = model.generate(ids, 8, temperature=0, attention_mask=mask, use_cache=use_cache)
    for row, prompt in zip(found.tolist(), prompts, strict=True):
        assert row[7:] == model.generate(prompt, 8, temperature=0)[len(prompt) :]


@pytest.mark.parametrize("length", [1, 5, 16, 40])
def test_cached_and_uncached_text_are_equal_beyond_the_context(length):
    model = make(**MODERN)
    prompt = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
    cached = model.generate(prompt, 40, temperature=0)
    assert torch.equal(cached, model.generate(prompt, 40, temperature=0, use_cache=False))


def test_the_loss_of_a_padded_batch_is_that_of_its_real_ids():
    model, ids = make(**MODERN), torch.tensor([IDS])
    padded, mask = torch.tensor([[7, 7, *IDS]]), torch.tensor([[0, 0] + [1] * T])
    padded_targets = torch.cat([torch.tensor([[3, 3]]), ids.roll(1, 1)], 1)
    loss = model(padded, padded_targets, attention_mask=mask)[1]
    torch.testing.assert_close(loss, model(ids, ids.roll(1, 1))[1])


def test_too_many_positions_are_refused_without_a_table_too():
    with pytest.raises(InputError, match="found 17 positions, expected at most block_size 16"):
        make(**MODERN)(torch.zeros(1, 17, dtype=torch.int64))


def test_a_model_learns_through_every_choice():
    model = make(**{**MODERN, "norm_placement": "both", "dropout": 0.1, "norm_type": "rmsnorm_1p"}).train()
    ids = torch.tensor([IDS])
    loss = model(ids[:, :-1], ids[:, 1:])[1]
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_new_weights_start_as_a_norm_that_only_norms():
    for kind in NORM_TYPES:
        model = GPT(GPTConfig(**SIZES, norm_type=kind, mlp_type="swiglu", qk_norm="head"))
        x = torch.randn(3, 12)
        assert torch.allclose(model.ln_f(x).square().mean(-1), torch.ones(3), atol=0.35)
        assert 0.01 < model.blocks[0].fwd.gate.weight.std() < 0.03
