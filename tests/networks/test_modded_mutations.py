"""Each known mistake of other loaders, made on purpose, is seen by the comparison of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from core.config.variants import skips_of
from core.model import GPTBatched
from core.networks import modded
from tests.makers import modded_reference as reference
from tests.makers.modded_models import END, LOGITS, VARIANTS, apart, packed, random_checkpoint, random_flex
from tests.makers.modded_upstream import MEDIUM, SMALL, STEP5, case

pytestmark = pytest.mark.usefixtures("one_thread")
SEEN = 1e-2  # a hundred times what an exact computation may differ by
CLASSES = ("GPTFlexAttention", "GPTBatched")


def transposed_output(model, patch) -> None:
    for block in model.blocks:
        if block.attn is not None:
            out = block.attn.weights()[1].data
            out.copy_(out.T.clone())


def other_kind(**change) -> Callable[..., None]:
    def mistake(model, patch) -> None:
        for block in model.blocks:
            if block.attn is not None:
                block.attn.variant = replace(block.attn.variant, **change)

    return mistake


def skips_of_medium(model, patch) -> None:
    # Each adds the output that its weight is numbered by; 2025-02 has six weights, so that number 6 is its first.
    weights = 6 if model.apart else 12
    patch.setattr(modded, "skips_of", lambda variant, layers: {9: (6 % weights, 6), 10: (4, 4), 11: (2, 2)})


def skips_of_small(model, patch) -> None:
    patch.setattr(modded, "skips_of", lambda variant, layers: skips_of(replace(variant, skips=None), layers))


OF_SMALL = {
    "transposed output projection": transposed_output,
    "no norm before attention": other_kind(normed_input=False),
    "norm on values": other_kind(normed_values=True),
    "skips of medium": skips_of_medium,
}
OF_MEDIUM = {  # the other way round; a norm before its attention would be invisible: q, k and v are normed after it
    "transposed output projection": transposed_output,
    "no norm on values": other_kind(normed_values=False),
    "skips of small": skips_of_small,
}
MISTAKES = [
    (variant, name, mistake)
    for variant in VARIANTS
    for name, mistake in (OF_MEDIUM if variant == "medium" else OF_SMALL).items()
]
each_mistake = pytest.mark.parametrize(("variant", "name", "mistake"), MISTAKES)


@torch.no_grad()
def logits_of(flex, kind, ids, window):
    """Logits [T, V] of one document in either class."""
    if kind == "GPTFlexAttention":
        return flex(ids, window=window)[0]
    return flex(ids[None])[0][0]


def wrong_by(model, kind, ids, window, rows, expected, mistake, patch) -> float:
    """How far logits are off with a mistake; without it they are right."""
    assert apart(logits_of(model, kind, ids, window)[rows], expected) < LOGITS
    with torch.no_grad():
        mistake(model, patch)
    return apart(logits_of(model, kind, ids, window)[rows], expected)


@functools.cache
def text_and_logits(variant):
    ids, weights = packed(150), random_checkpoint(variant)[1]
    return ids, reference.logits(weights, reference.hidden(weights, ids.numpy(), END))


@pytest.mark.parametrize("kind", CLASSES)
@each_mistake
def test_a_mistake_is_seen_against_the_reference(variant, name, mistake, kind, monkeypatch):
    ids, expected = text_and_logits(variant)
    model = random_flex(variant)
    if kind == "GPTBatched":
        model = GPTBatched.from_pretrained_gpt(model)
    assert wrong_by(model, kind, ids, None, slice(None), expected, mistake, monkeypatch) > SEEN


# How far off a small checkpoint of the program was measured to be, each mistake made by itself in another program.
MEASURED = {
    "transposed output projection": 3.3,
    "skips of medium": 2.2,
    "no norm before attention": 1.75,
    "norm on values": 0.87,
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("variant", "name", "mistake"), [one for one in MISTAKES if one[0] != "small_2025_02"])
def test_a_mistake_is_seen_against_upstreams_own_logits(shared, variant, name, mistake, kind, monkeypatch):
    one = case(shared, MEDIUM if variant == "medium" else SMALL, STEP5, "one_doc_full")
    model = one.flex()
    if kind == "GPTBatched":
        model = GPTBatched.from_pretrained_gpt(model, window=one.window)
    expected = one.expected["logits_fp32"]
    wrong = wrong_by(model, kind, one.ids, one.window, one.positions, expected, mistake, monkeypatch)
    assert wrong > SEEN
    if variant == "small":
        assert wrong == pytest.approx(MEASURED[name], rel=0.3)
