"""Files of modded-nanogpt compute here what the program itself computed: hidden states, logits, losses."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from core.model import GPTBatched, GPTFlexAttention
from tests.makers import modded_reference as reference
from tests.makers.modded_models import VARIANTS, apart
from tests.makers.modded_upstream import CASES, END, FILES, MEDIUM, SMALL, STEP5, case, saved

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-4  # fp32: of hidden states and logits
CLOSE = 1e-5  # relative: of losses

each_case = pytest.mark.parametrize(("folder", "file", "name"), CASES)


@each_case
def test_the_reference_computes_what_upstream_computed(shared, folder, file, name):
    one = case(shared, folder, file, name)
    weights = one.weights()
    features = reference.hidden(weights, one.ids.numpy(), END, one.window)
    logits = reference.logits(weights, features)
    assert apart(features[one.positions], one.expected["hidden_fp32"]) < EXACT
    assert apart(logits[one.positions], one.expected["logits_fp32"]) < EXACT
    assert reference.loss(logits, one.targets.numpy()) == pytest.approx(one.facts["loss_fp32"], rel=CLOSE)


@each_case
@torch.no_grad()
def test_flex_attention_model_computes_what_upstream_computed(shared, folder, file, name):
    one = case(shared, folder, file, name)
    model = one.flex()
    logits, loss = model(one.ids, one.targets, window=one.window)
    assert logits.dtype == torch.float32
    assert apart(model.forward_features(one.ids, window=one.window)[one.positions], one.expected["hidden_fp32"]) < EXACT
    assert apart(logits[one.positions], one.expected["logits_fp32"]) < EXACT
    assert loss.item() == pytest.approx(one.facts["loss_fp32"], rel=CLOSE)


def split(ids: torch.Tensor) -> list[slice]:
    starts = [*(ids == END).nonzero().flatten().tolist(), len(ids)]
    return [slice(a, b) for a, b in pairwise(starts)]


def same_alone(ids: np.ndarray, span: slice, window: int) -> np.ndarray:
    """Which rows of a document see the same positions when it stands alone, they and all they depend on.

    Windows go by blocks of the packed sequence: a document that begins inside a block has its blocks elsewhere when it
    stands alone, and where a window cuts there, its results differ by design and not by mistake.
    """
    alone = ids[span]
    same = np.ones(len(alone), bool)
    for blocks in (window, window // 2):
        within = reference.window_mask(ids, END, blocks)[span, span]
        same &= (within == reference.window_mask(alone, END, blocks)).all(1)
    return np.logical_and.accumulate(same)


@each_case
@torch.no_grad()
def test_batched_model_computes_each_document_as_upstream_did(shared, folder, file, name):
    one = case(shared, folder, file, name)
    model = GPTBatched.from_pretrained_gpt(one.flex(), window=one.window)
    spans = split(one.ids)
    longest = max(span.stop - span.start for span in spans)
    tokens, mask = torch.zeros(2, len(spans), longest, dtype=torch.int64)
    targets = torch.full_like(tokens, -1)
    expected = torch.full_like(tokens, -1)  # the row of the fixture
    for row, span in enumerate(spans):
        size = span.stop - span.start
        tokens[row, :size], mask[row, :size] = one.ids[span], 1
        same = torch.from_numpy(same_alone(one.ids.numpy(), span, one.window))
        targets[row, :size] = one.targets[span].where(same, -1)
        kept = {position: number for number, position in enumerate(one.positions.tolist())}
        numbers = torch.tensor([kept.get(position, -1) for position in range(span.start, span.stop)])
        expected[row, :size] = numbers.where(same, -1)
    if name == "one_doc_full":
        assert (targets >= 0).all() and (expected >= 0).sum() == len(one.positions)
    else:
        # 0, 100, 128 and 640 begin a block or lie in one, 900 lies in the last: whole. 300 and 700: up to their
        # block's end. The short window of one block cuts the rest of these two elsewhere.
        compared = [int((row >= 0).sum()) for row in targets]
        assert compared == [100, 28, 172, 84, 60, 68, 124]
        assert (expected >= 0).sum() == 18

    features = model.forward_features(tokens, attention_mask=mask)
    logits, loss = model(tokens, targets, attention_mask=mask)
    at = expected >= 0
    assert apart(features[at], one.expected["hidden_fp32"][expected[at]]) < EXACT
    assert apart(logits[at], one.expected["logits_fp32"][expected[at]]) < EXACT
    if name == "one_doc_full":
        assert loss.item() == pytest.approx(one.facts["loss_fp32"], rel=CLOSE)
    weights = one.weights()
    packed = reference.logits(weights, reference.hidden(weights, one.ids.numpy(), END, one.window))
    rows = np.concatenate([np.flatnonzero(row >= 0) + span.start for row, span in zip(targets, spans, strict=True)])
    assert loss.item() == pytest.approx(reference.loss(packed[rows], one.targets.numpy()[rows]), rel=CLOSE)


@each_case
@torch.no_grad()
def test_in_the_files_dtypes_logits_are_as_near_as_upstreams_own_rounding(shared, folder, file, name):
    one = case(shared, folder, file, name)
    model = one.flex(assign=True)  # embeddings in bf16: so the stream is too, and every matrix is rounded at its use
    features = model.forward_features(one.ids, window=one.window)
    logits, loss = model(one.ids, one.targets, window=one.window)
    assert (features.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    rounding = one.facts["max_abs_bf16_vs_fp32"]
    assert apart(logits[one.positions], one.expected["logits_bf16run"]) < rounding
    assert loss.item() == pytest.approx(one.facts["loss_bf16run"], rel=1e-3)
    if name == "one_doc_full":
        batched = GPTBatched.from_pretrained_gpt(model, window=one.window)
        assert batched.embed.weight.dtype == torch.bfloat16
        alone, _ = batched(one.ids[None])
        assert apart(alone[0, one.positions], one.expected["logits_bf16run"]) < rounding


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("folder", "file"), FILES)
def test_a_state_dict_of_the_file_loads_and_comes_back_under_upstreams_names(shared, folder, file, strict):
    one = case(shared, folder, file, "one_doc_full")
    model = one.flex(strict=strict, assign=True)
    upstream = {name.removeprefix("_orig_mod."): tensor for name, tensor in one.state.items()}
    back = model.state_dict()
    assert sorted(back) == sorted(upstream)
    for name, tensor in upstream.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    assert next(iter(one.state)).startswith("_orig_mod."), "loading changed the caller's state dict"
    if file == "state_ws8_scalars64.pt":
        assert back["scalars"].shape == (64,)


def test_the_fixtures_hold_what_these_tests_assume(shared):
    padded, exact = saved(shared / "fixtures" / SMALL / "state_ws8_scalars64.pt"), case(shared, *CASES[0])
    assert padded["model"]["_orig_mod.scalars"].shape == (64,) and exact.state["_orig_mod.scalars"].shape == (60,)
    medium = saved(shared / "fixtures" / MEDIUM / STEP5)["model"]
    assert medium["_orig_mod.embed.weight"].shape[0] == 500 and medium["_orig_mod.lm_head_w"].shape[0] == 512
    assert {one.split("/")[0] for one, *_ in CASES} == {SMALL, MEDIUM}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scalars_of_a_new_model_begin_where_upstreams_do(variant):
    """Skip weights add all, a block takes all from the stream and none from the embeddings, values are mixed evenly."""
    layers = {"medium": 16}.get(variant, 12)
    state = GPTFlexAttention(64, layers, 1, 128, 128, variant).state_dict()
    if variant != "small_2025_02":
        assert state["scalars"].tolist() == [1.0] * layers + [1.0, 0.0] * layers + [0.5, 0.5] * layers
        return
    assert state["skip_weights"].tolist() == [1.0] * 6
    lambdas = {name: tensor.tolist() for name, tensor in state.items() if name.endswith("lambdas")}
    assert len(lambdas) == 23, "layer 7 has no attention"
    assert all(value == ([0.5, 0.5] if "attn" in name else [1.0, 0.0]) for name, value in lambdas.items())
