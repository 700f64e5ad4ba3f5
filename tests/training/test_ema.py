"""The average of the weights: computed by its formula, saved beside the model, resumed exactly, loaded in its place."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from core.checkpoint import CheckpointManager
from core.console.commandline import DONE, FAILED, WRONG_USE
from core.errors import CheckpointDamaged, CheckpointMismatch, CheckpointNotFound, InputError
from core.training.ema import Ema
from core.training.schedule import Schedule
from tests.conftest import ROOT
from tests.makers.models import SMALL, TEXT, copy, equal, flip, started, state_of
from tests.makers.runs import bits, fitted, same
from tests.scripts.test_train import ENVIRONMENT, train

CURVE = Schedule("constant", 1e-2, 3)


def go_on(root, *ends, ema=0.8, config=SMALL, **settings):
    """Train to each end in turn, each in a manager of its own."""
    for end in ends:
        made, model, optimizer = started(root, config=dict(config), keep=9)
        fitted((made, model, optimizer), end, ema=ema, schedule=CURVE, **settings)
    return made, model


def average(root, step=None):
    return torch.load(root / "dante" / (f"step_{step:08d}" if step else "") / "ema.pt", weights_only=True)


def test_it_is_the_weighted_sum_of_all_weights_since_it_began(one_thread):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    ema, decay = Ema(net, 0.75), 0.75
    expected = {name: p.detach().double().clone() for name, p in net.named_parameters()}
    with ema.following(optimizer):
        for _ in range(6):
            net(torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
            for name, p in net.named_parameters():
                expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    optimizer.step()  # nobody follows any more
    found = ema.tensors()
    assert found.keys() == net.state_dict().keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-6, rtol=1e-6)
    assert found["1.num_batches_tracked"] == 6, "what is no floating number is the model's"


def test_it_is_fp32_for_weights_of_less_and_follows_changes_that_they_round_away():
    net = nn.Linear(2, 2, bias=False).bfloat16()
    nn.init.ones_(net.weight)
    ema = Ema(net, 0.999)
    with torch.no_grad():
        net.weight += 1
    before = ema.tensors()["weight"].clone()
    ema.update()
    moved = ema.tensors()["weight"]
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, before + 0.001 * (net.weight.float() - before))
    assert torch.equal(moved.bfloat16(), before.bfloat16()) and not torch.equal(moved, before)


def test_tied_weights_have_one_average():
    net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    net.b.weight = net.a.weight
    ema = Ema(net, 0.5)
    found = ema.tensors()
    assert found["a.weight"] is found["b.weight"]
    with torch.no_grad():
        net.a.weight.fill_(2.0)
    start = found["a.weight"].clone()
    ema.update()
    torch.testing.assert_close(found["a.weight"], (start + 2.0) / 2)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), 0.0])
def test_a_decay_that_averages_nothing_is_refused_with_its_value(decay):
    with pytest.raises(InputError, match=f"ema is {decay:g}"):
        Ema(nn.Linear(2, 2), decay)


def test_a_saved_average_of_another_model_is_refused():
    with pytest.raises(CheckpointMismatch, match=r"does not fit this model: weight is \(2, 2\), expected \(2, 3\)"):
        Ema(nn.Linear(3, 2, bias=False), 0.9, {"weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_n_steps_and_then_m_give_the_average_of_n_plus_m_to_the_bit(tmp_path, one_thread, accumulation):
    go_on(tmp_path / "once", 9, gradient_accumulation_steps=accumulation)
    go_on(tmp_path / "twice", 1, 6, 9, gradient_accumulation_steps=accumulation)
    assert equal(average(tmp_path / "once"), average(tmp_path / "twice"))
    assert same(bits(tmp_path / "once/dante"), bits(tmp_path / "twice/dante"))
    assert not equal(average(tmp_path / "once"), bits(tmp_path / "once/dante")[0])


def test_two_calls_of_fit_in_one_process_give_the_same_average(tmp_path, one_thread):
    go_on(tmp_path / "once", 6)
    run = started(tmp_path / "twice")
    for end in (3, 6):
        fitted(run, end, ema=0.8, schedule=CURVE)
    assert equal(average(tmp_path / "once"), average(tmp_path / "twice"))


def test_the_average_does_not_change_what_is_trained(tmp_path, one_thread):
    go_on(tmp_path / "with", 5)
    go_on(tmp_path / "without", 5, ema=0.0)
    assert same(bits(tmp_path / "with/dante"), bits(tmp_path / "without/dante"))
    assert not (tmp_path / "without/dante/ema.pt").exists()


def test_turned_on_in_mid_run_it_begins_with_the_weights_and_says_so(tmp_path, one_thread, capsys):
    go_on(tmp_path, 3, ema=0.0)
    capsys.readouterr()
    go_on(tmp_path, 4, ema=0.8)
    said = capsys.readouterr().err
    assert "ema: the average begins at step 3, with its weights\n" in said
    assert "The average of the weights (EMA) differs: ema 0.0 then, 0.8 now." in said
    at_3 = torch.load(tmp_path / "dante/step_00000003/model.pt", weights_only=True)
    at_4 = bits(tmp_path / "dante")[0]
    for name, value in average(tmp_path).items():
        torch.testing.assert_close(value, 0.8 * at_3[name] + 0.2 * at_4[name], atol=1e-6, rtol=1e-6)


def test_turned_off_in_mid_run_it_ends_with_a_line_and_stays_in_the_step_that_had_it(tmp_path, one_thread, capsys):
    go_on(tmp_path, 3)
    go_on(tmp_path, 5, ema=0.0)
    assert "ema: off from step 3 on; later steps have no average\n" in capsys.readouterr().err
    assert not (tmp_path / "dante/ema.pt").exists() and len(average(tmp_path, 3)) > 0
    with pytest.raises(
        CheckpointNotFound, match=r"dante/ema\.pt: step 5 has no average of its weights: it was trained w"
    ):
        CheckpointManager.load_for_inference("dante", tmp_path, ema=True)


def test_a_replaced_average_is_named_by_the_certificate(tmp_path, one_thread, capsys):
    go_on(tmp_path, 3)
    content = average(tmp_path)
    content["ln_f.weight"] += 1
    torch.save(content, tmp_path / "dante/ema.pt")
    capsys.readouterr()
    go_on(tmp_path, 4)
    said = r"The average of the weights (EMA) differs: the tensors of ema.pt differ from those that were saved"
    assert said in capsys.readouterr().err


def test_loaded_for_inference_the_average_computes_in_the_place_of_the_weights(tmp_path, one_thread):
    go_on(tmp_path, 3, 6)
    load = CheckpointManager.load_for_inference
    assert equal(load("dante", tmp_path, ema=True).state_dict(), average(tmp_path))
    assert equal(load("dante", tmp_path, ema=True, step=3).state_dict(), average(tmp_path, 3))
    assert equal(load("dante", tmp_path).state_dict(), bits(tmp_path / "dante")[0])
    assert load("dante", tmp_path, ema=True).step == 6


def test_damage_in_the_average_is_found_before_use_named_and_walked_back_from(tmp_path, one_thread):
    go_on(tmp_path, 2, 4)
    damaged = copy(tmp_path, tmp_path / "damaged")
    flip(damaged / "dante/ema.pt", 5000)
    names = r"token_embedding_table\.weight, lm_head\.weight"
    with pytest.raises(CheckpointDamaged, match=rf"dante/ema\.pt: {names} is damaged \(CRC32 .*Newest intact step: 2"):
        CheckpointManager.load_for_inference("dante", damaged, ema=True)
    assert CheckpointManager.load_for_inference("dante", damaged).step == 4, "which does not read it"
    lines = []
    made = CheckpointManager("dante", damaged, say=lines.append)
    _, _, step = made.initialize_for_training({}, "char", None, 1e-3)
    made.close()
    assert step == 2 and any("ema.pt" in line and "damaged" in line for line in lines)
    assert equal(average(damaged), average(tmp_path, 2)), "the average of the step gone back to is at the top"
    (aside,) = (damaged / "dante").glob("aside_00000004_*")
    assert (aside / "ema.pt").exists()


def test_a_caller_saves_an_average_of_its_own(tmp_path):
    net = nn.Linear(3, 2)
    ema = Ema(net, 0.9)
    with torch.no_grad():
        net.weight.zero_()
    ema.update()
    with CheckpointManager("net", tmp_path, say=lambda line: None) as made:
        made.save(net, None, step=1, ema=ema.tensors())
    assert equal(torch.load(tmp_path / "net/ema.pt", weights_only=True), ema.tensors())
    assert set(state_of(tmp_path / "net")["integrity"]["files"]) == {"model.pt", "config.json", "ema.pt"}
    again = CheckpointManager("net", tmp_path, say=lambda line: None)
    with again:
        assert again.load(nn.Linear(3, 2)) == 1
    assert equal(dict(again.averages), ema.tensors())


def script(name, root, *words):
    return subprocess.run(
        [sys.executable, ROOT / name, "--checkpoint_root", root, *words],
        cwd=root, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.full
def test_the_scripts_keep_it_without_the_flag_show_it_and_write_with_it(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    assert train(tmp_path, text, max_iters=4, ema=0.9, learning_rate=0.05, warmup_iters=0).returncode == DONE
    resumed = train(tmp_path, text, max_iters=9)
    assert resumed.returncode == DONE and "\nresume is exact\n" in resumed.stderr, resumed.stderr
    assert state_of(tmp_path / "default")["training"]["ema"] == 0.9
    shown = script("inspect_model.py", tmp_path)
    assert "ema       : an average of the weights, in ema.pt, of decay 0.9\n" in shown.stdout
    files = json.loads(script("inspect_model.py", tmp_path, "--json", "--verify").stdout)["files"]
    assert files["ema.pt"] == (tmp_path / "default/ema.pt").stat().st_size
    words = ["--max_new_tokens", "60", "--seed", "1", "--no_stream"]
    plain, averaged = script("generate.py", tmp_path, *words), script("generate.py", tmp_path, "--ema", *words)
    assert plain.returncode == averaged.returncode == DONE and plain.stdout != averaged.stdout
    model = CheckpointManager.load_for_inference("default", tmp_path, ema=True)
    assert averaged.stdout.rstrip("\n") == model.generate("", max_new_tokens=60, seed=1, temperature=0.8).rstrip("\n")
    off = train(tmp_path, text, max_iters=12, ema=0)
    assert "ema: 0.9 so far, 0.0 from now on" in off.stderr and not (tmp_path / "default/ema.pt").exists()
    none = script("generate.py", tmp_path, "--ema")
    assert none.returncode == FAILED and "default/ema.pt: step 12 has no average" in none.stderr
    wrong = script("generate.py", tmp_path, "--ema", "--legacy_checkpoint", "latest.pt")
    assert wrong.returncode == WRONG_USE and "a single file has none" in wrong.stderr
