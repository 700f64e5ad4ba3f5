"""What is saved and loaded in the measurements: a GPT whose AdamW has made a step; and the machine they ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from core.config.gpt import GPTConfig
from core.loading.optimizer import configure_optimizer
from core.model import GPT
from core.networks.device import seed_generator

SIZES = {
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
    "small": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 256},
}
"""GPT-2 small, 1.49 GB with its moments; and one to try the program with."""

TOY = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 128}
"""The preset of train.py on a CPU: 3 MB with its moments."""

FIELDS = {"tied_head": True, "head_bias": False, "bias": True, "dropout": 0.0, "device": "cpu"}


def config_of(sizes: dict[str, int]) -> GPTConfig:
    """The config of a GPT of these sizes as GPT-2 has it: biases, a tied head."""
    return GPTConfig.from_dict({**sizes, **FIELDS})


class Trained:
    """A model, its optimizer, and a step of training with random tokens."""

    def __init__(self, sizes: dict[str, int], tokens: int, rows: int = 1) -> None:
        seed_generator(1, torch.device("cpu"))
        self.model = GPT(config_of(sizes)).train()
        self.optimizer = configure_optimizer(self.model, 1e-4)
        self.batch = torch.randint(sizes["vocab_size"], (2, rows, min(tokens, sizes["block_size"])))
        self.update()

    def update(self) -> None:
        """Make one step."""
        self.model(*self.batch)[1].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and moments."""
        state = self.optimizer.state.values()
        moments = sum(t.nbytes for values in state for t in values.values() if isinstance(t, torch.Tensor))
        return moments + sum(p.nbytes for p in self.model.parameters())


def machine() -> dict[str, object]:
    """What a figure depends on besides the program."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def machine_line() -> str:
    """The machine in a line."""
    found = machine()
    return "{cores} cores, {cpu}, load {load[0]}, torch {torch}, Python {python}".format(**found)
