"""Files of every generation compute here what they computed there."""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from core.checkpoint import CheckpointManager
from core.model import GPT
from tests.makers.generations import (
    SIZES,
    TOKENIZER,
    FusedGPT,
    LectureGPT,
    adamw,
    batch,
    fuse,
    rounded,
    trained,
    write_old_bundle,
    write_single_file,
)
from tests.makers.old_runs import (
    FILES,
    GENERATIONS,
    LR,
    PAIRS,
    assert_same_bits,
    assert_same_logits,
    assert_same_state,
    expected,
    fixture_model,
    logits,
)


@pytest.fixture
def fixtures(shared) -> Path:
    return shared / "fixtures" / "lecture_char"


def test_lecture_reference_has_the_upstream_names_order_and_logits(fixtures):
    model, content = fixture_model(fixtures)
    there = content["model_state_dict"]
    assert [(n, t.shape, t.dtype) for n, t in model.state_dict().items()] == [
        (n, t.shape, t.dtype) for n, t in there.items()
    ]
    assert adamw(model).state_dict()["param_groups"] == content["optimizer_state_dict"]["param_groups"]
    ids, wanted = expected(fixtures)
    torch.testing.assert_close(logits(model, ids), wanted, atol=1e-5, rtol=0)


def test_fused_reference_computes_what_the_lecture_reference_does():
    lecture, fused = LectureGPT(**SIZES), FusedGPT(**SIZES, bias=True, activation="relu", seed=1)
    trained(lecture)
    zeros = {n: torch.zeros_like(t) for n, t in fused.state_dict().items() if n.endswith("qkv.bias")}
    fused.load_state_dict({**fuse(lecture.state_dict()), **zeros})
    ids, targets = batch(lecture, 7)
    torch.testing.assert_close(logits(fused, ids), logits(lecture, ids), atol=1e-6, rtol=0)
    for model in (lecture, fused):
        model.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
    gradients = fuse({n: p.grad for n, p in lecture.named_parameters()})
    for name, p in fused.named_parameters():
        if name not in zeros:
            torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=0)


def test_written_files_need_what_they_claim(tmp_path):
    model = LectureGPT(**SIZES)
    path = write_single_file(tmp_path / "a.pt", model, step=1, config="object")
    with pytest.raises(Exception, match=r"gpt_of_then\.GPTConfig"):
        torch.load(path, weights_only=True)
    with pytest.raises(ModuleNotFoundError, match="gpt_of_then"):
        torch.load(path, weights_only=False)
    stream = write_single_file(tmp_path / "b.pt", model, step=1, stream=True)
    assert zipfile.is_zipfile(path) and not zipfile.is_zipfile(stream)
    for old in (False, True):
        elsewhere = write_single_file(tmp_path / "c.pt", model, step=1, location="cuda:99", stream=old)
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(elsewhere, weights_only=True)


# Weights


@pytest.mark.parametrize(("generation", "file"), PAIRS)
def test_single_file_gives_the_logits_and_weights_of_its_program(tmp_path, generation, file):
    theirs = GENERATIONS[generation](dropout=0.1)
    optimizer = trained(theirs)
    path = write_single_file(tmp_path / "final.pt", theirs, optimizer, step=3, **FILES[file])
    modules = set(sys.modules)
    ours, tokenizer, step, state = GPT.load_legacy(path)
    assert "gpt_of_then" not in set(sys.modules) - modules
    assert_same_logits(ours, theirs)
    assert_same_bits(ours.state_dict(), fuse(theirs.state_dict()))
    assert {key: tokenizer[key] for key in TOKENIZER} == TOKENIZER
    assert (step, ours.step) == (3, 3)
    assert {name for group in state["param_groups"] for name in group["param_names"]} == set(ours.state_dict())


def test_asked_final_file_wins_over_the_latest(tmp_path):
    latest, final = LectureGPT(**SIZES), LectureGPT(**SIZES, seed=1)
    write_single_file(tmp_path / "dante" / "latest.pt", latest, step=9)
    write_single_file(tmp_path / "dante" / "final.pt", final, step=5)
    assert_same_logits(CheckpointManager.load_for_inference("dante", tmp_path, legacy_filename="final.pt"), final)
    assert_same_logits(CheckpointManager.load_for_inference("dante", tmp_path, legacy_filename="latest.pt"), latest)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.module."])
