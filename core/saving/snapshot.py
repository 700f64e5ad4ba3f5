"""Live tensors on their way to disk while training continues.

Weights and optimizer state do not change between two optimizer steps. In that time threads copy them, block by block of
the future files, into memory that is allocated once, and compute the CRC32 while the bytes are in the core's cache.

    span = a block of a future file, still in live tensors     index = a block of memory
                      .-------------------- _free (indices) <-------------------.
                      v                                                         |
    _left (spans) -> copying threads -- _ready (CPU) ------------------------> writer -> file
                      |  fill a block,                                ^          takes blocks in order (`_early` holds
                      |  sum it on a CPU                              |          those that came too soon), seals them
                      `-- _arriving (GPU) -> summing threads ---------'          with the checksums
                             wait for the copies' events, then sum

Three roles: the loop's thread makes the snapshot and waits in `wait_copied` before the next update; copying threads
(one for a GPU, several for a CPU, since the threads of a computation wait for the slowest of them) empty `_left`;
the writer's thread plans, starts the others, takes what is ready and gives its memory back. With blocks for the whole
state the copy is over long before the write. With few, which circulate, it lasts as long as the write, and the next
update may have to wait. None in a queue means that nothing more comes.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ..containers.checksum import CHUNK, THREADS, crc32
from ..containers.torch_files.image import RECORDS, Image, Kind, Piece, Seal
from ..errors import SaveFailed
from .block_memory import Memory
from .copy_stream import CopyStream, gpu_of
from .loadable import is_plain, refuse_unloadable, unloadable
from .torch_file import bytes_of, records_of

FEW = 8
"""The number of blocks below which another thread does not pay off."""


class SnapshotFile:
    """One file of a snapshot, for its writer."""

    def __init__(self, snapshot: Snapshot, name: str, content: Any) -> None:
        self._snapshot = snapshot
        self.image = content() if callable(content) else _image_of(name, content)
        self.sealed = Seal(self.image)
        self.size = self.image.size

    def blocks(self) -> Iterator[tuple[memoryview, int, int]]:
        """Yield the blocks in order: memory, where its bytes begin in the file, and how many they are.

        A block is valid until the next one is taken, and the files of a snapshot are taken in their order.

        Raises: the error that ended the copy.
        """
        return self._snapshot.blocks_of(self)

    @property
    def recorded(self) -> dict[str, Any]:
        """Size, checksum and digest, once all blocks have been taken."""
        return self.sealed.recorded


class _Span(NamedTuple):
    """A block of the future files: the `number`-th one, `length` bytes of a file from `start` on."""

    number: int
    file: SnapshotFile
    start: int
    length: int


@dataclass
class _Block:
    """A block in memory and what it is."""

    span: _Span
    memory: torch.Tensor
    index: int
    pieces: list[Piece]
    sums: list[int] = field(default_factory=list)
    """The CRC32 of each piece."""
    arrived: list[Any] = field(default_factory=list)
    """From GPUs: the events after which its bytes have arrived."""


class Snapshot:
    """The state of one save: files by name, their blocks in order, copied from live tensors since `start`.

    A file is an object of tensors, or a function that makes its image. `live` are the tensors that are copied after
    `start`, by name: nothing may change them before `wait_copied`.
    """

    def __init__(self, contents: Mapping[str, Any], live: Mapping[str, torch.Tensor]) -> None:
        self._contents = contents
        self._versions = [(name, t, t._version) for name, t in live.items() if not t.is_inference()]
        gpus = {gpu_of(t): None for t in live.values()}
        self._streams = {gpu: CopyStream(gpu) for gpu in gpus if gpu is not None}
        self._compared = False
        self._copied = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._left: deque[_Span] = deque()
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._arriving: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._early: dict[int, _Block] = {}
        self._taken = 0
        self._threads: list[threading.Thread] = []
        self._copying = self._summing = 0
        self._alone = False
        self._files: dict[str, SnapshotFile] = {}

    # The caller's thread

    def wait_copied(self) -> None:
        """Wait until the live tensors may change."""
        self._copied.wait()
        self._compare_versions()
        for stream in self._streams.values():
            stream.hold_back()

    # The writer's thread

    def plan(self) -> dict[str, SnapshotFile]:
        """Lay out the files: from here on their sizes are known.

        Raises: InputError naming what cannot be written.
        """
        self._files = {name: SnapshotFile(self, name, content) for name, content in self._contents.items()}
        return self._files

    def refuse_unloadable(self) -> None:
        """Read the pickle of each planned file as `load` does; its tensors may still be on their way.

        Raises: InputError naming what `load` would not give back.
        """
        for name, content in self._contents.items():
            if not callable(content) and not is_plain(content):
                refuse_unloadable(name, content, self._files[name].image.first)

    def start(self, memory: Memory) -> None:
        """Begin to copy; where no thread can be started, `blocks_of` copies."""
        block = memory.BLOCK
        starts = [(file, start) for file in self._files.values() for start in range(0, file.size, block)]
        for number, (file, start) in enumerate(starts):
            self._left.append(_Span(number, file, start, min(block, file.size - start)))
        for stream in self._streams.values():
            stream.adopt_thread()
        self._blocks = memory.blocks(max(1, len(starts)), pinned=bool(self._streams))
        several = max(1, min(THREADS, len(starts) // FEW))
        with self._lock:  # no thread may count itself as the last one before all are counted
            if self._streams:
                self._summing = self._start_threads("snapshot: sum", self._sum_arrived, several)
            if not self._streams or self._summing:
                self._copying = self._start_threads("snapshot: copy", self._copy, 1 if self._summing else several)
            self._alone = not self._copying
        for index in self._blocks.taken():
            self._free.put(index)

    def _start_threads(self, name: str, target: Callable[[], None], count: int) -> int:
        for i in range(count):
            thread = threading.Thread(target=target, name=name)
            try:
                thread.start()
            except RuntimeError:  # too many; or the interpreter is ending
                return i
            self._threads.append(thread)
        return count

    def blocks_of(self, file: SnapshotFile) -> Iterator[tuple[memoryview, int, int]]:
        """Give the blocks of one file."""
        left = file.size
        while left:
            block = self._next()
            assert block is not None and block.span.file is file
            memory = block.memory.numpy().data
            for piece, crc in zip(block.pieces, block.sums, strict=True):
                file.sealed.seal(piece, memory, crc)
            yield memory, block.span.start, block.span.length
            left -= block.span.length
            self._free.put(block.index)

    def _next(self) -> _Block | None:
        """The next block in order; None when all were copied."""
        while self._taken not in self._early:
            block = self._copied_here() if self._alone else self._ready.get()
            if block is None:
                if self._error is not None:
                    raise self._error
                return None
            self._early[block.span.number] = block
        self._taken += 1
        return self._early.pop(self._taken - 1)

    def _copied_here(self) -> _Block | None:
        """Copy the next block in this thread; None when all were copied."""
        claimed = self._claim()
        if claimed is None:
            self._compare_versions()
            self._copied.set()
            return None
        with self._beside():
            block = self._filled(*claimed)
        return self._summed(block) if self._streams else block

    def finish(self) -> None:
        """Check that what was copied is one state; call it when all blocks have been taken.

        Raises: SaveFailed when a tensor changed while it was copied.
        """
        assert self._next() is None

    def close(self) -> None:
        """Release the tensors and the memory, whether or not everything was written."""
        self._give_up()
        for _ in self._threads:
            self._arriving.put(None)
        for thread in self._threads:
            thread.join()
        self._copied.set()
        for stream in self._streams.values():
            stream.synchronize()  # a copy into a block that was not handed on may still be running
        self._streams = {}
        self._contents, self._files, self._versions = {}, {}, []
        self._early.clear()
        self._error = None  # its traceback holds frames that hold tensors

    # The copying threads

    def _copy(self) -> None:
        done = self._arriving if self._streams else self._ready
        try:
            with self._beside():
                while (span := self._claim()) is not None:
                    done.put(self._filled(*span))
        except BaseException as error:
            self._fail(error)
        with self._lock:
            self._copying -= 1
            if self._copying:
                return
        if not self._streams:  # else nothing has arrived yet
            self._compare_versions()
        self._copied.set()
        for _ in range(self._summing or 1):
            done.put(None)

    def _claim(self) -> tuple[_Span, int] | None:
        """The next span and the memory for it; None when there is nothing more to copy."""
        with self._lock:  # in order: else later spans might hold all memory of a ring
            if not self._left:
                return None
            index = self._free.get()
            if index is None:
                self._free.put(None)  # for the other threads
                return None
            return self._left.popleft(), index

    def _give_up(self) -> None:
        self._free.put(None)
        with self._lock:
            self._left.clear()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._give_up()

    def _compare_versions(self) -> None:
        """Fail where a tensor was changed: when all was copied, or when a change is about to begin that waited for it.

        What comes first counts. A copy from a GPU has been made when it has arrived, not when it was queued.
        """
        with self._lock:  # to its end: a change that waited for it must not be seen by it
            versions = [] if self._compared else self._versions
            self._compared = True
            changed = next((name for name, tensor, version in versions if tensor._version != version), None)
        if changed is not None:
            self._fail(
                SaveFailed(
                    f"{changed} changed while it was being saved, and not by the optimizer's step. "
                    "Call wait() of the manager before such a change."
                )
            )

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On GPUs, copy in streams beside those that compute."""
        with contextlib.ExitStack() as streams:
            for stream in self._streams.values():
                streams.enter_context(stream.beside())
            yield

    def _filled(self, span: _Span, index: int) -> _Block:
        memory = self._blocks[index]
        pieces = list(span.file.image.pieces(span.start, span.start + span.length))
        block, streams = _Block(span, memory, index, pieces), self._streams
        used = {}
        for piece in pieces:
            segment, low, high, at = piece
            target = memory[at : at + high - low]
            if segment.kind is Kind.PLAIN:
                target.numpy().data[:] = segment.content[low:high]
            if not streams:
                block.sums.append(_sum(piece, target, copy=segment.kind is Kind.STORAGE))
            elif segment.kind is Kind.STORAGE:
                source = segment.content[low:high]
                if (gpu := gpu_of(source)) in streams:
                    streams[gpu].copy(source, target)
                    used[gpu] = streams[gpu]
                else:
                    _copy_bytes(source, target)
        block.arrived = [stream.mark() for stream in used.values()]
        return block

    # The summing threads, for what comes from a GPU

    def _sum_arrived(self) -> None:
        for stream in self._streams.values():
            stream.adopt_thread()
        while (block := self._arriving.get()) is not None:
            try:
                self._ready.put(self._summed(block))
            except BaseException as error:
                self._fail(error)
        with self._lock:
            self._summing -= 1
            if self._summing:
                return
        self._compare_versions()
        self._ready.put(None)

    def _summed(self, block: _Block) -> _Block:
        """The block with its checksums, when its bytes have arrived."""
        for mark in block.arrived:
            mark.synchronize()
        block.sums = [_sum(piece, block.memory[piece.at :], copy=False) for piece in block.pieces]
        return block


def _image_of(file: str, content: Any) -> Image:
    try:
        records = records_of(content)
    except Exception as error:  # the method of any class may have been called
        raise unloadable(file, content, str(error)) from error
    return Image([(name, c if isinstance(c, bytes) else bytes_of(c)) for name, c in records])


def _sum(piece: Piece, memory: torch.Tensor, copy: bool) -> int:
    """CRC32 of a piece in memory; with `copy`, it is copied there first, part by part while in the core's cache."""
    if piece.segment.kind not in RECORDS:
        return 0
    crc, size = 0, piece.high - piece.low
    if not copy:
        return crc32(memory[:size].numpy().data)
    for start in range(0, size, CHUNK):
        end = min(start + CHUNK, size)
        target = memory[start:end]
        _copy_bytes(piece.segment.content[piece.low + start : piece.low + end], target)
        crc = crc32(target.numpy().data, crc)
    return crc


def _copy_bytes(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy into memory, and wait for it."""
    if source.device.type == "cpu":
        # Not torch's copy: it would take threads away from the computation.
        np.copyto(target.numpy(), source.numpy())
        return
    if source.is_cuda:  # of a GPU without live tensors: behind whatever stream has made it
        torch.cuda.synchronize(source.device)
    target.copy_(source)
