"""EleutherAI's evaluation harness scores what --to hf writes as our own model scores it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from core.config.decoders import complete
from core.config.gpt import GPTConfig
from core.data.tokenizer import Gpt2Tokenizer, Tokenizer, make_char
from core.model import GPT
from tests.makers.conversions import converted

pytestmark = pytest.mark.full
lm_eval = pytest.importorskip("lm_eval")

PAIRS = [
    ("In the middle of the journey", " of our life"),
    ("I came to myself", " within a dark wood"),
    ("In the", " e"),
]
SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 64, "dropout": 0.0}
HEAD = {"tied_head": True, "head_bias": False}


def saved(folder: Path, tokenizer: Tokenizer, rows: int, arch: str) -> GPT:
    torch.manual_seed(2)
    model = GPT(GPTConfig(**complete(arch, {**SIZES, **HEAD, "vocab_size": rows})))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tokenizer = tokenizer
    model.save_checkpoint_bundle(folder, 1)
    return model.eval()


def scored(model: GPT, context: str, continuation: str) -> tuple[float, bool]:
    """The log-likelihood of a continuation, and whether each of its tokens is the likeliest."""
    assert model.tokenizer is not None
    before = len(model.tokenizer.encode(context))
    ids = torch.tensor(model.tokenizer.encode(context + continuation).astype("int64"))
    with torch.no_grad():
        logits = F.log_softmax(model(ids[None])[0][0], -1)[before - 1 : -1]
    wanted = ids[before:]
    return float(logits.gather(1, wanted[:, None]).sum()), bool((logits.argmax(1) == wanted).all())


@pytest.mark.parametrize("arch", ["gpt", "llama", "qwen3"])
@pytest.mark.parametrize("tokens", ["characters", "gpt2"])
def test_loglikelihoods_are_those_of_our_model(tmp_path, shared, arch, tokens):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    ranks = shared / "data/gpt2.tiktoken"
    tokenizer = Gpt2Tokenizer(ranks) if tokens == "gpt2" else make_char(map("".join, PAIRS))
    rows = 50304 if tokens == "gpt2" else -(-(tokenizer.vocab_size + 4) // 8) * 8
    model = saved(tmp_path / "ours", tokenizer, rows, arch)
    converted(tmp_path / "ours", tmp_path / "hf", "hf", bpe_file=ranks if tokens == "gpt2" else None)
    harness = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=2)
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    for pair, (found, is_greedy) in zip(PAIRS, harness.loglikelihood(asked, disable_tqdm=True), strict=True):
        expected, greedy = scored(model, *pair)
        assert found == pytest.approx(expected, rel=1e-5) and is_greedy is greedy
