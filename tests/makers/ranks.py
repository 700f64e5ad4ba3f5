"""Training runs of several processes: started by torchrun, or, where that does not matter, forked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.conftest import ROOT

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "gradient_accumulation_steps": 2}
SIZES |= {"eval_iters": 3, "dropout": 0, "device": "cpu", "model_name": "dante"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def arguments(root: Path, text: Path, *words: str, **flags) -> list[str]:
    sizes = {**SIZES, "checkpoint_root": root, "input_file": text, **flags}
    pairs = [word for name, value in sizes.items() if value is not None for word in (f"--{name}", str(value))]
    return [*pairs, *words]


def torchrun(ranks: int, restarts: int = 0) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    return [sys.executable, *launch, f"--nproc_per_node={ranks}", f"--max_restarts={restarts}", str(ROOT / "train.py")]


def finished(command: list[str], folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    variables = {**ENVIRONMENT, **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)


def train(root: Path, text: Path, ranks: int, *words: str, **flags) -> subprocess.CompletedProcess[str]:
    """Train to the end on some ranks; on none: in a process that knows nothing of ranks."""
    forked = ["-m", "tests.makers.forked", str(ranks), "train"] if ranks else ["train.py"]
    return finished([sys.executable, *forked, *arguments(root, text, *words, **flags)])


def start(root: Path, text: Path, ranks: int, *words: str, restarts: int = 0, **flags) -> subprocess.Popen[str]:
    """Start a run whose ranks a test will meddle with; its output goes to a file, `output_of`."""
    with (root / "output.txt").open("w") as output:
        command = [*torchrun(ranks, restarts), *arguments(root, text, *words, **flags)]
        return subprocess.Popen(command, cwd=root, env=ENVIRONMENT, stdout=output, stderr=output, text=True)


def output_of(root: Path) -> str:
    return (root / "output.txt").read_text(errors="replace")


def processes(run: subprocess.Popen[str]) -> dict[int, int]:
    """The process of each rank that lives, from /proc: children of torchrun that have a RANK."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0") if parent == run.pid else []
        except (OSError, ValueError, IndexError):
            continue
        rank = next((v.removeprefix(b"RANK=") for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank)] = int(folder.name)
    return found


def wait_for(run: subprocess.Popen[str], root: Path, step: int) -> None:
    """Wait until a step is saved."""
    end = time.monotonic() + 120
    while time.monotonic() < end and run.poll() is None:
        try:
            if json.loads((root / "dante/training_state.json").read_text())["step"] >= step:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not saved: {output_of(root)}")


def kill(process: int, number: signal.Signals) -> bool:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True


def losses(root: Path, name: str = "dante", key: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def saved(root: Path, name: str = "dante") -> tuple[dict, dict]:
    """Weights and optimizer state of a plain bundle, as plain PyTorch reads them."""
    files = (root / name / "model.pt", root / name / "optimizer.pt")
    weights, moments = (torch.load(file, weights_only=True) for file in files)
    return weights, moments


def same(a, b) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
