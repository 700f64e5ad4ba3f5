"""GPTFlexAttention over packed documents against GPTBatched with dense masks; fine-tuning in batches, or one by one.

Random weights at the size of modded-nanogpt small: 12 layers, 6 heads, 768 wide. The ways take turns; medians are
compared. Peak memory is what a process of its own needs above its weights (Linux). A GPU is used where there is one.

    python benchmarks/flex.py                                       # CPU: some minutes; a GPU: up to 65,536 tokens
    python benchmarks/flex.py --lengths 1024 --repeats 1 --n_layer 6     # a quick look
    OMP_NUM_THREADS=1 python benchmarks/flex.py --cpu_time               # on a machine that others use
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import Row, hand_over
from core.config.modded import GPT2_END
from core.config.variants import windows_of
from core.loading.optimizer import configure_optimizer
from core.model import GPTBatched
from core.networks.classification import GPTClassification
from core.networks.flex import GPTFlexAttention
from core.networks.modded import SCALE
from core.networks.windows import documents, mask

BAR = 1.15
"""Fine-tuning at batch 16 against 16 calls at batch 1, on a CPU of two cores."""

BATCH, T = 16, 128
DOCUMENT = 512  # mean length of a packed document
VOCAB, HEADS, WIDTH = 50304, 6, 768


def make(n_layer: int, device: torch.device) -> GPTFlexAttention:
    """A model whose attention and feed-forwards are not the zeros that training starts from."""
    torch.manual_seed(0)
    model = GPTFlexAttention(VOCAB, n_layer, HEADS, WIDTH, 65536)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and "embed" not in name:
                p.normal_(std=0.02)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def pack(length: int, device: torch.device) -> Tensor:
    """Ids [T] in documents of random lengths."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(GPT2_END, (length,), generator=generator)
    ids[torch.rand(length, generator=generator) < 1 / DOCUMENT] = GPT2_END
    ids[0] = GPT2_END
    return ids.to(device)


def dense_forward(model: GPTBatched, ids: Tensor) -> Tensor:
    """GPTBatched over one packed row, as one would without flex attention: a mask [T, T] for each kind of layer."""
    docs = documents(ids, GPT2_END)
    masks = [mask(len(ids), docs, window, ids.device) for window in windows_of(model.variant, "exact")]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masks[0 if model.is_long(layer) else 1], scale=SCALE)

    return model.stream(ids[None], torch.arange(len(ids), device=ids.device), attend)[0]


