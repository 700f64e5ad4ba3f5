"""The memory into which a save copies, in blocks that it takes once."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import torch

from ..containers.free_memory import free_memory


class Blocks:
    """Memory in blocks, page-aligned; pinned where a GPU copies into it."""

    SEGMENT = 64
    """The most blocks that are pinned at once: 256 MB. torch rounds what it pins up to a power of two."""

    def __init__(self, count: int, size: int, pinned: bool) -> None:
        self.count, self.size, self.pinned = count, size, pinned
        self._blocks: list[torch.Tensor] = []

    def taken(self) -> Iterator[int]:
        """Yield the index of each block as soon as there is memory for it.

        Memory is pinned at some GB/s, so that the first blocks may be filled while more are pinned. Where no more can
        be pinned, those that are there have to do.

        Raises: MemoryError or RuntimeError where there is memory for none.
        """
        yield from range(len(self._blocks))
        while (left := self.count - len(self._blocks)) > 0:
            begin = len(self._blocks)
            count = min(self.SEGMENT, 1 << left.bit_length() - 1) if self.pinned else left
            try:
                self._blocks += self._allocated(count * self.size).split(self.size)
            except (MemoryError, RuntimeError):
                if not begin:
                    raise
                self.count = begin
            yield from range(begin, len(self._blocks))

    def _allocated(self, size: int) -> torch.Tensor:
        if self.pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)

    def __getitem__(self, index: int) -> torch.Tensor:
        """The bytes of a block that was taken."""
        return self._blocks[index]


class Memory:
    """The blocks of a manager's saves, kept from one to the next.

    `limit` is in bytes; None takes a share of what is free when they are allocated.
    """

    BLOCK = 4 * 1024 * 1024
    """Bytes of a block: large enough for the disk, small enough to be filled while another is written."""

    RING = 12
    """The number of blocks when memory allows no more: 48 MB."""

    SHARE = 0.5
    """Fraction of the free memory that the blocks may take."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._blocks: Blocks | None = None

    def blocks(self, wanted: int, pinned: bool) -> Blocks:
        """Get up to `wanted` blocks, and at least a ring of them; those of the last save where they suffice."""
        if self._blocks is not None and self._blocks.pinned == pinned and self._blocks.count >= wanted:
            return self._blocks
        held = self._blocks.count * self.BLOCK if self._blocks is not None else 0
        limit = self.limit if self.limit is not None else int((free_memory() + held) * self.SHARE)
        count = min(wanted, max(self.RING, limit // self.BLOCK))
        if self._blocks is None or self._blocks.pinned != pinned or self._blocks.count != count:
            self._blocks = None  # before the new ones are made
            self._blocks = Blocks(count, self.BLOCK, pinned)
        return self._blocks
