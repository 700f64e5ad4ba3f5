"""The table of docs/own_loop.md: which optimizers and schedulers go on exactly under which wrappers.

python -m tests.makers.own_loop prints it; it needs the packages of requirements-full.txt, and takes minutes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.optim import lr_scheduler

from core.checkpoint import CheckpointManager
from core.errors import InputError
from tests.makers.optimizers import Counting

STEPS = 5


def of_torch(name: str, **settings: Any) -> Callable[[Any], Any]:
    return lambda parameters: getattr(torch.optim, name)(parameters, **{"lr": 0.01, **settings})


def of_package(package: str, name: str, lr: float = 0.01) -> Callable[[Any], Any]:
    def make(parameters: Any) -> Any:
        made = getattr(__import__(package), name)(parameters, lr=lr)
        if hasattr(made, "train"):
            made.train()
        return made

    return make


def muon_and_adamw(parameters: Any) -> dict[str, Any]:
    parameters = list(parameters)
    matrices, rest = [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() != 2]
    return {"muon": torch.optim.Muon(matrices, lr=0.01), "adamw": torch.optim.AdamW(rest, lr=0.02)}


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    **{name: of_torch(name) for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD")},
    "LBFGS": of_torch("LBFGS", max_iter=3),
    "Muon with AdamW": muon_and_adamw,
    **{name: of_torch(name) for name in ("NAdam", "RAdam", "RMSprop", "Rprop")},
    "SGD with momentum": of_torch("SGD", momentum=0.9),
    "SparseAdam": of_torch("SparseAdam"),
    "Lion": of_package("lion_pytorch", "Lion"),
    "Prodigy": of_package("prodigyopt", "Prodigy", 1.0),
    "AdamWScheduleFree": of_package("schedulefree", "AdamWScheduleFree"),
    "SGDScheduleFree": of_package("schedulefree", "SGDScheduleFree"),
    "tensors in its groups": Counting,
}

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 6]),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.5)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
}


class Loop(NamedTuple):
    """What a loop trains with."""

    net: Any
    optimizers: dict[str, Any]
    scheduler: Any
    backward: Callable[[torch.Tensor], object]


def plain(net: nn.Module, optimizers: dict[str, Any], scheduler: Any) -> Loop:
    return Loop(net, optimizers, scheduler, torch.Tensor.backward)


def compiled(net: nn.Module, optimizers: dict[str, Any], scheduler: Any) -> Loop:
    torch._dynamo.reset()
    return Loop(torch.compile(net, backend="aot_eager"), optimizers, scheduler, torch.Tensor.backward)


def accelerated(net: nn.Module, optimizers: dict[str, Any], scheduler: Any) -> Loop:
    import accelerate

    made = accelerate.Accelerator(cpu=True)
    net, scheduler, *prepared = made.prepare(net, scheduler, *optimizers.values())
    return Loop(net, dict(zip(optimizers, prepared, strict=True)), scheduler, made.backward)


def fabricated(net: nn.Module, optimizers: dict[str, Any], scheduler: Any) -> Loop:
    import lightning_fabric

    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    net, *prepared = fabric.setup(net, *optimizers.values())
    return Loop(net, dict(zip(optimizers, prepared, strict=True)), scheduler, fabric.backward)


def parallel(net: nn.Module, optimizers: dict[str, Any], scheduler: Any) -> Loop:
    return Loop(nn.parallel.DistributedDataParallel(net), optimizers, scheduler, torch.Tensor.backward)


WRAPPERS = {"plain": plain, "compile": compiled, "accelerate": accelerated, "Fabric": fabricated, "DDP": parallel}


def fresh(optimizer: str, scheduler: str, wrapper: str) -> Loop:
    """A new loop: the same weights each time."""
    torch.manual_seed(0)
    if optimizer == "SparseAdam":
        net: nn.Module = nn.EmbeddingBag(5, 4, sparse=True, mode="sum")
    else:
        net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 3), nn.LayerNorm(3))
    made = OPTIMIZERS[optimizer](net.parameters())
    optimizers = made if isinstance(made, dict) else {"": made}
    return WRAPPERS[wrapper](net, optimizers, SCHEDULERS[scheduler](next(iter(optimizers.values()))))


def train(loop: Loop, steps: range, sparse: bool) -> None:
    losses: list[float] = []
    for i in steps:

        def closure(i: int = i) -> torch.Tensor:
            for optimizer in loop.optimizers.values():
                optimizer.zero_grad()
            out = loop.net(torch.tensor([[i % 5, (i + 1) % 5]]) if sparse else torch.randn(3, 4))
            loss = (out - 1).square().mean()
            loop.backward(loss)
            losses.append(loss.item())
            return loss

        for optimizer in loop.optimizers.values():
            optimizer.step(closure)
        by_loss = isinstance(vars(loop.scheduler).get("scheduler", loop.scheduler), lr_scheduler.ReduceLROnPlateau)
        loop.scheduler.step(*(losses[-1:] if by_loss else []))


def outcome(optimizer: str, scheduler: str, wrapper: str) -> str:
    """Whether 5 steps, a save, a load and 5 steps are 10 steps, bit for bit; or that the save was refused.

    Raises: AssertionError when neither.
    """
    names, sparse = (optimizer, scheduler, wrapper), optimizer == "SparseAdam"
    loop = fresh(*names)
    train(loop, range(2 * STEPS), sparse)
    want = [p.detach().clone() for p in loop.net.parameters()]

    def saved(loop: Loop) -> Any:
        return loop.optimizers[""] if loop.optimizers.keys() == {""} else loop.optimizers

    with tempfile.TemporaryDirectory() as root:
        loop = fresh(*names)
        train(loop, range(STEPS), sparse)
        with CheckpointManager("net", root, say=lambda line: None) as manager:
            try:
                manager.save(loop.net, saved(loop), step=STEPS, also={"scheduler": loop.scheduler, "rng": "all"})
            except InputError:
                return "refused"
        loop = fresh(*names)
        with torch.no_grad():
            for p in loop.net.parameters():
                p.fill_(float("nan"))
        said: list[str] = []
        manager = CheckpointManager("net", root, say=said.append)
        assert manager.load(loop.net, saved(loop), also={"scheduler": loop.scheduler, "rng": "all"}) == STEPS
        assert not said, said
        train(loop, range(STEPS, 2 * STEPS), sparse)
    for a, b in zip(want, loop.net.parameters(), strict=True):
        assert torch.equal(a, b), names
    return "exact"


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process, for DDP."""
    with tempfile.TemporaryDirectory() as folder:
        store = distributed.FileStore(os.fspath(Path(folder) / "store"), 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()


def rows() -> Iterator[str]:
    """The table, a line each."""
    yield f"| | {' | '.join(WRAPPERS)} |"
    yield "|---" * (1 + len(WRAPPERS)) + "|"
    for name in OPTIMIZERS:
        yield f"| {name} | {' | '.join(outcome(name, 'StepLR', wrapper) for wrapper in WRAPPERS)} |"
    for name in SCHEDULERS:
        if name != "StepLR":
            yield f"| AdamW, {name} | {' | '.join(outcome('AdamW', name, wrapper) for wrapper in WRAPPERS)} |"


def table() -> list[str]:
    """The table as docs/own_loop.md has it."""
    with warnings.catch_warnings(), one_rank():
        warnings.simplefilter("ignore")  # of other packages
        return list(rows())


if __name__ == "__main__":
    print("\n".join(table()))
