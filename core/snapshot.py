"""Live tensors on their way to disk while training goes on.

Weights and optimizer state do not change between two optimizer steps. In that time a thread copies them, block by
block of the files to be, into memory that is allocated once, and completes the blocks with their checksums while the
bytes are in the core's cache; from a GPU, another thread does this when they have arrived. The writer takes the blocks
from there. With blocks for the whole state the copy is over long before the write. With few, which go round, it lasts
as long as the write does, and so may the next optimizer step have to wait.
"""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.containers.torch_zip_image import Image, Kind, Sealed
from core.containers.torch_zip_writer import bytes_of, records_of
from core.errors import SaveFailed

BLOCK = 4 * 1024 * 1024
"""Bytes of a block: large enough for the disk, small enough to fill while another is written."""

RING = 12
"""Blocks when there is no memory for more: 48 MB."""

SHARE = 0.5
"""Of the free memory, what a snapshot may take."""


class Blocks:
    """Memory in blocks, page-aligned; pinned where a GPU copies into it."""

    def __init__(self, count: int, pinned: bool) -> None:
        self.count, self.pinned = count, pinned
        if pinned:
            self.memory = torch.empty(count * BLOCK, dtype=torch.uint8, pin_memory=True)
            return
        self.memory = torch.frombuffer(mmap.mmap(-1, count * BLOCK), dtype=torch.uint8)

    def __getitem__(self, index: int) -> torch.Tensor:
        """The bytes of a block."""
        return self.memory[index * BLOCK : (index + 1) * BLOCK]


