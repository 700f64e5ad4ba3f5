"""Records of torch's distributed classes: which of them are plain data, and how DTensor and ShardedTensor are laid out.

A DTensor is pickled as `_rebuild_from_type_v2(_rebuild_wrapper_subclass, DTensor, (class, dtype, shape, ...), state)`,
whose state has this rank's `_local_tensor`, and a `_spec` with the mesh of ranks and a placement for each of the
mesh's dimensions (torch.distributed.tensor, _dtensor_spec.py and placement_types.py).

A ShardedTensor, of FSDP1, is pickled by the same call with the state (local shards, metadata, group, ...). Each
shard has its offsets; a rank may have several or none (torch.distributed._shard.sharded_tensor, api.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointDamaged, CheckpointError
from ..blocks import naturals
from ..pickles.foreign import attributes, foreign_calls
from ..pickles.inert import Call, Global, as_text
from ..spec import ITEM_SIZES, TensorSpec

_HOMES = ("torch.distributed.", "megatron.core.dist_checkpointing.strategies.torch.")

_CLASSES = frozenset(
    {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING", "_StorageInfo"),
        *("DTensor", "DTensorSpec", "TensorMeta", "ShardOrderEntry", "DeviceMesh", "_MeshLayout", "_FlatLayout"),
        *("Shard", "_StridedShard", "Replicate", "Partial", "_Partial"),
        *("MCoreMetadata", "MCoreSavePlan", "SavePlan", "WriteItem", "WriteItemType"),  # Megatron keeps its plans
        *("TensorWriteData", "BytesIOWriteData"),
        *("ShardedTensor", "ProcessGroupState", "ShardedTensorMetadata", "ShardMetadata", "_remote_device"),
        *("ChunkShardingSpec", "EnumerableShardingSpec"),
    }
)
_MOST_MESH_DIMENSIONS = 16
"""Data, pipeline, tensor, context and expert parallelism make five; the work grows with the square."""

_BUILDERS = ("torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_wrapper_subclass")


def is_distributed(path: str) -> bool:
    """Whether a class of this full name is one of those, and its records are data."""
    return path.startswith(_HOMES) and path.rpartition(".")[2] in _CLASSES


def class_name(value: Any) -> str:
    """The short name of the class of a record; "" for anything else."""
    known = isinstance(value, Call) and isinstance(value.callable, Global)
    return value.callable.path.rpartition(".")[2] if known else ""


def foreign_within(content: Any) -> list[str]:
    """What `foreign_calls` finds in a content in which records of distributed classes are data too."""
    return foreign_calls(content, lambda path: is_distributed(path) or path in _BUILDERS)


@dataclass(slots=True)
class Shard:
    """One rank's part of a distributed tensor."""

    local: TensorSpec
    shape: tuple[int, ...]  # of the whole tensor
    begin: tuple[int, ...]
    ranks: int  # in the mesh


def shards_of(value: Any, where: str) -> list[Shard] | None:
    """Read this rank's shards from the record of a DTensor or ShardedTensor; None for any other record.

    Raises: CheckpointDamaged when it contradicts itself, CheckpointError for a layout that cannot be assembled.
    """
    if not isinstance(value, Call) or value.callable != Global("torch._tensor", "_rebuild_from_type_v2"):
        return None
    _, kind, args, state = value.args if len(value.args) == 4 else (None,) * 4
    if not isinstance(kind, Global) or not is_distributed(kind.path):
        return None
    name = kind.path.rpartition(".")[2]
    if name == "ShardedTensor":
        return _sharded(state, where)
    return [_shard(args, state, where)] if name == "DTensor" else None


def _sharded(state: Any, where: str) -> list[Shard]:
    """The shards of a ShardedTensor that this rank has."""
    held, metadata, group, *_ = state if isinstance(state, tuple) and len(state) >= 3 else (None,) * 3
    shape = (attributes(metadata) or {}).get("size")
    count = (attributes(group) or {}).get("local_world_size")
    ranks = count if isinstance(count, int) and naturals((count,)) else 1
    if not isinstance(held, list) or not naturals(shape):
        raise CheckpointDamaged(f"{where}: a ShardedTensor of shape {as_text(shape, 60)} with {as_text(held, 60)}.")
    found = []
    for record in held:
        says = attributes(record) or {}
        local, box = says.get("tensor"), attributes(says.get("metadata")) or {}
        begin, size = (_numbers(box.get(key)) for key in ("shard_offsets", "shard_sizes"))
        if (
            not isinstance(local, TensorSpec)
            or local.dtype not in ITEM_SIZES
            or not naturals(begin)
            or (size, len(begin)) != (local.shape, len(shape))
        ):
            raise CheckpointDamaged(
                f"{where}: a shard {as_text(local, 60)} of a ShardedTensor {shape}, which says that it is {size} from "
                f"{begin} on."
            )
        found.append(Shard(local, shape, begin, ranks))
    return found


