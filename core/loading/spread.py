"""Tensors sharded over ranks, filled from a step of any kind, plain or in any number of shards.

The planner of torch.distributed.checkpoint decides which part of which block a rank needs; this project's own reader
of its format, which executes nothing, provides the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
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

from ..bundle.parts import ShardedFile
from ..containers.spec import TensorSpec
from ..networks.distributed import group_size
from .mapped import read_block


def block_like(whole: Tensor, like: Tensor) -> Tensor:
    """Copy this rank's part out of a whole tensor, sharded like another; all of it where that is not sharded."""
    if not isinstance(like, DTensor):
        return whole
    shape, begin = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    block = whole[tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))]
    return _as_shard(block.detach().to(like.device, like.dtype, copy=True).contiguous(), like)


def empty_like(like: Tensor) -> Tensor:
    """Allocate a tensor that is sharded like another one."""
    if not isinstance(like, DTensor):
        return torch.empty_like(like)
    return _as_shard(torch.empty_like(like.to_local()), like)


def _as_shard(block: Tensor, like: DTensor) -> DTensor:
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(block, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def fill_shards(source: ShardedFile, targets: Mapping[str, Tensor], alone: bool) -> None:
    """Fill tensors, sharded or not, from the shards of a step by name; every rank calls it, or one `alone`.

    Names and shapes have been compared already.
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
        """The content of the folder, in torch's terms."""
        return Metadata({name: _described(spec) for name, spec in self.specs.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the files are open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the parts that the plan needs out of the mapped files."""
        for item in plan.items:
            assert item.type is LoadItemType.TENSOR
            spec = self.specs[item.storage_index.fqn]
            begin = tuple(item.storage_index.offset or ())
            block = read_block(self.source, next(c for c in spec.blocks if c.begin == begin), spec.dtype)
            ends = zip(item.storage_offsets, item.lengths, strict=True)
            target = planner.resolve_tensor(item)
            target.detach().copy_(block[tuple(slice(b, b + n) for b, n in ends)])
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _described(spec: TensorSpec) -> TensorStorageMetadata:
    boxes = [ChunkStorageMetadata(torch.Size(c.begin), torch.Size(c.shape)) for c in spec.blocks]
    return TensorStorageMetadata(TensorProperties(getattr(torch, spec.dtype)), torch.Size(spec.shape), boxes)


def filled_like(source: ShardedFile, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read this rank's parts of tensors like these from shards, by name; every rank calls it."""
    made = {name: empty_like(tensor).detach() for name, tensor in like.items()}
    fill_shards(source, made, group_size() == 1)
    return made
