"""How long a save in shards stops training: ours, dcp.save and dcp.async_save, on gloo ranks of this machine.

    python benchmarks/distributed.py [--ranks 4] [--rounds 3] [--n_layer 12] [--n_embd 768] [--folder DIR]

A round trains a step, saves, trains a step beside the save, and waits until it is durable, for each way in turn.
Blocked is what the training thread spends in the save and in waiting for it before the next update; for ours and for
dcp.async_save the forward and backward pass in between run beside the copy. Medians of the rounds, of the slowest rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp

from benchmarks.rows import against, hand_over
from core.checkpoint import CheckpointManager
from core.config.gpt import GPTConfig
from core.data.tokenizer import make_char
from core.loading.optimizer import configure_optimizer
from core.model import GPT
from core.networks.distributed import World, open_world
from core.training.ranks import WorldRanks

WAYS = ("ours", "dcp.async_save", "dcp.save")


class Trainer:
    """A model in shards, its optimizer, and the three ways to save them."""

    def __init__(self, world: World, args: argparse.Namespace, folder: Path) -> None:
        self.world, self.folder, self.step = world, folder, 0
        config = GPTConfig(
            n_layer=args.n_layer, n_head=12, n_embd=args.n_embd, vocab_size=50304, block_size=1024, dropout=0.0
        )
        torch.manual_seed(1)
        self.model = GPT(config)
        self.model.tokenizer = make_char(["abc"])
        world.spread(self.model, "cpu")
        self.optimizer = configure_optimizer(self.model, 1e-4)
        self.manager = CheckpointManager("ours", folder, ranks=WorldRanks(world), keep=0, say=lambda _: None)
        self.ids = torch.randint(50304, (1, args.tokens))
        # In the group of training, the thread of dcp.async_save and the loop wait for each other for ever.
        self.aside = torch.distributed.new_group(backend="gloo")
        self.waited = 0.0
        self.pending: Any = None
        # Registered before the manager's own, and so called before it: the wait of ours is timed around it.
        self.optimizer.register_step_pre_hook(lambda *_: self._before_update())

    def compute(self) -> None:
        """The forward and backward pass of one step."""
        self.model(self.ids, self.ids)[1].backward()

    def update(self) -> None:
        """Update the weights, which waits for what is still being copied."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _before_update(self) -> None:
        started = time.perf_counter()
        if self.pending is not None:
            staging = getattr(self.pending, "staging_completion", None)
            if staging is not None:
                staging.result()
        else:
            self.manager._saver.wait_copied()
        self.waited = time.perf_counter() - started

    def state(self) -> dict[str, Any]:
        """The same tensors for torch's own savers."""
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        names = {p: name for name, p in self.model.named_parameters()}
        moments = {f"{names[p]}.{key}": v for p, values in self.optimizer.state.items() for key, v in values.items()}
        return {"model": weights, "optimizer": moments}

    def ours(self) -> Callable[[], None]:
        """Save by the manager."""
        self.manager.save(self.model, self.optimizer, step=self.step)
        return self.manager.wait

    def dcp_save(self) -> Callable[[], None]:
        """Save by dcp.save, which returns when all is on disk."""
        dcp.save(self.state(), checkpoint_id=self.folder / "dcp")
        return lambda: None

    def dcp_async_save(self) -> Callable[[], None]:
        """Save by dcp.async_save."""
        self.pending = dcp.async_save(self.state(), checkpoint_id=self.folder / "dcp_async", process_group=self.aside)
        done = getattr(self.pending, "upload_completion", self.pending)
        return lambda: done.result() and None

    def round(self, way: str) -> tuple[float, float, float]:
        """Save once; returns seconds blocked, until durable, and of the pass beside it, of the slowest rank."""
        self.pending = None
        self.compute()
        self.update()
        self.world.everyone(None)
        started = time.perf_counter()
        wait = {"ours": self.ours, "dcp.save": self.dcp_save, "dcp.async_save": self.dcp_async_save}[way]()
        called = time.perf_counter() - started
        self.compute()
        computed = time.perf_counter() - started - called
        self.update()
        blocked = called + self.waited
        wait()
        wall = time.perf_counter() - started
        self.world.everyone(None)
        for name in ("dcp", "dcp_async"):
            if self.world.is_first:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        mine = [blocked, wall, computed]
        return tuple(max(values) for values in zip(*self.world.everyone(mine), strict=True))  # type: ignore[return-value]


def measure(world: World, args: argparse.Namespace, folder: Path) -> None:
    """Run the rounds, and print the medians on the first rank."""
    trainer = Trainer(world, args, folder)
    trainer.compute()
    trainer.update()
    size = sum(p.numel() for p in trainer.model.parameters()) * 12
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    with trainer.manager:
        for number in range(args.rounds + 1):  # the first warms up: memory is allocated in it
            for way in WAYS:
                times = trainer.round(way)
                if number:
                    found[way].append(times)
    if not world.is_first:
        return
    rows = {way: [statistics.median(column) for column in zip(*times, strict=True)] for way, times in found.items()}
    what = f"{size / 1e9:.2f} GB of weights and moments, {args.rounds} rounds, torch {torch.__version__}"
    print(f"{world.size} gloo ranks, {what}")
    print(f"{'':16} {'blocked s':>10} {'durable s':>10} {'pass beside s':>14}")
    for way, (blocked, wall, computed) in rows.items():
        print(f"{way:16} {blocked:10.3f} {wall:10.2f} {computed:14.2f}")
    hand_over(
        [
            against(
                "blocked by a save, 4 ranks of FSDP, dcp.async_save", rows["ours"][0], rows["dcp.async_save"][0], 0.05
            )
        ]
    )
    if args.json:
        Path(args.json).write_text(json.dumps({"bytes": size, "ranks": world.size, "seconds": rows}, indent=2))


def main() -> int:
    """Fork the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"ranks": 4, "rounds": 3, "n_layer": 12, "n_embd": 768, "tokens": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder)")
    parser.add_argument("--json", help="write the figures to this file as well")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE=str(args.ranks))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        children = []
        for rank in range(args.ranks):
            if not (child := os.fork()):
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                torch.set_num_threads(1)  # not before the fork, which threads do not survive
                code = 1
                with contextlib.suppress(KeyboardInterrupt), open_world("fsdp") as world:
                    measure(world, args, Path(folder))
                    code = 0
                sys.stdout.flush()
                os._exit(code)
            children.append(child)
        return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256 for child in children)


if __name__ == "__main__":
    sys.exit(main())