class Memory:
    """The blocks of a manager's saves, kept from one to the next.

    `limit` is in bytes; None takes a share of what is free when they are allocated.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._blocks: Blocks | None = None

    def blocks(self, wanted: int, pinned: bool) -> Blocks:
        """Get up to `wanted` blocks, the same as last time where these are enough, and at least a ring of them."""
        if self._blocks is not None and self._blocks.pinned == pinned and self._blocks.count >= wanted:
            return self._blocks
        held = self._blocks.count * BLOCK if self._blocks is not None else 0
        limit = self.limit if self.limit is not None else int((free_memory() + held) * SHARE)
        count = min(wanted, max(RING, limit // BLOCK))
        if self._blocks is None or self._blocks.pinned != pinned or self._blocks.count != count:
            self._blocks = None  # before the new ones are made
            self._blocks = Blocks(count, pinned)
        return self._blocks


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its control group; 0 where nothing says."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        line = next(s for s in Path("/proc/meminfo").read_text().splitlines() if s.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(found, default=0))


class SnapshotFile:
    """One file of a snapshot, as its writer sees it."""

    def __init__(self, snapshot: Snapshot, content: Any) -> None:
        self._snapshot = snapshot
        self.image = content() if callable(content) else _image_of(content)
        self.sealed = Sealed(self.image)
        self.size = self.image.size

    def blocks(self) -> Iterator[tuple[memoryview, int, int]]:
        """Give the blocks in order: memory, where its bytes begin in the file, how many they are.

        A block is given for the duration of a turn, and the files of a snapshot are taken in their order.

        Raises: what ended the copy.
        """
        return self._snapshot.blocks_of(self)

    @property
    def recorded(self) -> dict[str, Any]:
        """Size, checksum and digest, once all blocks have been taken."""
        return self.sealed.recorded


@dataclass
class _Block:
    """A block in memory and what it is: `length` bytes from `start` on of a file."""

    file: SnapshotFile
    start: int
    length: int
    index: int
    arrived: Any = None  # from a GPU: the event after which its bytes are there


class Snapshot:
    """The state of one save: files by name, their blocks in order, copied from live tensors since `start`.

    A file is an object of tensors, or what makes its image. `live` are the tensors that are copied later than `start`,
    by name: nothing may change them before `wait_copied`.
    """

    def __init__(self, contents: Mapping[str, Any], live: Mapping[str, torch.Tensor]) -> None:
        self._contents = contents
        self._versions = [(name, t, t._version) for name, t in live.items() if not t.is_inference()]
        self._device = next((t.device for t in live.values() if t.is_cuda), None)
        self._copied = threading.Event()
        self._given_up = False
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._arriving: queue.SimpleQueue[_Block | BaseException | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Block | BaseException | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._files: dict[str, SnapshotFile] = {}
        self._stream: Any = None
        self._last: Any = None
        if self._device is not None:
            self._begin = torch.cuda.current_stream(self._device).record_event()

    # The caller's thread

    def wait_copied(self) -> None:
        """Wait until the live tensors may change."""
        self._copied.wait()
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)  # the GPU waits, not the program

    # The writer's thread

    def plan(self) -> dict[str, SnapshotFile]:
        """Lay out the files: from here on their sizes are known."""
        self._files = {name: SnapshotFile(self, content) for name, content in self._contents.items()}
        return self._files

    def start(self, memory: Memory) -> None:
        """Begin to copy.

        Raises: SaveFailed when there is no thread to be had.
        """
        spans = [
            (file, start, min(BLOCK, file.size - start))
            for file in self._files.values()
            for start in range(0, file.size, BLOCK)
        ]
        self._blocks = memory.blocks(len(spans), pinned=self._device is not None)
        for index in range(self._blocks.count):
            self._free.put(index)
        self._start_thread("snapshot: copy", lambda: self._copy(spans))
        if self._device is not None:
            self._start_thread("snapshot: seal", self._seal_arrived)

    def _start_thread(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name)
        try:
            thread.start()
        except RuntimeError as error:
            raise SaveFailed(f"{name}: {error}.") from error
        self._threads.append(thread)

    def blocks_of(self, file: SnapshotFile) -> Iterator[tuple[memoryview, int, int]]:
        """Give the blocks of one file."""
        left = file.size
        while left:
            block = self._next()
            assert block is not None and block.file is file
            yield self._blocks[block.index].numpy().data, block.start, block.length
            left -= block.length
            self._free.put(block.index)

    def _next(self) -> _Block | None:
        block = self._ready.get()
        if isinstance(block, BaseException):
            raise block
        return block

    def finish(self) -> None:
        """Make sure that what was copied was one state; all blocks have been taken.

        Raises: SaveFailed when a tensor changed while it was copied.
        """
        assert self._next() is None

    def close(self) -> None:
        """Let the tensors and the memory go, whether or not all was written."""
        self._given_up = True
        self._free.put(None)
        for thread in self._threads:
            thread.join()
        self._copied.set()
        if self._stream is not None:
            self._stream.synchronize()  # into a block that was begun and not handed on, a copy may still be under way
        self._contents, self._files, self._versions = {}, {}, []

    # The copying thread

    def _copy(self, spans: list[tuple[SnapshotFile, int, int]]) -> None:
        end: BaseException | None = None
        done = self._ready if self._device is None else self._arriving
        try:
            with self._beside():
                for file, start, length in spans:
                    index = self._free.get()
                    if index is None or self._given_up:
                        return
                    block = _Block(file, start, length, index)
                    self._fill(block)
                    done.put(block)
            for name, tensor, version in self._versions:
                if tensor._version != version:
                    raise SaveFailed(
                        f"{name} was changed while it was saved, by something else than the optimizer's step. "
                        "Call wait() of the manager before such a change."
                    )
        except BaseException as error:
            end = error
        finally:
            self._copied.set()
            done.put(end)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On a GPU, copy in a stream beside the one that computes."""
        if self._device is None:
            yield
            return
        self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_event(self._begin)
        with torch.cuda.stream(self._stream):
            yield
            self._last = self._stream.record_event()

    def _fill(self, block: _Block) -> None:
        memory = self._blocks[block.index]
        data = memory.numpy().data
        for piece in block.file.image.pieces(block.start, block.start + block.length):
            segment, low, high, at = piece
            if segment.kind is Kind.STORAGE:
                source = segment.content[low:high]
                _copy_bytes(source, memory[at : at + high - low], source.device == self._device)
            if self._stream is None:
                block.file.sealed.seal(piece, data)
        if self._stream is not None:
            block.arrived = self._stream.record_event()

    # The sealing thread, for what comes from a GPU

    def _seal_arrived(self) -> None:
        while isinstance(block := self._arriving.get(), _Block):
            try:
                block.arrived.synchronize()
                for piece in block.file.image.pieces(block.start, block.start + block.length):
                    if not self._given_up:
                        block.file.sealed.seal(piece, self._blocks[block.index].numpy().data)
            except BaseException as error:
                self._ready.put(error)
                continue
            self._ready.put(block)
        self._ready.put(block)


def _image_of(content: Any) -> Image:
    return Image([(name, c if isinstance(c, bytes) else bytes_of(c)) for name, c in records_of(content)])


def _copy_bytes(source: torch.Tensor, target: torch.Tensor, beside: bool) -> None:
    """Copy; from the GPU whose stream and events this snapshot has, `beside`, without waiting for it."""
    if source.device.type == "cpu":
        # Not torch's copy: it would take a team of threads away from the computation.
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source, non_blocking=beside)
