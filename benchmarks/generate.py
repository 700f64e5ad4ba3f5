"""Tokens per second at GPT-2's smallest size: with the cache, without it, and transformers' cached generate.

All run in one process and take turns, so that they meet the same machine; medians are compared.

    python benchmarks/generate.py                                    # 124M parameters, 256 new tokens: some minutes
    python benchmarks/generate.py --new_tokens 32 --repeats 2        # a quick look
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.config.gpt import GPTConfig
from core.model import GPT

CACHED, UNCACHED, PEER = "ours, cached", "ours, no cache", "transformers, cached"
BARS = ((UNCACHED, 5.0), (PEER, 1.0))
"""What the cached generation must be at least, as a multiple of each other row."""


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


def transformers_generate(config: GPTConfig, prompt: Tensor, new_tokens: int) -> Callable[[], object] | None:
    """transformers' greedy cached generation by a model of equal size, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
        )
    ).eval()
    settings = transformers.GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0
    )
    mask = torch.ones_like(prompt)
    return lambda: peer.generate(prompt, attention_mask=mask, generation_config=settings)


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, taking turns; one round before that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            print(f"\rround {turn} of {repeats}: {name:24}", end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--prompt_tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--n_layer", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    config = GPTConfig(
        n_layer=args.n_layer, n_head=12, n_embd=768, vocab_size=50304, block_size=1024,
        bias=True, tied_head=True, head_bias=False, activation="gelu_tanh", dropout=0.0,
    )  # fmt: skip
    model = GPT(config).eval()
    parameters = sum(p.numel() for p in model.parameters())
    prompt = torch.randint(config.vocab_size, (1, args.prompt_tokens))
    runs: dict[str, Callable[[], object]] = {
        CACHED: lambda: model.generate(prompt, args.new_tokens, temperature=0.0),
        UNCACHED: lambda: model.generate(prompt, args.new_tokens, temperature=0.0, use_cache=False),
    }
    if peer := transformers_generate(config, prompt, args.new_tokens):
        runs[PEER] = peer
    else:
        print("transformers is not installed: its row is left out", file=sys.stderr)
    rate = {n: args.new_tokens / statistics.median(s) for n, s in measure(runs, args.repeats).items()}

    # The position table is the one weight that a step does not read.
    read = 4 * (parameters - model.position_embedding_table.weight.numel())
    print(
        f"{parameters / 1e6:.1f}M parameters, {args.prompt_tokens} + {args.new_tokens} tokens, batch 1, float32, "
        f"{args.threads} threads, torch {torch.__version__}, median of {args.repeats}\n"
    )
    print(f"| {'':22} | tokens/s | ours is |\n|{'-' * 24}|---------:|--------:|")
    for name, value in rate.items():
        print(f"| {name:22} | {value:8.1f} | {rate[CACHED] / value:6.2f}x |")
    limit = read_bandwidth() / read
    print(f"| {'limit of memory':22} | {limit:8.1f} | {rate[CACHED] / limit:6.2f}x |\n")
    for name, bar in BARS:
        if name in rate:
            met = "met" if rate[CACHED] >= bar * rate[name] else "MISSED"
            print(f"bar: {bar:g}x {name}: {met} ({rate[CACHED] / rate[name]:.2f}x)")


if __name__ == "__main__":
    main()
