"""A GPU for tests: streams are threads with a queue, and what is queued is done later.

Tensors that were given to it count as its own, though they lie in the program's memory.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator

import torch

from core.saving import snapshot
from core.saving.block_memory import Blocks
from core.saving.copy_stream import CopyStream


class Stream:
    """Does what is queued, in order, each thing after `late` has let it."""

    def __init__(self, late: Callable[[], None] = lambda: None) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._late = late
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._queue.get()()

    def do(self, work: Callable[[], object]) -> None:
        """Queue work."""
        self._queue.put(lambda: (self._late(), work()))

    def mark(self) -> threading.Event:
        """An event that is set when all that was queued is done."""
        mark = threading.Event()
        self._queue.put(mark.set)
        return mark

    def wait_for(self, mark: threading.Event) -> None:
        """Do what is queued from now on when the event is set."""
        self._queue.put(lambda: mark.wait(60))

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""
        assert self.mark().wait(60)


class LateGpus:
    """GPUs by number; `late` is called before each copy is made."""

    def __init__(self, count: int = 1) -> None:
        self.late: Callable[[], None] = lambda: None
        self.computing = {torch.device("cuda", number): Stream() for number in range(count)}
        self.adopted: set[str] = set()
        self.pinned: list[int] = []
        self._held: dict[int, torch.device] = {}

    def hold(self, tensor: torch.Tensor, number: int = 0) -> None:
        """Count a tensor as one of this GPU."""
        self._held[tensor.untyped_storage().data_ptr()] = torch.device("cuda", number)

    def do(self, tensor: torch.Tensor, work: Callable[[], object]) -> None:
        """Queue work in the stream that computes on the GPU of a tensor."""
        self.computing[self._held[tensor.untyped_storage().data_ptr()]].do(work)

    def synchronize(self) -> None:
        """Wait for all that computes."""
        for stream in self.computing.values():
            stream.synchronize()

    def install(self, monkeypatch) -> None:
        """Let snapshots see these GPUs."""
        gpus = self

        class LateCopies(CopyStream):
            def __init__(self, device: torch.device) -> None:
                self.device, self._compute = device, gpus.computing[device]
                self._begin, self._stream, self._last = self._compute.mark(), None, None

            def adopt_thread(self) -> None:
                gpus.adopted.add(threading.current_thread().name)

            @contextlib.contextmanager
            def beside(self) -> Iterator[None]:
                if self._stream is None:
                    self._stream = Stream(lambda: gpus.late())
                    self._stream.wait_for(self._begin)
                yield
                self._last = self._stream.mark()

            def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
                self._stream.do(lambda: target.copy_(source))

            def mark(self) -> threading.Event:
                mark = self._stream.mark()
                mark.synchronize = lambda: mark.wait(60)
                return mark

            def hold_back(self) -> None:
                if self._last is not None:
                    self._compute.wait_for(self._last)

        def allocated(blocks: Blocks, size: int) -> torch.Tensor:
            assert blocks.pinned
            self.pinned.append(size)
            return torch.empty(size, dtype=torch.uint8)

        monkeypatch.setattr(snapshot, "CopyStream", LateCopies)
        monkeypatch.setattr(snapshot, "gpu_of", lambda t: self._held.get(t.untyped_storage().data_ptr()))
        monkeypatch.setattr(Blocks, "_allocated", allocated)