def ways(model: GPTFlexAttention, kernels: list[str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is compared; features only, since the head costs all of them the same."""
    batched = GPTBatched.from_pretrained_gpt(model)

    def by(kernel: str) -> Callable[[Tensor], Tensor]:
        def forward(ids: Tensor) -> Tensor:
            model.kernel = kernel
            return model.forward_features(ids)

        return forward

    rows = {f"GPTFlexAttention, {kernel}": by(kernel) for kernel in kernels}
    return {**rows, "GPTBatched, dense masks": lambda ids: dense_forward(batched, ids)}


def clock(args: argparse.Namespace) -> float:
    """Seconds on the wall, or those that this process had a processor: the fairer ones where others use it too."""
    return time.process_time() if args.cpu_time else time.perf_counter()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def peak(args: argparse.Namespace, device: torch.device) -> float:
    """Bytes that one forward pass needs above what the model and the compiled kernel do."""
    forward = ways(make(args.n_layer, device), args.kernels)[args.way]
    ids = pack(args.lengths[0], device)
    forward(ids if "flex" in args.way or device.type == "cuda" else ids[:1024])  # compiles, and allocates what stays
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward(ids)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = peak_so_far()
    forward(ids)
    return peak_so_far() - before


def peak_so_far() -> int:
    """The largest memory this process has had since its peak was forgotten, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@torch.inference_mode()
def forward_speed(args: argparse.Namespace, device: torch.device) -> None:
    """Print tokens per second and peak memory of each way at each length."""
    model = make(args.n_layer, device)
    runs = ways(model, args.kernels)
    names = " | ".join(f"{name} | peak" for name in runs)
    print(f"| forward, tokens | {names} |\n|{'---|' * (2 * len(runs) + 1)}")
    for length in args.lengths:
        ids = pack(length, device)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(args.repeats + 1):
            for name, forward in runs.items():
                start = clock(args)
                forward(ids)
                wait(device)
                if turn:  # the first turn warms up, or compiles
                    seconds[name].append(clock(args) - start)
        dense = seconds["GPTBatched, dense masks"]
        cells = []
        for name, times in seconds.items():
            ratio = statistics.median(b / a for a, b in zip(times, dense, strict=True))
            memory = peak_of(args, name, length)
            cells.append(f"{length / statistics.median(times):,.0f}/s ({ratio:.2f}x) | {memory / 2**20:,.0f} MiB")
        print(f"| {length:,} | {' | '.join(cells)} |", flush=True)


def peak_of(args: argparse.Namespace, way: str, length: int) -> float:
    """Measure peak memory in a process of its own: a process cannot forget its peak."""
    command = [sys.executable, __file__, "--way", way, "--lengths", str(length), "--n_layer", str(args.n_layer)]
    command += ["--kernels", *args.kernels, "--device", args.device]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Tuning:
    """Fine-tuning of a classifier on 16 texts, in micro-batches of any size."""

    def __init__(self, model: GPTFlexAttention) -> None:
        self.classifier = GPTClassification(GPTBatched.from_pretrained_gpt(model), 3).train().to(model.device)
        self.optimizer = configure_optimizer(self.classifier, 1e-5)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(GPT2_END, (BATCH, T), generator=generator).to(model.device)
        self.labels = torch.randint(3, (BATCH,), generator=generator).to(model.device)

    def run(self, size: int, every: bool) -> None:
        """Forward and backward for all texts, with one step at the end, or one after every micro-batch."""
        for start in range(0, BATCH, size):
            ids, labels = self.ids[start : start + size], self.labels[start : start + size]
            loss = self.classifier(ids, torch.ones_like(ids), labels)[1]
            (loss * size / BATCH).backward()
            if every or start + size == BATCH:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)


def tuning_speed(args: argparse.Namespace, device: torch.device) -> None:
    """Print the throughput of fine-tuning in one batch, and in 16 calls with one step or with 16."""
    tuning = Tuning(make(args.n_layer, device))
    rows = {
        "batch 16": (BATCH, False),
        "16 calls at batch 1, one step": (1, False),
        "16 calls at batch 1, a step each": (1, True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(args.repeats + 1):
        for name, (size, every) in rows.items():
            start = clock(args)
            tuning.run(size, every)
            wait(device)
            if turn:
                seconds[name].append(clock(args) - start)
    print(f"\n| fine-tuning, T = {T} | speed | batch 16 is |\n|---|---|---|")
    made: list[Row] = []
    for name, times in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds["batch 16"], times, strict=True))
        speed = f"{BATCH * T / statistics.median(times):,.0f} tokens/s"
        print(f"| {name} | {speed} | {ratio:.2f}x |", flush=True)
        made.append(Row(f"fine-tuning a modded model at batch 16, {name}", ratio, BAR, "x", True, peer=speed))
    hand_over([replace(row, ours=made[0].peer) for row in made[1:]])


def main() -> None:
    """Measure both parts, or the memory of one way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the packed sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--kernels", nargs="+", default=["sdpa", "flex"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu_time", action="store_true", help="for a busy machine; with OMP_NUM_THREADS=1")
    parser.add_argument("--part", choices=("forward", "tuning", "both"), default="both")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.lengths is None:
        args.lengths = [1024, 4096, 8192] + ([16384, 32768, 65536] if device.type == "cuda" else [])
    if args.way:
        print(json.dumps(peak(args, device)))
        return
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{where}, torch {torch.__version__}, {args.n_layer} layers, median of {args.repeats} turns, "
        f"{'time of the processor' if args.cpu_time else 'time on the wall'}\n"
    )
    if args.part != "tuning":
        forward_speed(args, device)
    if args.part != "forward":
        tuning_speed(args, device)


if __name__ == "__main__":
    main()
