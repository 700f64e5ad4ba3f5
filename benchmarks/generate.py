"""Tokens per second of a 124M GPT-2 or Llama: with the cache, without it, and transformers' cached generate.

Random weights, which transformers has from our export; greedy, and the texts have to be equal. `--part tuning` measures
steps of fine-tuning: forward, backward and fused AdamW. All run in one process and take turns, so that they meet the
same machine; the median of the ratios of all turns is compared.

    python benchmarks/generate.py                                    # 124M parameters, 256 new tokens: some minutes
    python benchmarks/generate.py --arch llama
    python benchmarks/generate.py --arch llama --part tuning
    python benchmarks/generate.py --new_tokens 32 --repeats 2        # a quick look
    python benchmarks/generate.py --threads 1 --cpu_time             # on a machine that others use
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import convert_checkpoints
from benchmarks.rows import Row, hand_over
from core.config.decoders import DECODERS
from core.config.gpt import GPTConfig
from core.loading.optimizer import configure_optimizer
from core.model import GPT

OURS, UNCACHED, PEER = "ours", "ours, no cache", "transformers"
BARS = {
    ("gpt", "generation"): {UNCACHED: 5.0, PEER: 1.0},
    ("llama", "generation"): {UNCACHED: 5.0, PEER: 1.3},
    ("gpt", "tuning"): {PEER: 0.95},
    ("llama", "tuning"): {PEER: 0.95},
}
"""What ours must be at least, as a multiple of each other row."""

SIZES = {"n_head": 12, "n_embd": 768, "vocab_size": 50304, "block_size": 1024, "dropout": 0.0}
CHOICES = {
    "gpt": {"bias": True, "tied_head": True, "head_bias": False, "activation": "gelu_tanh"},
    "llama": {**DECODERS["llama"], "n_kv_head": 4, "n_ffn": 2432},
}
"""Choices of each, of 124M parameters with 12 layers."""


def read_bandwidth(gigabytes: float = 1.0) -> float:
    """Bytes per second at which this machine reads memory: the bound of generation, which reads every weight."""
    block = torch.ones(int(gigabytes * 2**30) // 4)
    block.sum()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.nbytes / statistics.median(times)


def transformers_model(model: GPT) -> torch.nn.Module | None:
    """The same model in transformers, with its own memory, or None where that is not installed."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: its row is left out", file=sys.stderr)
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        model.save_checkpoint_bundle(f"{folder}/ours")
        convert_checkpoints.main([f"{folder}/ours", f"{folder}/theirs", "--to", "hf"])
        loaded = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/theirs", dtype=torch.float32)
        peer = type(loaded)(loaded.config)
        peer.load_state_dict(loaded.state_dict())
    return peer.eval()


def generation(model: GPT, peer: torch.nn.Module | None, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Greedy generation by each; cached, except for the row that says so."""
    prompt = torch.randint(model.config.vocab_size, (1, args.prompt_tokens))
    runs: dict[str, Callable[[], object]] = {
        OURS: lambda: model.generate(prompt, args.new_tokens, temperature=0.0),
        UNCACHED: lambda: model.generate(prompt, args.new_tokens, temperature=0.0, use_cache=False),
    }
    if args.no_uncached:
        del runs[UNCACHED]
    if peer is not None:
        from transformers import GenerationConfig

        n = args.new_tokens
        settings = GenerationConfig(max_new_tokens=n, min_new_tokens=n, do_sample=False, use_cache=True, pad_token_id=0)
        mask = torch.ones_like(prompt)
        runs[PEER] = lambda: peer.generate(prompt, attention_mask=mask, generation_config=settings)
        assert torch.equal(runs[PEER](), runs[OURS]()), "not the same text"
    return runs


def tuning(model: GPT, peer: torch.nn.Module | None, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Steps of fine-tuning on a batch: transformers takes the ids as labels, and shifts them itself."""
    ids = torch.randint(model.config.vocab_size, (args.batch, args.length + 1))
    optimizer = configure_optimizer(model.train(), 1e-5)
    runs: dict[str, Callable[[], object]] = {
        OURS: lambda: step(optimizer, lambda: model(ids[:, :-1], ids[:, 1:])[1]),
    }
    if peer is not None:
        theirs = torch.optim.AdamW(peer.train().parameters(), 1e-5, fused=True)
        runs[PEER] = lambda: step(theirs, lambda: peer(input_ids=ids, labels=ids, use_cache=False).loss)
        losses = [run() for run in runs.values()]
        assert abs(losses[0] - losses[1]) < 1e-4, f"not the same loss: {losses}"
    return runs


def step(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> float:
    """Make one update, and return the loss before it."""
    loss = loss_of()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def measure(runs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each run, taking turns; one round before that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            print(f"\rround {turn} of {repeats}: {name:24}", end="", file=sys.stderr, flush=True)
            start = clock()
            run()
            if turn:
                seconds[name].append(clock() - start)
    print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(CHOICES), default="gpt")
    parser.add_argument("--part", choices=["generation", "tuning"], default="generation")
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--prompt_tokens", type=int, default=16)
    parser.add_argument("--no_uncached", action="store_true", help="leave out the slow row without a cache")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (tuning)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (tuning)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu_time", action="store_true", help="seconds that the process had a processor")
    parser.add_argument("--n_layer", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    model = GPT(GPTConfig(n_layer=args.n_layer, **SIZES, **CHOICES[args.arch])).eval()
    parameters = sum(p.numel() for p in model.parameters())
    is_tuning = args.part == "tuning"
    runs = (tuning if is_tuning else generation)(model, transformers_model(model), args)
    tokens = args.batch * args.length if is_tuning else args.new_tokens
    seconds = measure(runs, args.repeats, time.process_time if args.cpu_time else time.perf_counter)

    what = f"steps of {args.batch} x {args.length}" if is_tuning else f"{args.prompt_tokens} + {tokens} tokens, batch 1"
    print(
        f"{args.arch}, {parameters / 1e6:.1f}M parameters, {what}, float32, {args.threads} threads, "
        f"torch {torch.__version__}, medians of {args.repeats}\n"
    )
    print(f"| {'':22} | tokens/s | ours is |\n|{'-' * 24}|---------:|--------:|")
    ratios = {}
    for name, taken in seconds.items():
        ratios[name] = statistics.median(b / a for a, b in zip(seconds[OURS], taken, strict=True))
        print(f"| {name:22} | {tokens / statistics.median(taken):8.1f} | {ratios[name]:6.2f}x |")
    if not is_tuning:
        table = model.position_embedding_table  # the one weight that a step does not read
        read = 4 * (parameters - (0 if table is None else table.weight.numel()))
        limit = read_bandwidth() / read
        rate = tokens / statistics.median(seconds[OURS])
        print(f"| {'limit of memory':22} | {limit:8.1f} | {rate / limit:6.2f}x |")
    rows = []
    for name, bar in BARS[args.arch, args.part].items():
        if name in ratios:
            ours, peer = (f"{tokens / statistics.median(seconds[way]):.1f} tokens/s" for way in (OURS, name))
            rows.append(Row(f"{args.part}, 124M {args.arch}, {name}", ratios[name], bar, "x", True, ours, peer))
    hand_over(rows)


if __name__ == "__main__":
    main()
