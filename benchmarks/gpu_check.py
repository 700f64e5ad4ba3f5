"""What only a GPU can show, in at most eight minutes on a large one: one line of JSON for each part.

    python benchmarks/gpu_check.py                   # all parts, torch 2.11 or later with CUDA
    python benchmarks/gpu_check.py order stall       # some of them
    python benchmarks/gpu_check.py --small           # seconds, also on a CPU: whether the parts run at all

A part that fails says so in its line, and the others run. The exit status is 1 when one failed, or what it checks is
not so: a torn step, a change that was not refused, a resume under --deterministic with other bits.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.checkpoint import CheckpointManager
from core.config.gpt import GPTConfig
from core.data.dataloader import DataLoader
from core.data.tokens import Tokens
from core.errors import SaveFailed
from core.loading.optimizer import configure_optimizer
from core.model import GPT, GPTFlexAttention
from core.training.fit import fit
from core.training.schedule import Schedule

GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304, "batch_size": 32}
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "vocab_size": 128, "batch_size": 2}
TRAIN = "--n_layer 4 --n_head 6 --n_embd 384 --block_size 512 --eval_interval 20 --eval_iters 2"
SMALL_TRAIN = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 2 --eval_interval 20 --eval_iters 2"


class Bench:
    """The device, the sizes, and a folder for what the parts save."""

    def __init__(self, folder: Path, is_small: bool) -> None:
        self.folder, self.small = folder, is_small
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else None

    def model(self, **sizes: Any) -> GPT:
        """A GPT of 124M parameters, or a tiny one."""
        torch.manual_seed(1)
        fields = {**(TINY if self.small else GPT2), "dropout": 0.0, "device": str(self.device), **sizes}
        with torch.device(self.device):
            return GPT(GPTConfig.from_dict(fields)).to(self.device)

    def loader(self, model: GPT) -> DataLoader:
        """Random tokens."""
        config, noise = model.config, np.random.default_rng(0)
        ids = noise.integers(0, config.vocab_size - 1, 20_000 if self.small else 4_000_000).astype(np.uint16)
        tokens = Tokens([ids], vocab_size=config.vocab_size, where="noise")
        return DataLoader(tokens, tokens, block_size=config.block_size, batch_size=config.batch_size, seed=1)

    def manager(self, name: str) -> CheckpointManager:
        """A manager that says nothing."""
        return CheckpointManager(name, self.folder, say=[].append)

    def update(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """A step of training with few tokens."""
        ids = torch.arange(16, device=self.device)[None]
        model(ids, ids)[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    def occupy(self, cycles: float) -> None:
        """Queue work of some cycles, about two million a millisecond; on a CPU there is no queue."""
        if self.device.type == "cuda":
            torch.cuda._sleep(int(cycles))

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long some work takes until the device is done."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start


def pinned(bench: Bench) -> dict[str, Any]:
    """How fast memory is pinned, and copied into from the device, in the blocks of a save."""
    if bench.device.type != "cuda":
        return {"skipped": "needs CUDA"}
    size, block = 256 << 20, 4 << 20
    source, found = torch.zeros(size, dtype=torch.uint8, device=bench.device), {}
    start = time.perf_counter()
    target = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    found["pinned_GB_per_s"] = size / (time.perf_counter() - start) / 1e9

    def copies() -> None:
        for at in range(0, size, block):
            target[at : at + block].copy_(source[at : at + block], non_blocking=True)

    copies()
    found["copied_GB_per_s"] = size / min(bench.seconds(copies) for _ in range(5)) / 1e9
    return found


def order(bench: Bench) -> dict[str, Any]:
    """What is saved is the state at `save`, though the device is far behind; a change on the way is refused."""
    model, manager = bench.model(**({} if bench.small else {"n_layer": 6})), bench.manager("order")
    optimizer, torn, refused = configure_optimizer(model, 1e-3), 0, 0
    saved = bench.folder / "order" / "model.pt"
    for step in range(1, 10):
        bench.update(model, optimizer)
        bench.occupy(4e8)
        wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        manager.save(model, optimizer, step=step)
        if is_changed := step > 6 and bench.device.type == "cuda":
            manager._saver._snapshot._copied.wait()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1)
        bench.update(model, optimizer)
        bench.update(model, optimizer)
        try:
            manager.wait()
        except SaveFailed:
            refused += is_changed
            continue
        found = torch.load(saved, weights_only=True)
        torn += any(not torch.equal(found[name], tensor.cpu()) for name, tensor in wanted.items())
    changed = 3 if bench.device.type == "cuda" else 0
    return {"torn": torn, "changed_and_refused": f"{refused} of {changed}", "ok": not torn and refused == changed}


def stall(bench: Bench) -> dict[str, Any]:
    """What a save costs: milliseconds of the host in `save` and in the next step, and of the device.

    Between the two the device is given 100 ms of work, as a forward and backward pass would: the copy runs beside it.
    """
    model, manager = bench.model(), bench.manager("stall")
    optimizer = configure_optimizer(model, 1e-4)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rows: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for step in range(1, 4 if bench.small else 13):
        is_saved = step % 2 == 0 or step == 1
        begin, end = (
            torch.cuda.Event(enable_timing=True) if bench.device.type == "cuda" else _Clock() for _ in range(2)
        )
        bench.wait()
        bench.occupy(1e8)  # the host is ahead of the device, as in training
        begin.record()
        started = time.perf_counter()
        if is_saved:
            manager.save(model, optimizer, step=step)
        called = time.perf_counter()
        bench.occupy(2e8)
        before = time.perf_counter()
        optimizer.step()
        stepped = time.perf_counter()
        end.record()
        bench.wait()
        manager.wait()
        rows[is_saved].append(((called - started) * 1e3, (stepped - before) * 1e3, begin.elapsed_time(end)))
    first, later, none = rows[True][0], _medians(rows[True][1:]), _medians(rows[False])
    return {
        "first_save_ms, step_ms, device_ms": first,
        "save_ms, step_ms, device_ms": later,
        "without: step_ms, device_ms": none[1:],
        "device_ms_more": later[2] - none[2],
    }


class _Clock:
    """An event of a device that is never behind."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: _Clock) -> float:
        return (other.at - self.at) * 1e3


