"""The checksums of what verification read into memory, so that a proof of the live state need not read it again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

from ..containers.filled import Filled


class KnownSums:
    """CRC32s of storages that lie where verification summed them; it keeps no memory alive."""

    def __init__(self, filled: Iterable[Filled] = ()) -> None:
        self._parts = [
            (weakref.ref(one.memory), torch.frombuffer(one.memory, dtype=torch.uint8).data_ptr(), one.sums)
            for one in filled
        ]

    def until_step_of(self, optimizer: object) -> None:
        """Forget all at the first step of an optimizer: torch does not count what a fused one writes."""
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.register_step_pre_hook(lambda *_: self._parts.clear())
        else:
            self._parts.clear()

    def of(self, tensors: Iterable[torch.Tensor]) -> dict[tuple[int, int], int]:
        """The CRC32 by address and bytes of each storage that has one, and that no operation has written to since.

        torch counts what it writes to a tensor and its views. What is written through `.data` or NumPy is not seen.
        """
        spans: dict[tuple[int, int], int] = {}
        for memory, base, sums in self._parts:
            if memory() is not None:
                spans |= {(base + start, end - start): crc for (start, end), crc in sums.items()}
        found, written = set[tuple[int, int]](), set[tuple[int, int]]()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            place = (storage.data_ptr(), storage.nbytes()) if storage.device.type == "cpu" else (0, 0)
            (written if tensor._version else found).add(place)
        return {place: spans[place] for place in found - written if place in spans}
