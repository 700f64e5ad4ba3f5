"""The head on GPTBatched: what it pools, what its loss is, and how answers are scored."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from core.errors import CheckpointMismatch, InputError
from core.families.identify import identify
from core.model import GPTBatched
from core.networks.classification import (
    GPTClassification,
    accuracy,
    balanced_weights,
    class_scores,
    confusion,
    last_real,
    macro_f,
)
from tests.makers.modded_models import VARIANTS, VOCAB, packed, random_batched

LABELS = torch.tensor([2, 0, 1])


def classifier(variant="small", **settings) -> GPTClassification:
    torch.manual_seed(0)
    return GPTClassification(random_batched(variant), 3, **settings).eval()


def padded(rows, width, left, filler=0):
    """Rows of ids in one batch, with their mask; what stands at padding is `filler`."""
    tokens, mask = torch.full((len(rows), width), filler), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, True
    return tokens, mask


ROWS = [packed(length, seed=length) for length in (5, 17, 31)]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padding_on_either_side_and_none_give_the_same_classes(variant):
    model = classifier(variant)
    alone = torch.cat([model(row[None], torch.ones(1, len(row)))[0] for row in ROWS])
    for left in (False, True):
        for filler in (0, VOCAB - 1):
            logits, loss = model(*padded(ROWS, 40, left, filler), LABELS)
            assert torch.allclose(logits, alone, atol=1e-5)
            assert loss is not None and torch.allclose(loss, F.cross_entropy(alone, LABELS), atol=1e-5)


@torch.no_grad()
def test_what_is_pooled_is_the_last_real_token_after_the_final_norm():
    model = classifier()
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(*padded(ROWS, 33, left=True))
    expected = torch.stack([model.pretrained_model.forward_features(row[None])[0, -1] for row in ROWS])
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert torch.allclose(seen[0].square().mean(-1), torch.ones(3), atol=1e-3), "a norm makes the mean square 1"


def test_id_0_is_a_token_like_any_other():
    features = torch.arange(2 * 4 * 1.0).view(2, 4, 1)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert last_real(features, mask).flatten().tolist() == [2.0, 7.0]
    assert last_real(features, torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]])).flatten().tolist() == [2.0, 4.0]


def test_the_head_has_the_layers_of_the_convention():
    head = classifier(dropout=0.25).head
    assert [type(layer).__name__ for layer in head] == ["Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert (head[0].p, head[3].p) == (0.25, 0.25)
    assert (tuple(head[1].weight.shape), tuple(head[4].weight.shape)) == ((64, 128), (3, 64))


@torch.no_grad()
def test_class_weights_change_the_loss_as_the_formula_says():
    weights = torch.tensor([0.5, 3.0, 1.5])
    plain, weighed = classifier(), classifier(class_weights=weights)
    batch = padded(ROWS, 31, left=False)
    logits, loss = weighed(*batch, LABELS)
    assert torch.equal(logits, plain(*batch)[0]) and plain(*batch)[1] is None
    surprise = -logits.double().log_softmax(-1)[range(3), LABELS]
    by_hand = (weights[LABELS] * surprise).sum() / weights[LABELS].sum()
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert loss.item() != pytest.approx(plain(*batch, LABELS)[1].item(), abs=1e-3)
    assert "class_weights" not in weighed.state_dict(), "a classifier answers without them"


def test_gradients_reach_all_that_the_answer_depends_on():
    model = classifier().train()
    model(*padded(ROWS, 31, left=True), LABELS)[1].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == ["pretrained_model.lm_head_w"]
    model.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_look_at_its_tensors_says_what_it_is(variant):
    shapes = {name: tuple(tensor.shape) for name, tensor in classifier(variant).state_dict().items()}
    found = identify(shapes)
    assert found.family == "classifier"
    assert found.program == "GPTClassification, a modded-nanogpt model with a head that puts texts into classes"
    assert not found.missing and not found.unplaced and not found.conflicts
    assert found.architecture.vocab_size == VOCAB and found.architecture.parameters == sum(
        parameter.numel() for parameter in classifier(variant).parameters()
    )
    assert (
        identify(shapes | {"head.4.weight": (3, 5)}).conflicts[0].startswith("head.4.weight is (3, 5), expected (3, ")
    )


def test_another_pretrained_model_can_be_set():
    model = classifier("small")
    model.pretrained_model = random_batched("medium")
    batch = padded(ROWS, 31, left=False)
    fresh = GPTClassification(random_batched("medium"), 3).eval()
    fresh.head.load_state_dict(model.head.state_dict())
    assert torch.equal(model(*batch)[0], fresh(*batch)[0])
    model.pretrained_model = GPTBatched(VOCAB, 6, 2, 256, 64)
    with pytest.raises(CheckpointMismatch, match="found width 256, expected 128, that of the head"):
        model(*batch)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_classes": 1}, "num_classes: found 1, expected at least 2"),
        ({"num_classes": 3, "dropout": 1.0}, "dropout: found 1.0"),
        ({"num_classes": 3, "class_weights": torch.ones(2)}, r"found shape \(2,\), expected one number for each of"),
    ],
)
def test_impossible_settings_are_one_sentence(settings, said):
    with pytest.raises(InputError, match=said):
        GPTClassification(random_batched("small"), **settings)


def test_scores_of_an_example_by_hand():
    #                       a  a  a  a  b  b  c
    truth = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    answer = torch.tensor([0, 0, 1, 2, 1, 0, 0])
    counts = confusion(answer, truth, 4)
    assert counts.tolist() == [[2, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    a, b, c, nobody = class_scores(counts)
    assert (a.precision, a.recall, a.f_score, a.support) == (0.5, 0.5, 0.5, 4)
    assert (b.precision, b.recall, b.f_score, b.support) == (0.5, 0.5, 0.5, 2)
    assert (c.precision, c.recall, c.f_score, c.support) == (0.0, 0.0, 0.0, 1)
    assert nobody.support == nobody.f_score == 0
    assert accuracy(counts) == 3 / 7
    assert macro_f(counts) == pytest.approx(1 / 3), "a class that nobody names and nobody is does not count"
    assert accuracy(torch.zeros(2, 2)) == macro_f(torch.zeros(2, 2)) == 0.0


def test_balanced_weights_make_classes_count_alike():
    labels = torch.tensor([0, 0, 0, 1])
    assert balanced_weights(labels, 3).tolist() == pytest.approx([4 / 9, 4 / 3, 0.0])