def _medians(rows: list[tuple[float, ...]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def speed(bench: Bench) -> dict[str, Any]:
    """Tokens per second of `fit` and of nanoGPT's loop at 124M, each compiled, with the model in bf16 autocast."""
    steps = 4 if bench.small else 50
    model = bench.model()
    loader, optimizer = bench.loader(model), configure_optimizer(model, 1e-4)
    tokens = model.config.batch_size * model.config.block_size
    forward = model if bench.small else torch.compile(model)
    cast = torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.dtype is not None)

    def plain() -> None:
        for step in range(steps):
            x, y = loader.batch(step)
            if bench.device.type == "cuda":
                x, y = (part.pin_memory().to(bench.device, non_blocking=True) for part in (x, y))
            with cast:
                loss = forward(x, y)[1]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 9:
                loss.item()

    plain()
    theirs = tokens * steps / bench.seconds(plain)
    ours = bench.model()
    ours_optimizer, loader, stamps = configure_optimizer(ours, 1e-4), bench.loader(ours), []
    ours_optimizer.register_step_post_hook(lambda *_: stamps.append(time.perf_counter()))
    with contextlib.redirect_stderr(io.StringIO()):
        fit(
            ours,
            data_loader=loader,
            optimizer=ours_optimizer,
            max_iters=2 * steps,
            eval_interval=10**9,
            eval_iters=1,
            dtype=bench.dtype,
            compile=not bench.small,
            progress=False,
            schedule=Schedule("constant", 1e-4),
        )
    found = tokens * (steps - 1) / (stamps[-1] - stamps[steps])
    peak = torch.cuda.max_memory_allocated() / 1e9 if bench.device.type == "cuda" else None
    return {"fit_tokens_per_s": found, "nanogpt_loop_tokens_per_s": theirs, "ratio": found / theirs, "peak_GB": peak}


def exact(bench: Bench) -> dict[str, Any]:
    """Whether a run that was stopped ends with the bits of one that was not: under --deterministic, and without."""
    text = bench.folder / "text.txt"
    text.write_text("".join(np.random.default_rng(3).choice(list("abcdefgh \n"), 60_000)))
    found: dict[str, Any] = {}
    for name, flags in (("deterministic", "--deterministic"), ("default", "")):
        for model, stops in ((f"{name}_whole", (40,)), (f"{name}_again", (20, 40))):
            for stop in stops:
                line = f"train.py --model_name {model} --max_iters {stop} --device {bench.device.type} {flags}"
                line += f" {SMALL_TRAIN if bench.small else TRAIN} --input_file {text} --checkpoint_root {bench.folder}"
                _run([sys.executable, *line.split()])
        whole, again = ((bench.folder / f"{name}_{run}" / "model.pt").read_bytes() for run in ("whole", "again"))
        found[f"{name}_has_the_same_bits"] = whole == again
    return {**found, "ok": found["deterministic_has_the_same_bits"]}


def flex(bench: Bench) -> dict[str, Any]:
    """Tokens per second of flex attention and of SDPA over one packed sequence, and how far they differ."""
    sizes = (128, 6, 1, 128, 512) if bench.small else (50304, 12, 6, 768, 65536)
    torch.manual_seed(0)
    model = GPTFlexAttention(*sizes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and "embed" not in name:
                p.normal_(std=0.02)
    model = model.to(bench.device, bench.dtype or torch.float32)
    found: dict[str, Any] = {}
    for length in (256,) if bench.small else (4096, 16384, 65536):
        ids = torch.randint(sizes[0] - 1, (length,), device=bench.device)
        ids[::512] = sizes[0] - 1
        made, row = {}, {}
        for model.kernel in ("flex", "sdpa") if bench.device.type == "cuda" else ("sdpa",):
            with torch.no_grad():
                made[model.kernel] = model.forward_features(ids)
                row[model.kernel] = length / bench.seconds(lambda ids=ids: model.forward_features(ids))
        if len(made) == 2:
            row["largest_difference"] = (made["flex"].float() - made["sdpa"].float()).abs().max().item()
        found[f"{length}_tokens"] = row
    return found


def generate(bench: Bench) -> dict[str, Any]:
    """Tokens per second of generation, one text, cached."""
    model, count = bench.model().eval(), 8 if bench.small else 256
    prompt = torch.zeros(1, 16, dtype=torch.long, device=bench.device)
    model.generate(prompt, 8, seed=1, top_k=50)
    return {"tokens_per_s": count / bench.seconds(lambda: model.generate(prompt, count, seed=1, top_k=50))}


def fsdp(bench: Bench) -> dict[str, Any]:
    """A run of one rank in shards over NCCL saves, and goes on."""
    text = bench.folder / "fsdp.txt"
    text.write_text("".join(np.random.default_rng(3).choice(list("abcdefgh \n"), 60_000)))
    said = ""
    for stop in (10, 20):
        line = "-m torch.distributed.run --nproc_per_node=1 train.py --parallel fsdp --model_name shards --device "
        line += f"{bench.device.type} --max_iters {stop} {SMALL_TRAIN if bench.small else TRAIN} --input_file {text} "
        said = _run([sys.executable, *line.split(), "--checkpoint_root", str(bench.folder)])
    return {"ok": CheckpointManager("shards", bench.folder).saved_step() == 20, "said": said.splitlines()[-1:]}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: exit {done.returncode}: {done.stderr[-500:]}")
    return done.stderr


PARTS = {part.__name__: part for part in (pinned, order, stall, speed, exact, flex, generate, fsdp)}


def results(names: list[str], bench: Bench) -> Iterator[dict[str, Any]]:
    """Run the parts, each caught alone."""
    for name in names:
        start = time.perf_counter()
        try:
            found = PARTS[name](bench)
        except Exception:
            found = {"failed": traceback.format_exc()[-900:], "ok": False}
        yield {"part": name, **_rounded(found), "seconds": round(time.perf_counter() - start, 1)}
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny sizes, also on a CPU")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if not args.small and not torch.cuda.is_available():
        parser.error("no GPU is at hand; --small tries the parts on a CPU")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as place:
        bench, well = Bench(Path(place), args.small), True
        for line in results(args.parts or list(PARTS), bench):
            print(json.dumps(line), flush=True)
            well = well and line.get("ok", True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
