from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import train as script
from core.checkpoint import CheckpointManager
from core.console.commandline import DONE
from core.data.dataloader import DataLoader, PackedLoader
from core.data.tokenizer import Gpt2Tokenizer
from core.data.tokens import Tokens
from core.errors import CheckpointMismatch, InputError
from core.kinds import KINDS
from core.kinds.kind import Request
from core.kinds.modded import fresh, sizes
from core.kinds.origin import open_origin
from core.loading.modded import load_flex_checkpoint
from core.networks.flex import GPTFlexAttention
from core.networks.muon import configure_muon
from tests.makers.models import TEXT, equal, save_durably, state_of, tokenizer

SMALL, MEDIUM = "modded_small_16e2da07_d128h1_opt", "modded_medium_06743860_d128h1_opt"
SIZES = {"n_layer": 6, "n_head": 1, "block_size": 128, "eval_iters": 1, "device": "cpu"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 40)
    return path


def words(root, text, **flags):
    named = {"checkpoint_root": root, "input_file": text, **flags}
    return [word for name, value in named.items() if value is not None for word in (f"--{name}", str(value))]


def train(root, text, **flags):
    return script.main(words(root, text, **{**SIZES, **flags}))


def bits(folder):
    """All tensors of a checkpoint: weights, and the optimizer's state."""
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
    return torch.load(folder / "model.pt", weights_only=True) | moments


@pytest.mark.parametrize("arch", ["flex_small", "flex_small_2025_02", "flex_medium"])
def test_steps_and_a_resume_and_more_steps_are_all_steps(tmp_path, text, arch, capsys):
    flags = {"gradient_accumulation_steps": 2, "weight_decay": 0.1} if arch == "flex_medium" else {}
    assert train(tmp_path, text, arch=arch, model_name="whole", max_iters=6, **flags) == DONE
    assert train(tmp_path, text, arch=arch, model_name="parts", max_iters=3, **flags) == DONE
    assert script.main(words(tmp_path, None, model_name="parts", max_iters=6)) == DONE, (
        "the same command, without --arch"
    )
    said = capsys.readouterr()
    assert "resuming at step 3" in said.err and "done: step 6, validation loss" in said.err
    whole, parts = bits(tmp_path / "whole"), bits(tmp_path / "parts")
    assert equal(whole, parts) and any(key.endswith("momentum_buffer") for key in whole)
    saved = json.loads((tmp_path / "parts/config.json").read_text())
    assert (saved["model_class"], saved["variant"]) == ("GPTFlexAttention", arch.removeprefix("flex_"))


