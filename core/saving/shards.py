"""The part of a sharded model on one rank: the blocks of tensors that it writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..containers.dcp.writer import WrittenItem, flattened
from ..containers.torch_files.image import Image
from ..containers.torch_files.layout import TensorRecord, pickled, records
from ..errors import CheckpointMismatch, InputError
from ..networks.state_dict import is_tensor
from ..networks.wrappers import parameter_names, plain_tensors
from .loadable import refuse_unloadable
from .torch_file import bytes_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A block of a tensor that this rank writes, or a plain value, and its place in the nested state."""

    path: tuple[str | int, ...]
    value: Any
    whole: DTensor | None = None  # the tensor of which it is a block

    @property
    def shape(self) -> Shape:
        """The shape of the whole tensor."""
        whole = self.value if self.whole is None else self.whole
        return tuple(whole.shape) if isinstance(whole, Tensor) else ()

    @property
    def begin(self) -> Shape:
        """Where the block begins in it."""
        if self.whole is None:
            return (0,) * len(self.shape)
        mesh, placements = self.whole.device_mesh, self.whole.placements
        return tuple(compute_local_shape_and_global_offset(self.whole.shape, mesh, placements)[1])

    @property
    def name(self) -> str:
        """Its name in the folder."""
        return ".".join(map(str, self.path))


def weights_of(module: nn.Module, first: bool) -> list[Shard]:
    """List what this rank writes of a module's parameters and buffers; the first rank writes what is not sharded."""
    found = plain_tensors(module)
    detached = {n: v.detach() if is_tensor(n, v, f"model.pt: {n}") else v for n, v in found.items()}
    return list(_shards(detached, first))


def moments_of(optimizer: torch.optim.Optimizer, module: nn.Module, first: bool) -> list[Shard]:
    """List what this rank writes of an optimizer's state, by parameter names; the first rank writes plain values."""
    names = parameter_names(module)
    groups = []
    if outside := sum(id(p) not in names for group in optimizer.param_groups for p in group["params"]):
        raise InputError(
            f"the optimizer has {outside} parameters outside the module, which shards have no names for. Save a module "
            "that holds them."
        )
    for group in optimizer.param_groups:
        mine = [names[id(p)] for p in group["params"]]
        groups.append({**group, "params": mine, "param_names": mine})
    state = {names[id(p)] if isinstance(p, Tensor) else p: values for p, values in optimizer.state.items()}
    return list(_shards({"state": state, "param_groups": groups}, first))


def averages_of(ema: Mapping[str, Tensor], first: bool) -> list[Shard]:
    """List what this rank writes of averaged weights."""
    return list(_shards(ema, first))


def _shards(value: Any, first: bool) -> Iterator[Shard]:
    for path, item in flattened(value, lambda leaf: isinstance(leaf, Tensor)):
        if isinstance(item, DTensor):
            block = item.to_local()
            if block.numel():
                yield Shard(path, block, item)
        elif first:
            yield Shard(path, item.item() if isinstance(item, np.generic) else item)


def image_of(folder: str, shards: Iterable[Shard]) -> Image:
    """Lay out the file of these shards: a torch zip for each, end to end.

    Raises: InputError, naming the folder and the shard, for a value that `load` could not give back.
    """
    return Image(*(_records(folder, shard) for shard in shards))


def _records(folder: str, shard: Shard) -> list[tuple[str, Any]]:
    value = shard.value
    if not isinstance(value, Tensor):
        try:
            data_pkl = pickled(value)
        except CheckpointMismatch as error:
            raise InputError(
                f"{folder}: {shard.name}: {error}. Expected are tensors, numbers and texts in dicts, lists and tuples: "
                "leave it out, or save what it is made of."
            ) from error
        refuse_unloadable(folder, {shard.name: value}, data_pkl)
        return list(records(data_pkl, []))
    value = value.contiguous()
    start = value.storage_offset() * value.element_size()
    header = pickled(TensorRecord(0, _dtype(value), tuple(value.shape), value.nbytes))
    data = bytes_of(value.untyped_storage())[start : start + value.nbytes]  # in place: a shard may be padded
    return list(records(header, [data]))


def placed(shards: Iterable[Shard], image: Image, file: str) -> list[WrittenItem]:
    """Describe where each shard is in the file written from an image."""
    return [
        WrittenItem(shard.name, shard.path, begin, length, _dtype(shard.value), shard.shape, file, shard.begin, block)
        if (block := tuple(shard.value.shape) if isinstance(shard.value, Tensor) else None) is not None
        else WrittenItem(shard.name, shard.path, begin, length, file=file)
        for shard, (begin, length) in zip(shards, image.spans, strict=True)
    ]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
