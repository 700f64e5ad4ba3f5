"""Ranks: the processes that train one model together, as torchrun starts them.

Only this file reads RANK and WORLD_SIZE. The ranks of a step share its global batch, batch_size times
gradient_accumulation_steps sequences: its micro-steps are divided among the ranks and, with more ranks than
micro-steps, so are the rows of each.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from ..console.commandline import FAILED
from ..console.commands import typed
from ..console.signals import WISHES
from ..errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

PARALLEL = ("ddp", "fsdp")
"""The values of --parallel: a copy of the model on each rank, or a shard of it."""

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for one that is alive but silent; it learns at once of one that is gone."""


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch: some of its micro-steps, and some rows of each."""

    micro_steps: range
    rows: slice


class World:
    """The ranks of this run, and the number of this one; one process unless torchrun started several."""

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, parallel: str | None = None, group: Any = None
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.parallel, self._group = parallel, group
        self._unread: torch.Tensor | None = None

    @classmethod
    def joined(cls, parallel: str = "ddp") -> World:
        """The ranks of the process group that the program has initialized itself; one process where it has none."""
        if group_size() == 1:
            return ALONE
        from torch import distributed

        gloo = distributed.get_backend() == "gloo"  # another one has no messages between CPUs
        group = None if gloo else distributed.new_group(backend="gloo", timeout=TIMEOUT)
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return cls(distributed.get_rank(), distributed.get_world_size(), local, parallel, group)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints, logs and commits."""
        return self.rank == 0

    @property
    def noise(self) -> tuple[int, ...]:
        """The number that this rank adds to the seed of its dropout; 0 on the first one, as in a single process."""
        return (self.rank,) if self.rank else ()

    def share(self, batch_size: int, accumulation: int) -> Share:
        """Cut this rank's part from the global batch.

        Raises: InputError when the ranks cannot have equal parts.
        """
        columns = math.gcd(accumulation, self.size)
        parts = self.size // columns
        if batch_size % parts:
            raise InputError(
                f"{self.size} ranks share batch_size {batch_size} x gradient_accumulation_steps {accumulation}: found "
                f"{parts} ranks for the {batch_size} rows of a micro-step, expected a divisor. Use another "
                "--nproc_per_node, --batch_size or --gradient_accumulation_steps."
            )
        column, part = divmod(self.rank, parts)
        steps, rows = accumulation // columns, batch_size // parts
        return Share(range(column * steps, (column + 1) * steps), slice(part * rows, (part + 1) * rows))

    def device_of(self, wish: str) -> str:
        """The device of this rank for a requested one: where a machine has several GPUs, each rank has its own."""
        if self.size > 1 and wish.startswith("cuda:"):
            return "cuda"
        return wish

    def refuse_fp16_shards(self, dtype: str) -> None:
        """Raise InputError for fp16 in shards: each would choose a loss scale of its own."""
        if self.is_sharded and dtype == "fp16":
            raise InputError("--parallel fsdp: found --dtype fp16, whose scale each shard would choose. Use bf16.")

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has a shard of the model."""
        return self.parallel == "fsdp"

    def beside(self) -> World:
        """Give a thread its own process group, so that its messages do not mix with those of the training loop."""
        if self.size == 1:
            return self
        from torch import distributed

        group = distributed.new_group(backend="gloo", timeout=TIMEOUT)
        return World(self.rank, self.size, self.local_rank, self.parallel, group)

    def spread(self, model: Any, device: str) -> None:
        """Shard every parameter of a model over the ranks (FSDP2); they are gathered block by block during computation.

        Every rank must call it.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # It is about the logits, which are a view that is never changed in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(device, (self.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a model whose backward pass averages gradients over the ranks, as a sharded one does already."""
        if self.size == 1 or self.parallel != "ddp":
            return model
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def without_sync(self, forward: nn.Module, last: bool) -> Iterator[None]:
        """Keep gradients local to this rank while the block runs, unless it is the last micro-step.

        Where each rank has a shard, it holds whole gradients until then.
        """
        wrapped: Any = getattr(forward, "_orig_mod", forward)
        if hasattr(wrapped, "set_requires_gradient_sync"):
            wrapped.set_requires_gradient_sync(last)
        with wrapped.no_sync() if hasattr(wrapped, "no_sync") and not last else contextlib.nullcontext():
            yield

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all ranks, in place. Every rank must call it, with the same shape and dtype."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(values, group=self._group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank. Every rank must call it."""
        if self.size == 1:
            return flag
        import torch

        return bool(self.sum(torch.tensor(float(flag))).item())

    def wishes(self, mine: set[str]) -> set[str]:
        """The requests (see console/signals.py) of all ranks together. Every rank must call it."""
        if self.size == 1:
            return mine
        import torch

        return self.at_edge(torch.zeros(()), mine)

    def at_edge(self, loss: torch.Tensor, mine: set[str]) -> set[str]:
        """Average the loss of a step [] over the ranks, in place, and return the requests of all; one collective.

        Every rank must call it at the same step. It does not wait for a GPU, whose sum is read at
        the next edge, on all ranks alike.
        """
        if self.size == 1:
            return mine
        import torch

        flags = [float(name in mine) for name in WISHES]
        both = torch.cat([loss.detach().float().reshape(1) / self.size, torch.tensor(flags).to(loss.device)])
        self.sum(both)
        loss.copy_(both[0])
        read: torch.Tensor | None = both
        if loss.device.type != "cpu":
            read, self._unread = self._unread, both
        counts = read[1:].tolist() if read is not None else []
        return {name for name, count in zip(WISHES, counts, strict=False) if count}

    def from_first(self, value: Any = None) -> Any:
        """Give every rank the plain value of the first; the others' values are ignored. Every rank must call it."""
        if self.size == 1:
            return value
        from torch import distributed

        held = [value]
        distributed.broadcast_object_list(held, src=0, group=self._group)
        return held[0]

    def to_first(self, value: Any) -> list[Any]:
        """Give the first rank the plain values of all by rank, the others an empty list. Every rank must call it."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] | None = [None] * self.size if self.is_first else None
        distributed.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def everyone(self, value: Any) -> list[Any]:
        """Give every rank the plain values of all of them, by rank. Every rank must call it."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, what: str, value: Any) -> None:
        """Check that all ranks have the same value. Every rank must call it.

        Raises: CheckpointError naming the first rank whose value differs.
        """
        values = self.everyone(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise CheckpointError(
                    f"{what}: found {other} on rank {rank}, expected {values[0]} as on rank 0. All ranks need the same "
                    "files; nothing was changed."
                )


ALONE = World()
"""The world of a single process."""


def group_size() -> int:
    """How many processes the program's process group has; 1 where it has initialized none."""
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that may be sharded on every rank; for a sharded tensor every rank must call it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rank_of_torchrun() -> int:
    """The number of this process among those that torchrun started; 0 without torchrun."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() and "WORLD_SIZE" in os.environ else 0


@contextlib.contextmanager
def open_world(parallel: str | None) -> Iterator[World]:
    """Join the ranks that torchrun started while the block runs; without torchrun, yield a world of one process.

    Only the first rank's output is shown. An error on any rank ends all: the first one to fail reports why, the others
    end silently, each with exit code 1, without waiting for an answer of another rank.

    Raises: InputError when --parallel is given without torchrun.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if parallel:
            raise InputError(
                f"--parallel {parallel}: found one process, expected several. Start them with "
                f"{typed('torchrun --nproc_per_node=N train.py')} ..."
            )
        yield ALONE
        return
    import torch
    from torch import distributed

    shared, rank, size = next(iter(distributed.rendezvous("env://", timeout=TIMEOUT)))
    # torchrun keeps one store over its restarts, which may have addresses of processes that are gone.
    store = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
    world = World(rank, size, int(os.environ.get("LOCAL_RANK", "0")), parallel or "ddp")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        with _silent(not world.is_first):
            yield world
    except Exception as error:
        # Destroying the groups waits for pending collectives, which the other ranks may never answer; and where DDP was
        # the last to use a group it does so with the GIL, which the thread that ends a collective needs.
        atexit.register(_leave)
        if not _claim(store, rank):
            sys.exit(1)
        if isinstance(error, CheckpointError) and size > 1:
            raise type(error)(f"rank {rank}: {error}") from error
        if _lost_a_peer(error):
            raise CheckpointError(
                f"rank {rank}: another rank is gone ({str(error).splitlines()[0][:200]}). The last committed step is "
                "intact; the same command continues from it, and torchrun --max_restarts does so by itself."
            ) from error
        raise
    distributed.destroy_process_group()


def _leave() -> NoReturn:
    """End this process with exit code 1, before the interpreter can tear anything down."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(FAILED)


@contextlib.contextmanager
def _silent(quiet: bool) -> Iterator[None]:
    if not quiet:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,  # noqa: PTH123
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        yield


def _claim(store: Any, rank: int) -> bool:
    """Claim to be the one rank that reports why the run ends."""
    try:
        return store.compare_set("failed", "", str(rank)) == str(rank).encode()
    except RuntimeError:  # the store is gone with the process that kept it
        return True


def _lost_a_peer(error: Exception) -> bool:
    """Whether an error is that of a collective whose other side is gone."""
    from torch import distributed

    text = str(error)
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "Connection", "NCCL"))
    )
