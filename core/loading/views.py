"""From views to tensors: a tensor of a file is mapped as it lies there, one that is put together is gathered."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from ..containers.spec import is_dense
from ..containers.tensors.reading import ROOM, Gatherer, inflated
from ..containers.tensors.views import Block, View
from ..errors import CheckpointError
from .mapped import mapped


class TensorMaker:
    """Makes tensors of views; views of the same bytes become one tensor, as tied weights are.

    A view of one stored tensor, or of a part of it, is mapped, also where it is transposed: no byte is copied, and
    writing to it copies the page, never the file. Everything else is read into memory of its own, as is everything
    when `writable`, or when it is cast. Mapped tensors outlive the maker.
    """

    def __init__(self, *, writable: bool = False) -> None:
        self._writable = writable
        self._gatherer = Gatherer(room=ROOM)
        self._maps: dict[tuple[int, str], Tensor] = {}
        self._made: dict[tuple[object, ...], Tensor] = {}

    def __enter__(self) -> TensorMaker:
        self._gatherer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gatherer.__exit__(kind, error, trace)

    def tensor(self, view: View, dtype: torch.dtype | None = None) -> Tensor:
        """Make the tensor of a view, cast to a dtype where one is given.

        Raises: CheckpointError for a view that repeats its elements far beyond its files, or that cannot be mapped;
            CheckpointDamaged when a file ends too early.
        """
        if fault := inflated(view):
            path = next(block.source.path for block in view.blocks if block.source is not None)
            raise CheckpointError(f"{path}: {view.names[0]} {fault}.")
        stored: torch.dtype = getattr(torch, view.dtype)
        key = (*view.place, dtype or stored)
        if key not in self._made:
            if self._writable or dtype not in (None, stored) or not _is_mappable(view, stored):
                self._made[key] = self._gathered(view, stored, dtype or stored)
            else:
                self._made[key] = self._mapped(view.blocks[0], stored)
        return self._made[key]

    def _mapped(self, block: Block, dtype: torch.dtype) -> Tensor:
        assert block.source is not None
        name = block.file or block.source.path.name
        key = (id(block.source), name)
        if key not in self._maps:
            with block.source.open(name) as file:
                self._maps[key] = torch.frombuffer(mapped(file, block.source.path), dtype=torch.uint8)
        last = sum((size - 1) * stride for size, stride in zip(block.shape, block.strides, strict=True))
        data = self._maps[key][block.offset : block.offset + (last + 1) * dtype.itemsize]
        return data.view(dtype).as_strided(block.shape, block.strides)

    def _gathered(self, view: View, stored: torch.dtype, dtype: torch.dtype) -> Tensor:
        flat, at = torch.empty(view.numel, dtype=dtype), 0
        for piece in self._gatherer.pieces(view):
            part = torch.frombuffer(piece, dtype=stored)
            flat[at : at + len(part)] = part
            at += len(part)
        return flat.view(view.shape)


def _is_mappable(view: View, dtype: torch.dtype) -> bool:
    """Whether a view is one block of a file, at a place for its dtype, and not packed there.

    A transposed matrix of float16 is not: a CPU takes 13 times as long for a product with it.
    """
    if len(view.blocks) != 1:
        return False
    (block,) = view.blocks
    return (
        block.source is not None
        and block.shape == view.shape
        and block.offset % dtype.itemsize == 0
        and block.file not in block.source.unpacked
        and (dtype != torch.float16 or is_dense(block.shape, block.strides))
    )
