"""The stream of a GPU in which a snapshot is copied, beside the one that computes.

All that a snapshot asks of a GPU is here, so that tests can put streams in its place that are late.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def gpu_of(tensor: torch.Tensor) -> torch.device | None:
    """The GPU that holds a tensor; None where it lies elsewhere."""
    return tensor.device if tensor.is_cuda else None


class CopyStream:
    """One GPU's copies for one snapshot. Made in the thread of the loop: they begin behind what is queued there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin = torch.cuda.current_stream(device).record_event()
        self._stream: Any = None
        self._last: Any = None

    def adopt_thread(self) -> None:
        """Make this GPU the calling thread's own: any other call would open a context on the first GPU, half a GB."""
        torch.cuda.set_device(self.device)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Within this, the copying thread's work on this GPU goes into the stream."""
        self.adopt_thread()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
            self._stream.wait_event(self._begin)
        with torch.cuda.stream(self._stream):
            yield
            self._last = self._stream.record_event()

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Queue a copy into pinned memory; it has arrived when a mark that is set behind it has."""
        target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """An event behind all that was queued; to wait for it leaves the core to others."""
        return self._stream.record_event(torch.cuda.Event(blocking=True))

    def hold_back(self) -> None:
        """Let the caller's stream wait for the last copy: the GPU waits, not the program."""
        if self._last is not None:
            torch.cuda.current_stream(self.device).wait_event(self._last)

    def synchronize(self) -> None:
        """Wait until nothing is copied any more."""
        if self._stream is not None:
            self._stream.synchronize()