def test_a_toy_learns_and_writes(tmp_path, text, capsys):
    assert train(tmp_path, text, arch="flex_medium", max_iters=40, eval_interval=20) == DONE
    said = capsys.readouterr()
    loss = state_of(tmp_path / "default")["val_loss"]
    assert loss < 2.0, "a uniform guess has 3.1"
    assert "no GPU: a small preset" in said.err and 100 < len(said.out) < 400, "the sample, and nothing else"
    lines = [json.loads(line) for line in (tmp_path / "default/metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates[0] == 0.025 and rates == sorted(rates, reverse=True) and len(rates) == 40


def test_the_schedule_scales_all_rates_and_the_momentum_follows_the_step(tmp_path, text):
    assert train(tmp_path, text, arch="flex_small", max_iters=4, learning_rate=0.02, warmup_iters=9) == DONE
    groups = torch.load(tmp_path / "default/optimizer.pt", weights_only=True)["param_groups"]
    rate = 0.02 * 4 / 10
    assert [group["lr"] for group in groups] == pytest.approx([rate * f for f in (4.4, 12, 0.8, 1, 1)])
    assert [group["momentum"] for group in groups if "momentum" in group] == pytest.approx([0.85 + 0.1 * 3 / 300] * 2)


def test_embeddings_in_bf16_stay_so_until_a_flag_says_otherwise(tmp_path, text):
    def dtypes():
        found = torch.load(tmp_path / "default/model.pt", weights_only=True)
        return {t.dtype for n, t in found.items() if "embed" in n}, {
            t.dtype for n, t in found.items() if "embed" not in n
        }

    assert train(tmp_path, text, arch="flex_small", max_iters=2, dtype="bf16") == DONE
    assert dtypes() == ({torch.bfloat16}, {torch.float32})
    assert train(tmp_path, text, max_iters=3) == DONE
    assert dtypes() == ({torch.bfloat16}, {torch.float32})
    assert train(tmp_path, text, max_iters=4, dtype="fp32") == DONE
    assert dtypes() == ({torch.float32}, {torch.float32})


def test_a_batch_is_a_function_of_seed_and_step():
    ids = np.random.default_rng(1).integers(0, 400, 5000).astype(np.uint16)
    tokens = Tokens([ids], vocab_size=400, where="test")
    packed = PackedLoader(tokens, tokens, block_size=128, seed=7)
    rows = DataLoader(tokens, tokens, block_size=128, batch_size=1, seed=7)
    for step, micro in ((0, 0), (0, 1), (5, 0)):
        x, y = packed.batch(step, micro)
        assert x.shape == y.shape == (128,) and torch.equal(x[1:], y[:-1])
        assert torch.equal(x, rows.batch(step, micro)[0][0]) and torch.equal(y, packed.batch(step, micro)[1])
    assert not torch.equal(packed.batch(0)[0], packed.batch(0, 1)[0])
    assert torch.equal(packed.val_batch(3)[0], rows.val_batch(3)[0][0])


@pytest.mark.parametrize(
    ("made", "variant", "rows", "head", "end"),
    [
        (Gpt2Tokenizer, "small", 50304, 50304, 50256),
        (Gpt2Tokenizer, "medium", 50257, 50304, 50256),
        (tokenizer, "small", 23, 128, 23),
    ],
)
def test_a_new_model_has_upstreams_rows_and_its_tokenizers_end_of_text(made, variant, rows, head, end):
    given = {"n_layer": 6, "n_head": 1, "n_embd": 128, "block_size": 128, "device": "cpu"}
    config = fresh(variant, given, Request({}, made(), 0.05, seed=1)).config
    assert (config.vocab_size, config.head_rows, config.eos_token_id) == (rows, head, end)


def checkpoint(shared, folder):
    return shared / "fixtures" / folder / "state_step000005.pt"


@pytest.mark.parametrize(("folder", "arch"), [(SMALL, "flex_small"), (MEDIUM, "flex_medium"), (MEDIUM, None)])
def test_a_run_starts_from_an_upstream_file_with_its_optimizer(tmp_path, text, shared, folder, arch, capsys):
    path = checkpoint(shared, folder)
    flags = {"arch": arch, "init_from_checkpoint": path, "block_size": 128, "eval_iters": 1, "device": "cpu"}
    assert script.main(words(tmp_path, text, **flags, max_iters=1)) == DONE
    said = capsys.readouterr().err
    assert f"starting from the weights of {path}" in said and "state of Muon: used, for 4" in said
    assert "state of AdamW: used, for 6 parameters" in said and "0 so far" not in said
    assert ("47 of 47 matrices in fp32" in said) == (folder == MEDIUM)
    entries = torch.load(tmp_path / "default/optimizer.pt", weights_only=True)["state"]
    assert {float(entry["step"]) for entry in entries.values() if "step" in entry} == {3.0}, "two were in the file"
    assert script.main(words(tmp_path, text, **flags, max_iters=2)) == DONE, "the same command resumes"
    assert "resuming at step 1" in capsys.readouterr().err


@pytest.mark.parametrize("folder", [SMALL, MEDIUM])
def test_the_weights_of_an_upstream_file_are_taken_as_they_are(tmp_path, shared, folder):
    path = checkpoint(shared, folder)
    origin = open_origin(path, None)
    given = {"block_size": 128, "device": "cpu"}
    request = Request(given, tokenizer(), 0.05, seed=1, dtype=torch.float32, origin=origin)
    with CheckpointManager("new", tmp_path, say=lambda line: None) as manager:
        model, optimizer, step = manager.start(KINDS[origin.arch], request)
    there = load_flex_checkpoint(path)[0].state_dict()
    assert step == 0 and model.config.eos_token_id == model.config.vocab_size and len(optimizer.state) == len(there)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        mantissa = folder == MEDIUM and name.startswith("blocks.")
        bits = 0xFFFF0000 if mantissa else 0xFFFFFFFF  # what a mantissa adds lies below bf16
        found = (tensor.view(torch.int32).long() & bits, there[name].float().view(torch.int32).long() & bits)
        assert torch.equal(*found), name


def test_a_run_starts_from_the_weights_of_another_model(tmp_path, text, capsys):
    assert train(tmp_path, text, arch="flex_small", model_name="first", max_iters=2) == DONE
    assert train(tmp_path, text, arch="flex_small", model_name="second", max_iters=1, init_from_model="first") == DONE
    assert "starting from the weights of first, step 2" in capsys.readouterr().err
    with pytest.raises(CheckpointMismatch, match=r"is a GPTFlexAttention \(small\), this run has --arch flex_medium"):
        train(tmp_path, text, arch="flex_medium", model_name="third", init_from_model="first")


def test_a_manager_fills_a_live_model_and_its_optimizer(tmp_path, text):
    assert train(tmp_path, text, arch="flex_small", max_iters=2) == DONE
    rows = torch.load(tmp_path / "default/model.pt", weights_only=True)["embed.weight"].shape[0]
    model = GPTFlexAttention(rows, 6, 1, 128, 128, "small", rows)
    optimizer = configure_muon(model, 0.05)
    assert CheckpointManager("default", tmp_path).load(model, optimizer) == 2
    save_durably(CheckpointManager("again", tmp_path), model, optimizer, step=2)
    assert equal(bits(tmp_path / "again"), bits(tmp_path / "default"))


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"arch": "gpt"}, CheckpointMismatch, r"GPTFlexAttention \(small\), this run has --arch gpt. Leave it out"),
        ({"arch": "flex_medium"}, CheckpointMismatch, r"GPTFlexAttention \(small\), this run has --arch flex_medium"),
        ({"n_layer": 8}, CheckpointMismatch, "n_layer is 8 here and 6 in the checkpoint"),
        ({"n_head": 2}, CheckpointMismatch, "n_head is 2 here and 1 in the checkpoint"),
        ({"batch_size": 4}, InputError, "one packed sequence at a time.*--block_size.*--gradient_accumulation_steps"),
        ({"dropout": 0.1}, InputError, "--dropout is 0.1: these models have none"),
    ],
)
def test_what_contradicts_the_checkpoint_is_one_clear_sentence(trained, flags, error, message):
    root, text = trained
    with pytest.raises(error, match=message):
        train(root, text, **{**flags, "max_iters": 9})


