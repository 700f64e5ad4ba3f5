"""A run that starts from a checkpoint of another program: weights, moments, positions, tokenizer, refusals."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

import train as script
from core.console.commandline import DONE
from core.data.tokenizer import CharTokenizer
from core.errors import CheckpointMismatch
from core.kinds import KINDS
from core.kinds.kind import Request
from core.kinds.origin import open_origin
from core.model import GPT
from tests.makers import nanogpt_files
from tests.makers.conversions import converted, worst
from tests.makers.modded_checkpoints import upstream_file
from tests.makers.small_gpts import SmallGPT

LETTERS = [chr(97 + i) for i in range(29)]

pytestmark = pytest.mark.usefixtures("one_thread")


def nanogpt(folder: Path, small: SmallGPT, letters: bool = True) -> Path:
    path = folder / "ckpt.pt"
    torch.save({"model": small.nanogpt(), "model_args": small.sizes, "iter_num": 7}, path)
    if letters:
        (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(LETTERS))}))
    return path


def started(path: Path, folder: Path, **given):
    """The model and optimizer of a new run from a checkpoint, and what was said."""
    said: list[str] = []
    origin = open_origin(path, None)
    letters = origin.model.config.vocab_size
    request = Request({"device": "cpu", **given}, CharTokenizer([chr(97 + i) for i in range(letters)]), 1e-3)
    model = KINDS["gpt"].new(request, folder, origin, said.append)
    return model, KINDS["gpt"].optimizer(model, request, origin, said.append), said


@pytest.mark.parametrize("program", ["nanogpt", "hf"])
def test_the_weights_are_those_of_the_file_and_train(tmp_path, program):
    small = SmallGPT()
    path = nanogpt(tmp_path, small, letters=False)
    if program == "hf":
        converted(path, path := tmp_path / "hf", "hf")
    model, _, said = started(path, tmp_path / "run", dropout=0.25, batch_size=3)
    assert said == [f"optimizer state: none in {path}; its moments start from zero"]
    assert (model.step, model.training, model.config.batch_size) == (0, True, 3)
    assert model.blocks[1].dropout == 0.25 and all(p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.token_embedding_table.weight
    with torch.no_grad():
        assert worst(model.eval()(small.ids())[0].double(), small.logits(small.ids())) < 1e-6
    model(small.ids(), small.ids())[1].backward()


@pytest.mark.parametrize("positions", [5, 12])
def test_the_first_positions_compute_what_they_computed(tmp_path, positions):
    small = SmallGPT()
    model, _, said = started(nanogpt(tmp_path, small, letters=False), tmp_path / "run", block_size=positions)
    assert model.config.block_size == positions == len(model.position_embedding_table.weight)
    assert any(line.startswith(f"block_size: the first {positions} of the 12") for line in said) == (positions == 5)
    ids = small.ids()[:, :positions]
    with torch.no_grad():
        assert worst(model.eval()(ids)[0].double(), small.logits(small.ids())[:, :positions]) < 1e-6


@pytest.mark.parametrize("order", [nanogpt_files.TODAY, nanogpt_files.SORTED])
@pytest.mark.parametrize("positions", [8, 4])
def test_the_moments_belong_to_their_parameters(tmp_path, order, positions):
    marks = nanogpt_files.ckpt(tmp_path / "ckpt.pt", order=order, layers=2, rows=29)
    model, optimizer, said = started(tmp_path / "ckpt.pt", tmp_path / "run", block_size=positions)
    assert "optimizer state: used, for 15 parameters" in said
    ours = dict(model.named_parameters())
    places = {
        "token_embedding_table.weight": "transformer.wte.weight",
        "position_embedding_table.weight": "transformer.wpe.weight",
        "blocks.1.fwd.net.2.weight": "transformer.h.1.mlp.c_proj.weight",
        "blocks.0.ln2.weight": "transformer.h.0.ln_2.weight",
    }
    for name, theirs in places.items():
        entry = optimizer.state[ours[name]]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(entry[moment], torch.full_like(ours[name], float(marks[theirs])))
        assert entry["step"] == 40
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}


def test_moments_of_another_optimizer_start_from_zero_and_that_is_said(tmp_path):
    nanogpt_files.ckpt(tmp_path / "ckpt.pt", order=nanogpt_files.TODAY, rows=29)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    for entry in content["optimizer"]["state"].values():
        del entry["exp_avg_sq"]
    torch.save(content, tmp_path / "ckpt.pt")
    _, optimizer, said = started(tmp_path / "ckpt.pt", tmp_path / "run")
    assert not optimizer.state
    assert any("optimizer state: not used, " in line and "exp_avg_sq" in line for line in said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n_layer": 3}, r"ckpt\.pt: n_layer is 3 here and 2 in the checkpoint"),
        ({"block_size": 13}, r"ckpt\.pt: block_size is 13 here and 12 in the checkpoint"),
        ({"tied_head": False}, r"ckpt\.pt: tied_head is False here and True in the checkpoint"),
    ],
)
def test_another_architecture_is_refused(tmp_path, given, said):
    with pytest.raises(CheckpointMismatch, match=said):
        started(nanogpt(tmp_path, SmallGPT()), tmp_path / "run", **given)


def test_another_kind_or_tokenizer_is_refused(tmp_path):
    path = nanogpt(tmp_path, SmallGPT())
    with pytest.raises(CheckpointMismatch, match="those of --arch gpt, this run has --arch flex_small"):
        open_origin(path, "flex_small")
    with pytest.raises(CheckpointMismatch, match="those of --arch flex_small, this run has --arch gpt"):
        open_origin(upstream_file(tmp_path / "state.pt"), "gpt")
    other = Request({}, CharTokenizer(LETTERS[::-1]), 1e-3)
    with pytest.raises(CheckpointMismatch, match=r"ckpt\.pt: the model was trained with char, 29 characters"):
        KINDS["gpt"].new(other, tmp_path / "run", open_origin(path, None), print)
    (tmp_path / "meta.pkl").unlink()
    for count in (28, 30):
        wrong = Request({}, CharTokenizer([chr(97 + i) for i in range(count)]), 1e-3)
        with pytest.raises(
            CheckpointMismatch, match=rf"ckpt\.pt: no tokenizer with it; the model has 29 ids.* {count} "
        ):
            KINDS["gpt"].new(wrong, tmp_path / "run", open_origin(path, None), print)


def test_a_decoder_of_transformers_is_of_the_architecture_that_its_config_says(tmp_path, shared):
    path = shared / "eras/hf_smollm2_tied"
    assert open_origin(path, None).arch == open_origin(path, "llama").arch == "llama"
    with pytest.raises(CheckpointMismatch, match="those of --arch llama, this run has --arch qwen3"):
        open_origin(path, "qwen3")
    model, optimizer, _ = started(path, tmp_path / "run", block_size=16)
    assert model.config.block_size == 16 and model.config.pos_encoding == "rotary" and not optimizer.state
    model(torch.arange(16)[None], torch.arange(16)[None])[1].backward()


def test_a_run_starts_with_the_tokenizer_of_the_file_and_the_same_command_resumes_it(tmp_path, capsys):
    small = SmallGPT()
    small.weights = {name: tensor.bfloat16() for name, tensor in small.weights.items()}
    (tmp_path / "text.txt").write_text("abc" * 200)
    flags = {"init_from_checkpoint": nanogpt(tmp_path, small), "input_file": tmp_path / "text.txt", "eval_iters": 1}
    flags |= {"checkpoint_root": tmp_path, "model_name": "tuned", "device": "cpu", "batch_size": 2}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert script.main([*words, "--max_iters", "1"]) == DONE
    said = capsys.readouterr().err
    assert f"starting from the weights of {flags['init_from_checkpoint']}, a new run at step 0" in said
    assert script.main([*words, "--max_iters", "2"]) == DONE
    assert "resuming at step 1" in capsys.readouterr().err
    model, state, step, _ = GPT.load(tmp_path / "tuned")
    assert (step, state["chars"]) == (2, LETTERS) and {p.dtype for p in model.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "tuned/config.json").read_text())["block_size"] == 12


def test_flags_for_what_a_file_does_not_show_need_a_file(capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["--norm_eps", "1e-6"])
    assert (
        ended.value.code == 2 and "--norm_eps: for a file that --init_from_checkpoint names" in capsys.readouterr().err
    )
