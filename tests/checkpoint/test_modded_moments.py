from __future__ import annotations

import copy

import pytest
import torch

from core.kinds.modded_moments import take_over
from core.loading.modded import load_flex_checkpoint
from core.networks.muon import configure_muon

SMALL, MEDIUM = "modded_small_16e2da07_d128h1_opt", "modded_medium_06743860_d128h1_opt"

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(shared, folder, change=lambda content: None):
    """A model of a fixture as training has it, its optimizer, and the content of the file."""
    model, _, content = load_flex_checkpoint(shared / "fixtures" / folder / "state_step000005.pt")
    content = copy.deepcopy(content)
    change(content)
    for name, p in model.named_parameters():
        p.data = p.data.float() if "embed" not in name else p.data.clone()
    return model, configure_muon(model, 0.05), content


def taken(shared, folder, change=lambda content: None):
    model, optimizer, content = opened(shared, folder, change)
    return model, optimizer, content, take_over(content, model, optimizer)


def state(model, optimizer, name):
    return optimizer.state[model.get_parameter(name)]


def test_the_state_of_medium_is_whole_and_used(shared):
    model, optimizer, content, lines = taken(shared, MEDIUM)
    assert lines == [
        "weights: 47 of 47 matrices in fp32, with the mantissas of the file",
        "optimizer state of AdamW: used, for 6 parameters",
        "optimizer state of Muon: used, for 47 parameters",
    ]
    adamw, muon = (saved["state"] for saved in content["optimizers"])
    for number, name in ((0, "lm_head_w"), (1, "embed.weight"), (4, "value_embeds.2.weight"), (5, "scalars")):
        entry = state(model, optimizer, name)
        assert torch.equal(entry["exp_avg"], adamw[number]["exp_avg"])
        assert torch.equal(entry["exp_avg_sq"], adamw[number]["exp_avg_sq"]) and entry["step"] == 2
    for number, name in ((0, "blocks.0.mlp.fc_w"), (16, "blocks.0.mlp.proj_w"), (46, "blocks.15.attn.qkvo_w")):
        assert torch.equal(state(model, optimizer, name)["momentum_buffer"], muon[number]["momentum_buffer"])
    assert all(optimizer.state[p] for p in model.parameters())


def test_mantissas_are_the_lower_halves_of_the_weights(shared):
    plain = opened(shared, MEDIUM)[0]
    model, *_ = taken(shared, MEDIUM)
    for name, p in model.named_parameters():
        if name.startswith("blocks."):
            bits, coarse = p.detach().view(torch.int32), plain.get_parameter(name).detach().view(torch.int32)
            assert torch.equal(bits >> 16, coarse >> 16), f"{name}: cut to bf16 it is the weight of the file"
            assert not torch.equal(bits, coarse) and torch.isfinite(p).all()
        else:
            assert torch.equal(p, plain.get_parameter(name))
    assert {name.startswith("blocks.") for name, _ in model.named_parameters()} == {True, False}


