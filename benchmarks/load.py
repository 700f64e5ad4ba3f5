"""What a load costs, checksums compared: to the first step of a resumed run, to the first token; beside nanoGPT's way.

    python benchmarks/load.py [--nanogpt CLONE] [--repeats 5] [--parts resume token verify] [--folder DIR] [--json]

124M parameters with AdamW, 1.49 GB, in the page cache; each run is a process of its own, imports are not counted, the
ways take turns, and medians are compared. Parts:

resume  as train.py does it: find the newest intact step (every checksum compared), model, optimizer, the comparison
        with the certificate, one step of training. nanoGPT's way, line for line as its train.py: torch.load of its
        ckpt.pt, a model with random weights, load_state_dict, an optimizer, load_state_dict, one step.
token   as generate.py does it, checksums compared, against nanoGPT's sample.py: torch.load of the ckpt.pt, a model with
        random weights, load_state_dict.
verify  the comparison of all checksums alone.

With --nanogpt, a clone of karpathy/nanoGPT, its way uses its own model.py. Without, our model stands in for it, which
draws a third of the random numbers: its way is quicker then than it is.

Figures are seconds of the wall and of processors (cpu). On a machine that others use as well, trust the latter.
`--size small` tries the program.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first optimizer would import it
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import Row, hand_over
from benchmarks.trained import SIZES, config_of, machine, machine_line
from core.bundle.bundle import open_bundle
from core.bundle.verify import verify
from core.checkpoint import CheckpointManager
from core.config.gpt import GPTConfig
from core.data.dataloader import DataLoader
from core.data.tokenizer import Gpt2Tokenizer, Tokenizer, make_char
from core.data.tokens import Tokens
from core.loading.optimizer import configure_optimizer
from core.model import GPT
from core.networks.generation import stream
from core.training.fit import fit

NAME, CKPT = "saved", "ckpt.pt"
PROMPT = [1, 2, 3]
TOKENS = 64
"""In a batch: a step is short beside the load."""

Marks = dict[str, tuple[float, float]]
"""When something was done: by the wall's clock and the processors'."""


def now() -> tuple[float, float]:
    """The time by both clocks."""
    return time.perf_counter(), time.process_time()


def loader_of(config: GPTConfig) -> DataLoader:
    """Random tokens that are the same each time."""
    ids = np.random.default_rng(1).integers(config.vocab_size, size=100_000, dtype=np.uint16)
    tokens = Tokens([ids], vocab_size=config.vocab_size, where="random tokens")
    return DataLoader(tokens, tokens, block_size=min(TOKENS, config.block_size), batch_size=1, seed=1)


def tokenizer_of(config: GPTConfig) -> Tokenizer:
    """GPT-2's tokenizer, or as many characters as a small model has rows."""
    gpt2 = Gpt2Tokenizer()
    if config.vocab_size >= gpt2.vocab_size:
        return gpt2
    return make_char(["".join(map(chr, range(0x100, 0x100 + config.vocab_size)))])


def nanogpt_model(sizes: dict[str, int], clone: Path | None) -> nn.Module:
    """A model with random weights: of a clone of nanoGPT, or ours in its place."""
    if clone is None:
        return GPT(config_of(sizes))
    sys.path.insert(0, str(clone))
    from model import GPT as NanoGPT
    from model import GPTConfig as NanoConfig

    with contextlib.redirect_stdout(io.StringIO()):
        return NanoGPT(NanoConfig(**sizes, bias=True))


def nanogpt_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW as nanoGPT makes it on a CPU."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))


def nanogpt_step(model: nn.Module, optimizer: torch.optim.AdamW, sizes: dict[str, int]) -> None:
    """A step as nanoGPT makes it."""
    x, y = loader_of(config_of(sizes)).batch(1, 0)
    model.train()(x, y)[1].backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def make(folder: Path, sizes: dict[str, int], clone: Path | None) -> None:
    """Train a step, and save it both ways."""
    model = GPT(config_of(sizes))
    optimizer = configure_optimizer(model, 1e-4)
    model.tokenizer = tokenizer_of(model.config)
    manager = CheckpointManager(NAME, folder, say=lambda line: None)
    data = loader_of(model.config)
    fit(model, data_loader=data, optimizer=optimizer, max_iters=1, manager=manager, eval_iters=1, progress=False)
    peer = nanogpt_model(sizes, clone)
    optimizer = nanogpt_optimizer(peer)
    nanogpt_step(peer, optimizer, sizes)
    ckpt = {"model": peer.state_dict(), "optimizer": optimizer.state_dict(), "model_args": sizes, "iter_num": 1}
    torch.save(ckpt, folder / CKPT)


class FirstStep(BaseException):
    """The first step is done; what `fit` would do after it is not measured."""


def resume_ours(folder: Path, sizes: dict[str, int], clone: Path | None, marks: Marks) -> None:
    """Resume as train.py does."""
    with CheckpointManager(NAME, folder, say=lambda line: None) as manager:
        bundle = manager.newest_intact(to_train=True)
        marks["found and verified"] = now()
        model, optimizer, step = manager.initialize_for_training(
            {}, tokenizer_of(config_of(sizes)), None, 1e-4, bundle=bundle
        )
        marks["model and optimizer"] = now()

        def stop(*_: Any) -> None:
            marks["first step"] = now()
            raise FirstStep

        optimizer.register_step_post_hook(stop)
        data = loader_of(model.config)
        with contextlib.suppress(FirstStep):
            fit(model, data_loader=data, optimizer=optimizer, max_iters=step + 1, manager=manager, progress=False)