@pytest.mark.parametrize("name", ["tied_head", "head_bias"])
def test_a_head_that_these_models_have_not_is_refused_and_their_own_is_not(name):
    with pytest.raises(InputError, match=f"--{name}: these models have a head of their own, without a bias"):
        sizes({name: True})
    assert sizes({name: False}) == {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    (root / "text.txt").write_text(TEXT * 40)
    assert train(root, root / "text.txt", arch="flex_small", max_iters=1) == DONE
    return root, root / "text.txt"


def test_a_gpt_is_no_modded_nanogpt_model(tmp_path, text):
    flags = {
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 16,
        "block_size": 16,
        "batch_size": 2,
        "eval_iters": 1,
        "device": "cpu",
    }
    assert script.main(words(tmp_path, text, **flags, max_iters=1)) == DONE
    with pytest.raises(CheckpointMismatch, match=r"the checkpoint is a GPT, this run has --arch flex_small"):
        script.main(words(tmp_path, text, arch="flex_small", max_iters=2))


def test_a_model_for_batches_is_not_trained_here(tmp_path, text):
    assert train(tmp_path, text, arch="flex_small", max_iters=1) == DONE
    batched = CheckpointManager.load_for_inference("default", tmp_path).batched()
    save_durably(CheckpointManager("tuned", tmp_path), batched, step=1)
    with pytest.raises(
        CheckpointMismatch, match=r"model_class is GPTBatched; train\.py trains GPT and GPTFlexAttention"
    ):
        train(tmp_path, text, model_name="tuned", max_iters=2)
    with pytest.raises(CheckpointMismatch, match="the checkpoint is a GPTBatched, this run has --arch flex_small"):
        train(tmp_path, text, model_name="tuned", arch="flex_small", max_iters=2)


def test_a_run_has_one_start(tmp_path, text, shared):
    with pytest.raises(InputError, match="a run has one start"):
        flags = {"init_from_checkpoint": checkpoint(shared, MEDIUM), "init_from_model": "other", "max_iters": 1}
        script.main(words(tmp_path, text, **flags))


def test_an_upstream_file_of_another_variant_or_program_is_refused(tmp_path, text, shared):
    path = checkpoint(shared, MEDIUM)
    with pytest.raises(CheckpointMismatch, match="those of --arch flex_medium, this run has --arch flex_small"):
        train(tmp_path, text, arch="flex_small", init_from_checkpoint=path)
    with pytest.raises(CheckpointMismatch, match="those of --arch flex_medium, this run has --arch gpt"):
        train(tmp_path, text, arch="gpt", init_from_checkpoint=path)
    with pytest.raises(CheckpointMismatch, match="n_layer is 6 here and 16 in the checkpoint"):
        train(tmp_path, text, init_from_checkpoint=path)


def test_a_config_that_stands_alone_is_the_architecture_of_a_new_model(tmp_path, text, capsys):
    folder = tmp_path / "default"
    assert train(tmp_path, text, arch="flex_small", max_iters=1, n_layer=8) == DONE
    for path in folder.iterdir():
        if path.is_file() and path.name != "config.json":
            path.unlink()
    with pytest.raises(CheckpointMismatch, match="n_layer is 6 here and 8 there"):
        train(tmp_path, text, arch="flex_small", max_iters=1)
    with pytest.raises(
        CheckpointMismatch, match=r"it describes a GPTFlexAttention \(small\), this run has --arch flex_medium"
    ):
        train(tmp_path, text, arch="flex_medium", max_iters=1, n_layer=None)
    assert train(tmp_path, text, arch="flex_small", max_iters=1, n_layer=None) == DONE
    assert "no weights beside it" in capsys.readouterr().err
    assert json.loads((folder / "config.json").read_text())["n_layer"] == 8


def test_a_longer_sequence_may_follow(tmp_path, text, capsys):
    assert train(tmp_path, text, arch="flex_small", max_iters=1) == DONE
    assert train(tmp_path, text, max_iters=2, block_size=256) == DONE
    assert "block_size: 128 so far, 256 from now on" in capsys.readouterr().err
    assert json.loads((tmp_path / "default/config.json").read_text())["block_size"] == 256