@pytest.mark.parametrize(
    ("code", "length", "said"),
    [
        (
            "    seq_len = 48*1024 # FlexAttention\n    val_seq_len = 4*64*1024\n",
            49152,
            "49152 tokens of its sequences",
        ),
        ("# left out", 65536, "as means over block_size 65536; the file does not record the length"),
    ],
)
def test_the_state_of_small_is_used_as_that_of_mean_losses(shared, code, length, said):
    model, optimizer, content, lines = taken(shared, SMALL, lambda content: content.update(code=code))
    assert len(lines) == 2 and all(said in line and ": used, for" in line for line in lines)
    adamw, muon = (saved["state"] for saved in content["optimizers"])
    for number, name in ((0, "lm_head.weight"), (1, "embed.weight"), (4, "value_embeds.2.weight"), (5, "scalars")):
        entry, there = state(model, optimizer, name), adamw[number]
        precise = 1e-5 if there["exp_avg"].dtype == torch.float32 else 0.01
        assert torch.allclose(entry["exp_avg"].float() * length, there["exp_avg"].float(), rtol=precise)
        assert torch.allclose(entry["exp_avg_sq"].float() * length**2, there["exp_avg_sq"].float(), rtol=precise)
        assert entry["step"] == 2 and entry["step"].dtype == torch.float32
    for number, name in (
        (0, "blocks.0.mlp.c_proj.weight"),
        (23, "blocks.11.mlp.c_fc.weight"),
        (45, "blocks.11.attn.qkv_w"),
    ):
        there = muon[number]["momentum_buffer"]
        assert torch.allclose(state(model, optimizer, name)["momentum_buffer"] * length, there, rtol=1e-5)


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        (SMALL, "mlp.c_fc.weight"),
        (SMALL, "mlp.c_proj.weight"),
        (SMALL, "attn.qkv_w"),
        (MEDIUM, "mlp.fc_w"),
        (MEDIUM, "mlp.proj_w"),
    ],
)
def test_layers_have_their_own_momentum(shared, folder, kind):
    """A weight has moved against its momentum, not against that of another layer: of all rotations ours fits best."""
    model, optimizer, _, _ = taken(shared, folder)
    names = [name for name, _ in model.named_parameters() if name.endswith(kind)]
    weights = torch.stack([model.get_parameter(name).detach().flatten() for name in names])
    moments = torch.stack([state(model, optimizer, name)["momentum_buffer"].flatten() for name in names])
    likeness = torch.nn.functional.normalize(weights, dim=1) @ torch.nn.functional.normalize(moments, dim=1).T
    sums = [likeness.roll(turn, 1).trace().item() for turn in range(len(names))]
    assert min(sums) == sums[0] < 0


def keep_rank_0(content):
    """What rank 0 of 8 of train_gpt_medium.py would have saved."""
    muon = content["optimizers"][1]["state"]
    for number in [n for n in muon if n % 8]:
        del muon[number]


def test_of_several_ranks_medium_gives_adamw_and_some_mantissas(shared):
    model, optimizer, _, lines = taken(shared, MEDIUM, keep_rank_0)
    assert lines[0] == "weights: 6 of 47 matrices in fp32, with the mantissas of the file"
    assert "AdamW: used, for 6 parameters" in lines[1]
    assert "Muon: not used, 6 of 47 parameters have one: those of rank 0 of several" in lines[2]
    assert set(optimizer.state) == {p for name, p in model.named_parameters() if not name.startswith("blocks.")}


def slice_rank_0(content):
    """What rank 0 of 8 of train_gpt.py would have saved."""
    keep_rank_0(content)
    for entry in content["optimizers"][0]["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            entry[key] = entry[key][: max(1, len(entry[key]) // 8)].clone()


def test_of_several_ranks_small_gives_nothing_and_says_so(shared):
    _, optimizer, _, lines = taken(shared, SMALL, slice_rank_0)
    assert len(lines) == 1 and "not used, it has moments of shape [64, 128]" in lines[0] and "rank 0" in lines[0]
    assert not optimizer.state


def drop(content):
    del content["optimizers"]


def swap(content):
    content["optimizers"].reverse()


def empty(content):
    content["optimizers"] = [{"state": {}, "param_groups": []}, {"state": {}, "param_groups": []}]


def strange(content):
    content["optimizers"][0]["state"][0]["exp_avg"] = "a word"


def whole_numbers(content):
    entry = content["optimizers"][0]["state"][0]
    entry["exp_avg"] = entry["exp_avg"].to(torch.int64)


def no_count(content):
    del content["optimizers"][0]["state"][0]["step"]


@pytest.mark.parametrize("folder", [SMALL, MEDIUM])
@pytest.mark.parametrize("change", [drop, swap, empty, strange, whole_numbers, no_count])
def test_a_state_that_cannot_be_used_is_one_line_and_changes_nothing_of_its_half(shared, folder, change):
    model, optimizer, _, lines = taken(shared, folder, change)
    why = [line for line in lines if "not used" in line or "has none" in line]
    assert len(why) == 1 and "\n" not in why[0], lines
    assert not optimizer.state.get(model.head)


def test_of_the_version_of_2025_02_the_weights_alone_are_used(shared):
    model, optimizer, content = opened(shared, SMALL)
    model.config.variant = "small_2025_02"
    (line,) = take_over(content, model, optimizer)
    assert "2025-02" in line and not optimizer.state
