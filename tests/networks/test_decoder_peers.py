"""The decoder computes what transformers computes, for a tiny random model of each family: logits and greedy text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config.gpt import GPTConfig
from core.errors import CheckpointMismatch
from core.model import GPT
from tests.makers.hf_decoders import OURS, PEERS

pytestmark = pytest.mark.full
pytest.importorskip("transformers")

LENGTH, NEW = 24, 12


@pytest.fixture(scope="module", params=PEERS)
def pair(request):
    return PEERS[request.param].make()


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest."""
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_logits_equal_those_of_transformers(pair):
    theirs, ours = pair
    ids = torch.randint(3, 61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_equal(ours(ids)[0], theirs(ids).logits)


def test_logits_of_a_left_padded_batch_equal_those_of_transformers(pair):
    theirs, ours = pair
    ids = torch.randint(3, 61, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(LENGTH) >= torch.tensor([[0], [7], [15]])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long(), position_ids=places).logits
        assert_equal(ours(ids, attention_mask=mask)[0][mask], expected[mask])


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_equals_that_of_transformers(pair, use_cache):
    theirs, ours = pair
    ids = torch.randint(3, 61, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    expected = theirs.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(ids, NEW, temperature=0, use_cache=use_cache), expected)


def test_greedy_text_of_a_padded_batch_equals_that_of_transformers(pair):
    theirs, ours = pair
    ids = torch.randint(3, 61, (3, LENGTH), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(LENGTH) >= torch.tensor([[0], [7], [15]])
    said = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(ids, attention_mask=mask.long(), **said)
    assert torch.equal(ours.generate(ids, NEW, temperature=0, attention_mask=mask), expected)


@pytest.mark.parametrize("name", PEERS)
@settings(max_examples=8, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    share=st.sampled_from([1, 2, 3]),
    size=st.sampled_from([8, 16]),
    wide=st.sampled_from([24, 56]),
    tied=st.booleans(),
    seed=st.integers(0, 9),
)
def test_models_of_other_sizes_are_equal_too(name, groups, share, size, wide, tied, seed):
    theirs, ours = PEERS[name].sized(groups, share, size, wide, tied).make(seed)
    ids = torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert_equal(ours(ids)[0], theirs(ids).logits)


CHOICES = [
    (peer, field)
    for peer, made in PEERS.items()
    for field, value in made.fields.items()
    if field in GPTConfig.NEUTRAL and value != GPTConfig.NEUTRAL[field]
]


@pytest.mark.parametrize(("name", "field"), [(peer, field) for peer, field in CHOICES if field not in OURS])
def test_each_choice_of_a_family_left_out_is_seen(name, field):
    theirs, ours = PEERS[name].make()
    fields = {key: value for key, value in PEERS[name].fields.items() if key != field}
    ids = torch.randint(3, 61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    try:
        other = GPT(GPTConfig(**fields)).eval()
        other.load_state_dict(ours.state_dict())
    except (CheckpointMismatch, RuntimeError):
        return  # refused: by its fields, or by the tensors' names and shapes
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (other(ids)[0] - expected).abs().max() > 1e-4 * expected.abs().max()