def resume_nanogpt(folder: Path, sizes: dict[str, int], clone: Path | None, marks: Marks) -> None:
    """Resume as nanoGPT's train.py does."""
    ckpt = torch.load(folder / CKPT, map_location="cpu", weights_only=True)
    marks["load"] = now()
    model = nanogpt_model(ckpt["model_args"], clone)
    marks["random model"] = now()
    model.load_state_dict(ckpt["model"])
    optimizer = nanogpt_optimizer(model)
    optimizer.load_state_dict(ckpt["optimizer"])
    marks["model and optimizer"] = now()
    nanogpt_step(model, optimizer, sizes)
    marks["first step"] = now()


def token_ours(folder: Path, sizes: dict[str, int], clone: Path | None, marks: Marks) -> None:
    """Load as generate.py does, and draw a token."""
    model = CheckpointManager.load_for_inference(NAME, folder)
    marks["model"] = now()
    next(stream(model, PROMPT, 1, temperature=0))
    marks["first token"] = now()


def token_nanogpt(folder: Path, sizes: dict[str, int], clone: Path | None, marks: Marks) -> None:
    """Load as nanoGPT's sample.py does, and draw a token."""
    ckpt = torch.load(folder / CKPT, map_location="cpu", weights_only=True)
    marks["load"] = now()
    model = nanogpt_model(ckpt["model_args"], clone)
    marks["random model"] = now()
    model.load_state_dict(ckpt["model"])
    marks["model"] = now()
    model.eval()
    if isinstance(model, GPT):
        next(stream(model, PROMPT, 1, temperature=0))
    else:
        model.generate(torch.tensor([PROMPT]), 1, top_k=1)
    marks["first token"] = now()


def verify_alone(folder: Path, sizes: dict[str, int], clone: Path | None, marks: Marks) -> None:
    """Compare all checksums."""
    with open_bundle(folder / NAME) as bundle:
        marks["open"] = now()
        verify(bundle)
        marks["verified"] = now()


WAYS: dict[str, dict[str, Callable[[Path, dict[str, int], Path | None, Marks], None]]] = {
    "resume": {"ours": resume_ours, "nanoGPT": resume_nanogpt},
    "token": {"ours": token_ours, "nanoGPT": token_nanogpt},
    "verify": {"ours": verify_alone},
}


def run(part: str, way: str, folder: Path, sizes: dict[str, int], clone: Path | None) -> dict[str, float]:
    """Seconds of each stretch of a way, and of the whole."""
    marks: Marks = {}
    begin = now()
    WAYS[part][way](folder, sizes, clone, marks)
    ends = list(marks.values())
    stretches = [*zip(marks, [begin, *ends], ends, strict=False), ("total", begin, ends[-1])]
    found = {}
    for name, start, end in stretches:
        found |= {name: end[0] - start[0], f"{name}, cpu": end[1] - start[1]}
    return found


def measure(part: str, folder: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians of the ways of a part, which take turns in processes of their own; the first round is warm-up."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS[part]}
    for turn in range(args.repeats + 1):
        for way, found in runs.items():
            command = [sys.executable, __file__, "--size", args.size, "--folder", str(folder), "--run", part, way]
            command += ["--nanogpt", str(args.nanogpt)] if args.nanogpt else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"error: {part}, {way}: {done.stderr}")
            if turn:
                found.append(json.loads(done.stdout))
    return {way: {k: statistics.median(r[k] for r in found) for k in found[0]} for way, found in runs.items()}


def claims(found: dict[str, dict[str, dict[str, float]]]) -> list[Row]:
    """What was claimed, and what was measured."""
    rows = []
    for part, bar, text in (("resume", 2.5, "resume to the first step"), ("token", 2.0, "first token")):
        if ways := found.get(part):
            ours, peer = (ways[way]["total"] for way in ("ours", "nanoGPT"))
            rows.append(Row(f"{text}, nanoGPT's way", peer / ours, bar, "x", True, f"{ours:.3g} s", f"{peer:.3g} s"))
    if ways := found.get("verify"):
        rows.append(Row("comparing the checksums of 1.49 GB", ways["ours"]["verified"], 0.5, " s"))
    return rows


def main() -> None:
    """Measure the parts, and print the figures and the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--nanogpt", type=Path, help="a clone of karpathy/nanoGPT, for its own model.py")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        figures = json.dumps(run(*args.run, args.folder, SIZES[args.size], args.nanogpt))
        print(figures, flush=True)
        os._exit(0)  # what the end of a process costs is nobody's load
    print(machine_line(), file=sys.stderr, flush=True)
    before = machine()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        make(Path(name), SIZES[args.size], args.nanogpt)
        found = {part: measure(part, Path(name), args) for part in args.parts}
    if args.json:
        print(
            json.dumps(
                {
                    "machine": before,
                    "repeats": args.repeats,
                    "figures": found,
                    "claims": [asdict(row) for row in claims(found)],
                }
            )
        )
        return
    for part, ways in found.items():
        print(f"\n{part}, medians of {args.repeats}, seconds (of processors)")
        for way, figures in ways.items():
            names = [name for name in figures if not name.endswith(", cpu")]
            print(
                f"  {way:8}",
                *(f"{name} {figures[name]:.3f} ({figures[f'{name}, cpu']:.3f})" for name in names),
                sep="  ",
            )
    print(f"\nload at the end {machine()['load'][0]}")
    hand_over(claims(found))


if __name__ == "__main__":
    main()
