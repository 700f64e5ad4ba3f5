"""Old and new side by side: the same gradients, the same updates, compared to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from core.checkpoint import CheckpointManager
from core.data.tokenizer import tokenizer_from_state
from core.model import GPT
from tests.makers.generations import SIZES, TOKENIZER, FusedGPT, LectureGPT, batch, fuse

LR = 3e-3

GENERATIONS = {
    "lecture": lambda **k: LectureGPT(**SIZES, **k),
    "lecture with gelu": lambda **k: LectureGPT(**SIZES, activation="gelu", **k),
    "lecture that says fwd": lambda **k: LectureGPT(**SIZES, ffwd="fwd", **k),
    "fused": lambda **k: FusedGPT(**SIZES, **k),
    "fused with bias": lambda **k: FusedGPT(**SIZES, bias=True, **k),
    "fused with relu": lambda **k: FusedGPT(**SIZES, activation="relu", **k),
}

FILES = {
    "config dict": {},
    "config object": {"config": "object"},
    "config object of a module we have too": {"config": "object", "module": "core.config"},
    "config namespace": {"config": "namespace"},
    "stream": {"stream": True},
    "stream, config object": {"stream": True, "config": "object"},
    "saved on a GPU": {"location": "cuda:0"},
    "saved on a GPU, stream, config object": {"location": "cuda:3", "stream": True, "config": "object"},
    "compiled": {"prefix": "_orig_mod."},
    "ddp": {"prefix": "module."},
    "wrapped": {"prefix": "model."},
    "compiled ddp": {"prefix": "_orig_mod.module."},
    "wrapped ddp of a compiled model, stream": {"prefix": "module.model._orig_mod.", "stream": True},
}
PAIRS = [
    (generation, file)
    for generation in GENERATIONS
    for file in FILES
    if generation in ("lecture", "fused with bias") or file == "config dict"
]

OPTIMIZERS = {
    "one group": {},
    "two groups": {"groups": 2},
    "fused kernel": {"fused": True},
    "two groups, fused kernel": {"groups": 2, "fused": True},
    "foreach kernel": {"foreach": True},
    "amsgrad": {"amsgrad": True},
    "other settings": {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.3},
    "two groups, named": {"groups": 2, "named": True},
}
RUNS = [
    (generation, optimizer)
    for generation in ("lecture", "fused", "fused with bias")
    for optimizer in OPTIMIZERS
    if generation != "fused" or optimizer in ("one group", "two groups, fused kernel")
]


def manager(root: Path, name: str = "dante", lines: list[str] | None = None) -> CheckpointManager:
    return CheckpointManager(name, root, say=(lines if lines is not None else []).append)


def resume(made: CheckpointManager):
    return made.initialize_for_training({}, tokenizer_from_state(TOKENIZER), None, LR)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found = model(ids)
    return found[0] if isinstance(found, tuple) else found


def assert_same_logits(ours: GPT, theirs: torch.nn.Module) -> None:
    ids = batch(theirs, 99)[0]
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=0)


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        x, y = a[name].detach(), b[name].detach()
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.contiguous().numpy().tobytes() == y.contiguous().numpy().tobytes(), name


def moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer, key: str) -> dict[str, torch.Tensor]:
    return {name: optimizer.state[p][key] for name, p in model.named_parameters()}


def assert_same_state(ours: GPT, our_optimizer, theirs: torch.nn.Module, their_optimizer) -> None:
    """Parameters, moments and counts are equal to the bit."""
    assert_same_bits(dict(ours.named_parameters()), fuse(dict(theirs.named_parameters())))
    there = their_optimizer.state[next(theirs.parameters())].keys()
    assert our_optimizer.state[next(ours.parameters())].keys() == there
    for key in there - {"step"}:
        assert_same_bits(moments(ours, our_optimizer, key), fuse(moments(theirs, their_optimizer, key)))
    counts = [{float(e["step"]) for e in o.state.values()} for o in (our_optimizer, their_optimizer)]
    assert counts[0] == counts[1] and len(counts[0]) == 1


def hyper_parameters(optimizer: torch.optim.Optimizer) -> list[dict]:
    names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "fused")
    return [{name: group[name] for name in names} for group in optimizer.param_groups]


def update_both(ours: GPT, our_optimizer, theirs: torch.nn.Module, their_optimizer, seed: int) -> None:
    """One update with the same random gradients."""
    generator = torch.Generator().manual_seed(seed)
    gradients = {name: torch.randn(p.shape, generator=generator) for name, p in theirs.named_parameters()}
    for name, p in theirs.named_parameters():
        p.grad = gradients[name]
    fused = fuse(gradients)
    for name, p in ours.named_parameters():
        p.grad = fused[name].clone()
    their_optimizer.step()
    our_optimizer.step()


def copied(source: Path, target: Path) -> Path:
    """A writable copy of a fixture's folder."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
    return target


def fixture_model(fixtures: Path) -> tuple[LectureGPT, dict]:
    content = torch.load(fixtures / "legacy" / "latest.pt", weights_only=True)
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    model = LectureGPT(*(content["config"][name] for name in sizes), dropout=0.2)
    model.load_state_dict(content["model_state_dict"])
    return model, content


def expected(fixtures: Path) -> tuple[torch.Tensor, torch.Tensor]:
    found = load_file(fixtures / "expected.safetensors")
    return found["input_ids"], found["logits_fp32"]
