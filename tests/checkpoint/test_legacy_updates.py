"""Files of every generation train on to the same bits as in the program that wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.data.tokenizer import tokenizer_from_state
from core.model import GPT
from tests.makers.generations import adamw, aged, fuse, rounded, trained, write_old_bundle, write_single_file
from tests.makers.models import save_durably
from tests.makers.old_runs import (
    GENERATIONS,
    LR,
    OPTIMIZERS,
    RUNS,
    assert_same_bits,
    assert_same_state,
    copied,
    fixture_model,
    hyper_parameters,
    manager,
    resume,
    update_both,
)


@pytest.fixture
def fixtures(shared) -> Path:
    return shared / "fixtures" / "lecture_char"


@pytest.mark.parametrize("container", ["latest.pt", "bundle"])
@pytest.mark.parametrize(("generation", "optimizer"), RUNS)
def test_resumed_run_and_its_new_bundle_make_the_updates_of_the_old_program_to_the_bit(
    tmp_path, generation, optimizer, container
):
    theirs = GENERATIONS[generation]()
    their_optimizer = trained(theirs, **OPTIMIZERS[optimizer])
    if container == "bundle":
        write_old_bundle(tmp_path / "dante", theirs, their_optimizer, step=3)
    else:
        write_single_file(tmp_path / "dante" / container, theirs, their_optimizer, step=3)
    with manager(tmp_path) as made:
        ours, our_optimizer, step = resume(made)
        assert step == 3 and hyper_parameters(our_optimizer) == hyper_parameters(their_optimizer)
        assert_same_state(ours, our_optimizer, theirs, their_optimizer)
        for seed in range(3):
            update_both(ours, our_optimizer, theirs, their_optimizer, seed)
            assert_same_state(ours, our_optimizer, theirs, their_optimizer)
        save_durably(made, ours, our_optimizer, step=6)
    with manager(tmp_path) as again:
        ours, our_optimizer, step = resume(again)
        assert step == 6
        update_both(ours, our_optimizer, theirs, their_optimizer, 4)
        assert_same_state(ours, our_optimizer, theirs, their_optimizer)
    written = torch.load(tmp_path / "dante" / "model.pt", weights_only=True)
    assert written.keys() == fuse(theirs.state_dict()).keys()


@pytest.mark.parametrize("generation", ["lecture", "fused with bias"])
def test_learning_rate_is_the_callers_and_the_rest_is_the_files(tmp_path, generation):
    theirs = GENERATIONS[generation]()
    optimizer = trained(theirs, groups=2, lr=1e-4, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3)
    path = write_single_file(tmp_path / "latest.pt", theirs, optimizer, step=3)
    ours, _, _, state = GPT.load_legacy(path)
    decay = {}
    for group in ours.configure_optimizer(LR, optimizer_state=state).param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (LR, (0.8, 0.99), 1e-6)
        decay.update(dict.fromkeys(group["param_names"], group["weight_decay"]))
    assert decay == {name: 0.3 if p.dim() >= 2 else 0.0 for name, p in ours.named_parameters()}


@pytest.mark.parametrize("generation", ["lecture", "fused with bias"])
def test_bf16_bundle_trains_on_in_fp32_from_its_rounded_weights(tmp_path, generation):
    theirs = GENERATIONS[generation]()
    saved = trained(theirs)
    write_old_bundle(tmp_path / "dante", theirs, saved, step=3, wrapped=True, checkpoint_dtype="bf16")
    theirs = rounded(theirs)
    their_optimizer = adamw(theirs)
    their_optimizer.load_state_dict(saved.state_dict())
    with manager(tmp_path) as made:
        ours, our_optimizer, _ = resume(made)
    assert_same_state(ours, our_optimizer, theirs, their_optimizer)
    update_both(ours, our_optimizer, theirs, their_optimizer, 0)
    assert_same_state(ours, our_optimizer, theirs, their_optimizer)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("generation", ["lecture", "fused with bias"])
def test_state_of_an_older_torch_goes_on_to_the_same_bits(tmp_path, generation, groups):
    theirs = GENERATIONS[generation]()
    old = aged(trained(theirs, groups=groups).state_dict())
    path = write_single_file(tmp_path / "latest.pt", theirs, old, step=3, stream=True)
    their_optimizer = adamw(theirs, groups=groups)
    their_optimizer.load_state_dict(old)
    ours, _, _, state = GPT.load_legacy(path)
    our_optimizer = ours.configure_optimizer(LR, optimizer_state=state)
    for seed in range(2):
        update_both(ours, our_optimizer, theirs, their_optimizer, seed)
        assert_same_state(ours, our_optimizer, theirs, their_optimizer)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("generation", ["lecture", "fused", "fused with bias"])
def test_plain_torch_takes_the_returned_state_by_position(tmp_path, generation, groups):
    """What a script of a user does: AdamW over the parameters of our model, then load_state_dict."""
    theirs = GENERATIONS[generation]()
    their_optimizer = trained(theirs, groups=groups)
    path = write_single_file(tmp_path / "latest.pt", theirs, their_optimizer, step=3)
    ours, _, _, state = GPT.load_legacy(path)
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    assert numbers == list(range(len(list(ours.parameters()))))
    our_optimizer = adamw(ours, groups=groups)
    our_optimizer.load_state_dict(state)
    for seed in range(2):
        update_both(ours, our_optimizer, theirs, their_optimizer, seed)
        assert_same_state(ours, our_optimizer, theirs, their_optimizer)


@pytest.mark.parametrize("generation", ["lecture", "fused with bias"])
def test_optimizer_that_was_saved_before_its_first_update_starts_as_it_would_have(tmp_path, generation):
    theirs = GENERATIONS[generation]()
    their_optimizer = adamw(theirs)
    write_single_file(tmp_path / "dante" / "latest.pt", theirs, their_optimizer, step=0)
    with manager(tmp_path) as made:
        ours, our_optimizer, step = resume(made)
    assert step == 0 and not our_optimizer.state
    update_both(ours, our_optimizer, theirs, their_optimizer, 0)
    assert_same_state(ours, our_optimizer, theirs, their_optimizer)


@pytest.mark.parametrize("generation", ["lecture", "fused with bias"])
def test_weights_that_were_frozen_have_no_moments_and_go_on(tmp_path, generation):
    theirs = GENERATIONS[generation]()
    frozen = "position_embedding_table.weight"
    theirs.get_parameter(frozen).requires_grad_(False)
    their_optimizer = trained(theirs)
    path = write_single_file(tmp_path / "latest.pt", theirs, their_optimizer, step=3)
    ours, _, _, state = GPT.load_legacy(path)
    our_optimizer = ours.configure_optimizer(LR, optimizer_state=state)
    assert ours.get_parameter(frozen) not in our_optimizer.state
    update_both(ours, our_optimizer, theirs, their_optimizer, 0)
    assert_same_bits(dict(ours.named_parameters()), fuse(dict(theirs.named_parameters())))


@pytest.mark.parametrize("layout", ["legacy", "bundle"])
def test_upstream_optimizer_goes_on_to_the_same_bits(fixtures, tmp_path, layout):
    theirs, content = fixture_model(fixtures)
    their_optimizer = adamw(theirs)
    their_optimizer.load_state_dict(content["optimizer_state_dict"])
    copied(fixtures / layout, tmp_path / "dante")
    tokenizer = tokenizer_from_state(content["tokenizer"])
    with manager(tmp_path) as made:
        ours, our_optimizer, step = made.initialize_for_training({}, tokenizer, None, LR)
        assert step == 30
        assert_same_state(ours, our_optimizer, theirs, their_optimizer)
        for seed in range(3):
            update_both(ours, our_optimizer, theirs, their_optimizer, seed)
            assert_same_state(ours, our_optimizer, theirs, their_optimizer)
