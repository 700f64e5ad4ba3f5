"""Layout: the tensors of a model in memory, rearranged by the same tables of rules as those in files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ..containers.container import Container
from ..containers.tensors.views import Block, View
from ..families.modded import TO_MEDIUM, completed
from ..families.rules import apply

_MEMORY = Container("memory", Path(), {}, {}, {})
_ELEMENT = "uint8"
"""The dtype of every view: tensors have their own, and offsets of items of one byte count elements."""


def as_medium(tensors: Mapping[str, Tensor], variant: str, n_layer: int) -> dict[str, Tensor]:
    """Give the tensors of a modded-nanogpt model the layout of medium; it still computes what its variant computes.

    Tensors that are only renamed or cut at the end share the memory of the originals.
    """
    views = {name: _view(name, tensor) for name, tensor in tensors.items()}
    views |= {name: view for name, (view, _) in completed(views, variant, n_layer).items()}
    made = apply(TO_MEDIUM[variant], views, {"n_layer": n_layer})
    return {
        **{name: tensors[name] for name in made.unused},
        **{name: _tensor(view, tensors) for name, view in made.tensors.items()},
    }


def _view(name: str, tensor: Tensor) -> View:
    shape, strides, begin = tuple(tensor.shape), tensor.stride(), (0,) * tensor.dim()
    return View(_ELEMENT, shape, (Block(begin, shape, strides, int(tensor.storage_offset()), "", _MEMORY, name),))


def _tensor(view: View, tensors: Mapping[str, Tensor]) -> Tensor:
    parts = [tensors[b.name].as_strided(b.shape, b.strides, b.offset) if b.source else None for b in view.blocks]
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    sources = [tensors[name] for name in view.names]
    made = sources[0].new_empty(view.shape, dtype=reduce(torch.promote_types, (t.dtype for t in sources)))
    for block, part in zip(view.blocks, parts, strict=True):
        place = made[tuple(slice(at, at + side) for at, side in zip(block.begin, block.shape, strict=True))]
        place.fill_(block.value) if part is None else place.copy_(part)
    return made