@pytest.mark.parametrize("layout", ["raw", "wrapped", "wrapped bf16"])
@pytest.mark.parametrize("generation", ["lecture", "lecture with gelu", "fused", "fused with bias"])
def test_old_bundle_gives_the_logits_of_its_program(tmp_path, generation, layout, prefix):
    theirs = GENERATIONS[generation](dropout=0.1)
    optimizer = trained(theirs)
    dtype = "bf16" if layout == "wrapped bf16" else None
    write_old_bundle(
        tmp_path / "dante", theirs, optimizer, step=3, wrapped=layout != "raw", checkpoint_dtype=dtype, prefix=prefix
    )
    ours = CheckpointManager.load_for_inference("dante", tmp_path)
    assert ours.step == 3 and ours.tokenizer.decode([4, 5]) == "ab"
    theirs = rounded(theirs) if dtype else theirs
    assert_same_logits(ours, theirs)
    assert_same_bits(ours.state_dict(), fuse(theirs.state_dict()))


@pytest.mark.parametrize(("model", "activation"), [(LectureGPT, "gelu"), (FusedGPT, "relu")])
def test_activation_that_only_mlp_type_names_is_computed(tmp_path, model, activation):
    theirs = model(**SIZES, activation=activation, mlp_type=activation)
    del theirs.config["activation"]
    ours = GPT.load_legacy(write_single_file(tmp_path / "final.pt", theirs, step=3))[0]
    assert_same_logits(ours, theirs)
    assert ours.config.unknown["mlp_type"] == activation


def test_file_without_a_step_and_an_optimizer_is_at_step_0(tmp_path):
    theirs = LectureGPT(**SIZES)
    ours, _, step, state = GPT.load_legacy(write_single_file(tmp_path / "final.pt", theirs, step=None))
    assert (step, ours.step, state) == (0, 0, None)
    assert_same_logits(ours, theirs)


def test_file_with_the_gpt2_tokenizer_keeps_it(tmp_path):
    theirs = LectureGPT(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=50304)
    path = write_single_file(tmp_path / "final.pt", theirs, step=3, tokenizer={"token_kind": "gpt2"})
    ours, tokenizer, _, _ = GPT.load_legacy(path, map_location="cpu")
    assert tokenizer["token_kind"] == "gpt2" and ours.tokenizer.kind == "gpt2"
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_gradients_are_those_of_the_old_program(tmp_path, generation):
    theirs = GENERATIONS[generation]()
    trained(theirs)
    ours = GPT.load_legacy(write_single_file(tmp_path / "final.pt", theirs, step=3))[0]
    ids, targets = batch(theirs, 7)
    theirs.zero_grad()
    F.cross_entropy(theirs(ids).flatten(0, 1), targets.flatten()).backward()
    ours(ids, targets)[1].backward()
    wanted = fuse({name: p.grad for name, p in theirs.named_parameters()})
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=25, deadline=None)
@given(
    n_layer=st.integers(1, 3),
    n_head=st.integers(1, 4),
    head_size=st.integers(1, 5),
    block_size=st.integers(1, 6),
    prefix=st.sampled_from(["", "module.", "_orig_mod.module."]),
    groups=st.integers(1, 2),
)
def test_heads_and_their_moments_fuse_at_every_size(n_layer, n_head, head_size, block_size, prefix, groups):
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_head * head_size, "block_size": block_size}
    theirs = LectureGPT(**sizes, vocab_size=len(TOKENIZER["chars"]))
    optimizer = trained(theirs, 1, groups=groups)
    with tempfile.TemporaryDirectory() as folder:
        path = write_single_file(Path(folder) / "latest.pt", theirs, optimizer, step=1, prefix=prefix)
        ours, _, _, state = GPT.load_legacy(path)
        resumed = ours.configure_optimizer(LR, optimizer_state=state)
        assert_same_state(ours, resumed, theirs, optimizer)


# The files of the upstream program


@pytest.mark.parametrize("filename", ["latest.pt", "final.pt"])
def test_upstream_single_file_gives_its_logits(fixtures, filename):
    ids, wanted = expected(fixtures)
    ours, _, step, state = GPT.load_legacy(fixtures / "legacy" / filename)
    assert step == 30 and (state is None) == (filename == "final.pt")
    torch.testing.assert_close(logits(ours, ids), wanted, atol=1e-5, rtol=0)
    ours = CheckpointManager.load_for_inference("legacy", fixtures, legacy_filename=filename)
    torch.testing.assert_close(logits(ours, ids), wanted, atol=1e-5, rtol=0)


def test_upstream_bf16_bundle_gives_the_logits_of_its_rounded_weights(fixtures):
    ids, wanted = expected(fixtures)
    ours = CheckpointManager.load_for_inference("bundle_v2_bf16", fixtures)
    theirs = rounded(fixture_model(fixtures)[0])
    torch.testing.assert_close(logits(ours, ids), wanted, atol=0.05, rtol=0)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=0)
