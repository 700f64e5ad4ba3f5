"""What one rank holds of a sharded model: blocks of tensors, to be saved, and to be filled from any number of shards.

Reading is the planner of torch.distributed.checkpoint, which finds out what a rank needs of which block; the bytes come
through our own reader of its format, which executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from ..bundle.sharded_part import ShardedFile
from ..containers.dcp.writer import Placed, item_header
from ..containers.spec import TensorSpec
from ..containers.torch_files.image import Image
from ..containers.torch_files.layout import pickled
from ..loading.shards import chunks_of, read_block
from ..networks.state_dict import plain_name
from .torch_file import bytes_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A block of a tensor that this rank writes, or a plain value; and where it is in the nested state."""

    path: tuple[str | int, ...]
    value: Any
    whole: DTensor | None = None  # of which it is a block

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
        """What it is called in the folder."""
        return ".".join(map(str, self.path))


def block_like(whole: Tensor, like: Tensor) -> Tensor:
    """Copy out of a whole tensor what this rank holds of a tensor like it; the whole where that is not spread."""
    if not isinstance(like, DTensor):
        return whole
    shape, begin = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    block = whole[tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))]
    return _as_shard(block.detach().to(like.device, like.dtype, copy=True).contiguous(), like)


def empty_like(like: Tensor) -> Tensor:
    """Allocate a tensor that is spread as another one is."""
    if not isinstance(like, DTensor):
        return torch.empty_like(like)
    return _as_shard(torch.empty_like(like.to_local()), like)


def _as_shard(block: Tensor, like: DTensor) -> DTensor:
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(block, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def weights_of(module: nn.Module, first: bool) -> list[Shard]:
    """List what this rank writes of a module's parameters and buffers; what is not spread is the first rank's."""
    found = module.state_dict(keep_vars=True)
    return list(_shards({plain_name(name): t.detach() for name, t in found.items()}, (), first))


def moments_of(optimizer: torch.optim.Optimizer, module: nn.Module, first: bool) -> list[Shard]:
    """List what this rank writes of an optimizer's state, by the names of parameters; plain values are the first's."""
    names = {id(p): plain_name(name) for name, p in module.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        mine = [names[id(p)] for p in group["params"]]
        groups.append({**group, "params": mine, "param_names": mine})
    state = {names[id(p)]: values for p, values in optimizer.state.items()}
    return list(_shards({"state": state, "param_groups": groups}, (), first))


def averages_of(ema: Mapping[str, Tensor], first: bool) -> list[Shard]:
    """List what this rank writes of averaged weights."""
    return list(_shards(ema, (), first))


def _shards(value: Any, path: tuple[str | int, ...], first: bool) -> Iterator[Shard]:
    """Everything by its path, as torch.distributed.checkpoint flattens a state dict."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _shards(item, (*path, key), first)
    elif isinstance(value, list) and any(isinstance(item, (Mapping, Tensor)) for item in value):
        for number, item in enumerate(value):
            yield from _shards(item, (*path, number), first)
    elif isinstance(value, DTensor):
        block = value.to_local()
        if block.numel():
            yield Shard(path, block, value)
    elif first:
        yield Shard(path, value)


def image_of(shards: Iterable[Shard]) -> Image:
    """Lay out the file of these shards: a torch zip for each, end to end."""
    return Image(*(_records(shard.value) for shard in shards))


def _records(value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Tensor):
        return [("data.pkl", pickled(value)), ("byteorder", b"little"), ("version", b"3\n")]
    value = value.contiguous()
    start = value.storage_offset() * value.element_size()
    header = item_header(_dtype(value), tuple(value.shape), value.nbytes)
    data = bytes_of(value.untyped_storage())[start : start + value.nbytes]  # in place: a shard may be padded
    return [("data.pkl", header), ("byteorder", b"little"), ("data/0", data), ("version", b"3\n")]


def placed(shards: Iterable[Shard], image: Image, file: str) -> list[Placed]:
    """Say where each shard is in the file that an image became."""
    return [
        Placed(shard.name, shard.path, begin, length, _dtype(shard.value), shard.shape, file, shard.begin, block)
        if (block := tuple(shard.value.shape) if isinstance(shard.value, Tensor) else None) is not None
        else Placed(shard.name, shard.path, begin, length, file=file)
        for shard, (begin, length) in zip(shards, image.spans, strict=True)
    ]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# Filling


def fill_shards(source: ShardedFile, targets: Mapping[str, Tensor], alone: bool) -> None:
    """Fill tensors, spread over ranks or not, from the shards of a step by name; all ranks do it, or one `alone`.

    Names and shapes were compared before.
    """
    with torch.no_grad():
        state = {name: target.detach() for name, target in targets.items()}
        dcp.load(state, storage_reader=_Reader(source), no_dist=alone)


class _Reader(dcp.StorageReader):
    """Gives torch.distributed.checkpoint the blocks of an open folder; nothing in it is unpickled."""

    def __init__(self, source: ShardedFile) -> None:
        self.source = source
        self.specs = source.header.tensors

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def reset(self, checkpoint_id: Any = None) -> None:
        """Begin to read; there is one folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the folder holds, in torch's words."""
        return Metadata({name: _described(spec) for name, spec in self.specs.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the files are open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what the plan wants out of the mapped files."""
        for item in plan.items:
            assert item.type is LoadItemType.TENSOR
            spec = self.specs[item.storage_index.fqn]
            begin = tuple(item.storage_index.offset or ())
            block = read_block(self.source, next(c for c in chunks_of(spec) if c.begin == begin), spec.dtype)
            ends = zip(item.storage_offsets, item.lengths, strict=True)
            target = planner.resolve_tensor(item)
            target.detach().copy_(block[tuple(slice(b, b + n) for b, n in ends)])
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _described(spec: TensorSpec) -> TensorStorageMetadata:
    boxes = [ChunkStorageMetadata(torch.Size(c.begin), torch.Size(c.shape)) for c in chunks_of(spec)]
    return TensorStorageMetadata(TensorProperties(getattr(torch, spec.dtype)), torch.Size(spec.shape), boxes)