def _numbers(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shard(args: Any, state: Any, where: str) -> Shard:
    """The shard of a DTensor."""
    parts = state if isinstance(state, tuple) else (state,)
    held = next((part for part in parts if isinstance(part, dict)), {})
    local, spec = held.get("_local_tensor"), attributes(held.get("_spec")) or {}
    shape = args[2] if isinstance(args, tuple) and len(args) > 2 else None
    if not isinstance(local, TensorSpec) or not naturals(shape) or len(shape) != len(local.shape):
        raise CheckpointDamaged(f"{where}: a DTensor of shape {as_text(shape, 60)} with the part {as_text(local, 60)}.")
    mesh = attributes(spec.get("mesh")) or {}
    sizes, at, placements = _mesh_sizes(mesh), mesh.get("_coordinate_on_dim"), spec.get("placements")
    at = tuple(at) if isinstance(at, (list, tuple)) else at
    if (
        not (naturals(sizes) and naturals(at) and isinstance(placements, tuple))
        or not len(sizes) == len(at) == len(placements) <= _MOST_MESH_DIMENSIONS
        or not all(i < n for i, n in zip(at, sizes, strict=True))
        or math.prod(sizes) >= 1 << 31
    ):
        raise CheckpointDamaged(
            f"{where}: a DTensor at {as_text(at, 40)} of a mesh {as_text(sizes, 40)} of ranks, placed as "
            f"{as_text(placements, 80)}."
        )
    if not _in_order(spec.get("shard_order")):
        raise _unreadable(where, spec["shard_order"])
    begin, size = [0] * len(shape), list(shape)
    for dim, cut in _cuts(placements, sizes, len(shape), where):
        part = -(-size[cut] // sizes[dim])  # as torch.chunk: the last ones have less, or nothing
        first = min(part * at[dim], size[cut])
        begin[cut] += first
        size[cut] = min(part, size[cut] - first)
    if tuple(size) != local.shape or local.dtype not in ITEM_SIZES:
        raise CheckpointDamaged(
            f"{where}: holds {local.shape} of a DTensor {shape}, expected {tuple(size)} at {at} of a mesh {sizes}."
        )
    return Shard(local, shape, tuple(begin), math.prod(sizes))


def _mesh_sizes(mesh: dict[str, Any]) -> Any:
    """How many ranks a mesh has along each of its dimensions; older torch kept the ranks themselves in `mesh`."""
    axes = (attributes(mesh.get("_layout")) or {}).get("axes")
    if isinstance(axes, tuple):
        shapes = [(attributes(axis) or {}).get("shape") for axis in axes[: _MOST_MESH_DIMENSIONS + 1]]
        return tuple([math.prod(s) if naturals(s) and len(s) <= _MOST_MESH_DIMENSIONS else None for s in shapes])
    shape = (attributes(mesh.get("_layout")) or {}).get("shape")
    if shape is not None:
        return shape if isinstance(shape, tuple) else (shape,)
    ranks = mesh.get("mesh", mesh.get("_mesh"))
    return ranks.shape if isinstance(ranks, TensorSpec) else None


def _cuts(placements: tuple[Any, ...], sizes: tuple[int, ...], dims: int, where: str) -> list[tuple[int, int]]:
    """Pairs of a mesh dimension and the tensor dimension that it cuts, in the order of the cuts.

    A strided shard (FSDP over tensor parallelism) is cut after the later dimensions of the mesh, whose parts its split
    factor counts; with another factor a rank has rows from several places.
    """
    plain: list[tuple[int, int]] = []
    late: list[tuple[int, int]] = []
    for mesh_dim, placement in reversed(list(enumerate(placements))):
        says = attributes(placement) or {}
        kind, cut = class_name(placement), says.get("dim")
        if kind == "Replicate":
            continue
        if kind not in ("Shard", "_StridedShard"):
            raise _unreadable(where, placement)
        if type(cut) is not int or not 0 <= cut < dims:
            raise CheckpointDamaged(f"{where}: a DTensor of {dims} dimensions is cut along {as_text(cut, 20)}.")
        inner = math.prod(sizes[later] for later, same in plain + late if same == cut)
        if kind == "_StridedShard" and says.get("split_factor") != inner:
            raise _unreadable(where, placement)
        (late if kind == "_StridedShard" else plain).append((mesh_dim, cut))
    return plain[::-1] + late


def _in_order(order: Any) -> bool:
    """Whether shards are cut by the mesh's dimensions from first to last, or no other order is recorded."""
    if order is None:
        return True
    entries = [getattr(entry, "args", None) for entry in order] if isinstance(order, tuple) else [None]
    return all(isinstance(e, tuple) and len(e) == 2 and naturals(e[1]) and e[1] == tuple(sorted(e[1])) for e in entries)


def _unreadable(where: str, layout: Any) -> CheckpointError:
    return CheckpointError(
        f"{where}: a DTensor is laid out as {as_text(layout, 120)}; only whole copies and shards of consecutive rows "
        "can be put together. Save it with torch.distributed.checkpoint instead."
    )
