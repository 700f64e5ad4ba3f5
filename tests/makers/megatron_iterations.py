"""Iterations of Megatron as megatron/core/dist_checkpointing writes them: names, blocks and objects, by torch's writer.

As in megatron-core 0.16.1, and in Megatron-LM's main of 2026-08 where that differs (`common`). A key has all layers in
one tensor; each layer, and of it each tensor-parallel rank's part, is a block (transformer_block.py). A gate is cut by
ranks as two tensors one behind the other (mlp.py, apply_swiglu_sharded_factory). What is no tensor is in a list under
`key/shard_<offset>_<shape>` (mapping.py, unique_key). `.metadata` has no planner_data, and the plans of all ranks.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

TE = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}
"""What sharded_state_dict_keys_map makes of the names of local layers (gpt_layer_specs.py)."""

LAYERS = "decoder.layers."
COLUMNS = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias", "embeddings.weight")
ROWS = ("linear_proj.weight", "linear_fc2.weight")
STATEFUL = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def without_layer(name: str) -> tuple[str, int | None]:
    """The name of a tensor of all layers, and which layer this one is of."""
    words = name.split(".")
    if not name.startswith(LAYERS):
        return name, None
    rest = ".".join(words[3:])
    return LAYERS + TE.get(rest, rest), int(words[2])


def stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an iteration: all layers in one, with the names of Transformer Engine."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        found.setdefault(without_layer(name)[0], []).append(tensor)
    return {name: torch.stack(all_) if name.startswith(LAYERS) else all_[0] for name, all_ in found.items()}


def apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with layers apart, as models of unlike layers are saved (non_homogeneous_layers)."""
    names = {name: without_layer(name) for name in state}
    return {(n if i is None else n.replace(LAYERS, f"{LAYERS}{i}.")): state[name] for name, (n, i) in names.items()}


class _Rank(DefaultSavePlanner):
    """One rank's items, and what they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[WriteItem] = []
        self.data: dict[tuple[str, Any], torch.Tensor | bytes] = {}

    def tensor(self, name: str, whole: torch.Tensor, begin: tuple[int, ...], shape: tuple[int, ...]) -> None:
        box = tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))
        chunk = ChunkStorageMetadata(torch.Size(begin), torch.Size(shape))
        said = TensorWriteData(chunk, TensorProperties.create_from_tensor(whole), whole.size())
        index = MetadataIndex(name, torch.Size(begin))
        self.items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=said))
        self.data[name, index.offset] = whole[box].contiguous()

    def value(self, key: str, value: Any) -> None:
        made = io.BytesIO()
        torch.save([value], made)
        self.items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        self.data[key, None] = made.getvalue()

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = self.data[write_item.index.fqn, write_item.index.offset]
        return data if isinstance(data, torch.Tensor) else io.BytesIO(data)


def blocks(name: str, tensor: torch.Tensor, ranks: int, gated: bool) -> Iterator[tuple[tuple, tuple, int]]:
    """The blocks of a tensor: begin, shape, and the tensor-parallel rank that writes it."""
    layered = name.startswith(LAYERS) and not name[len(LAYERS)].isdigit()
    axis = int(layered) + 1 if name.endswith(ROWS) else int(layered)
    is_cut = name.endswith((*ROWS, *COLUMNS)) or name == "output_layer.weight"
    parts = 1 if not is_cut or "position" in name else ranks * (2 if gated and "linear_fc1." in name else 1)
    assert tensor.shape[axis] % parts == 0
    shape = [1 if layered and k == 0 else side for k, side in enumerate(tensor.shape)]
    shape[axis] //= parts
    for layer, part in itertools.product(range(len(tensor)) if layered else (0,), range(parts)):
        begin = [0] * tensor.dim()
        begin[0] = layer
        begin[axis] += part * shape[axis]
        yield tuple(begin), tuple(shape), part % ranks


def write_iteration(
    folder: Path,
    state: dict[str, torch.Tensor],
    ranks: int = 2,
    layers_apart: bool = False,
    common: str = "common.pt",
    extra: Any = None,
    **args: Any,
) -> Path:
    """Write an iteration of a run with these arguments; `extra` is what Transformer Engine keeps of a layer.

    `common` is where the arguments are: in common.pt, or in the DCP folder as an object ("common_state").
    """
    folder.mkdir(parents=True)
    tp = [_Rank() for _ in range(ranks)]
    tensors = apart(state) if layers_apart else stacked(state)
    for name, tensor in tensors.items():
        for begin, shape, rank in blocks(name, tensor, ranks, args.get("swiglu", False)):
            tp[rank].tensor(name, tensor, begin, shape)
            tp[rank].tensor(f"optimizer.state.exp_avg.{name}", tensor.float(), begin, shape)
    count = 1 + max(layer for name in state if (layer := without_layer(name)[1]) is not None)
    for i, part in itertools.product(range(count), STATEFUL):
        key = f"{LAYERS}{i}.{part}" if layers_apart else f"{LAYERS}{part}"
        tp[0].value(f"{key}._extra_state/shard_" + ("0_1" if layers_apart else f"{i}_{count}"), extra)
    for rank in range(ranks):
        tp[rank].value(f"rng_state/shard_0.{rank}_1.{ranks}", [{"torch_rng_state": torch.get_rng_state()}])
    said = {"args": argparse.Namespace(**args), "iteration": 100, "checkpoint_version": 3.0}
    said |= {"optimizer": {"optimizer": {"param_groups": [{"lr": 1e-3, "step": 100}]}}, "seen": torch.arange(3)}
    if common == "common.pt":
        torch.save(said, folder / common)
    else:
        tp[0].value(f"{common}/shard_0_1", said)

    writer = FileSystemWriter(folder, thread_count=2)
    writer.set_up_storage_writer(True)
    local = [SavePlan(rank.items) for rank in tp]
    plans, metadata = create_default_global_save_plan(local)
    plans = writer.prepare_global_plan(plans)
    results = [writer.write_data(plan, rank).wait() for plan, rank in zip(plans, tp, strict=True)]
    metadata.all_local_plans = local  # type: ignore[attr-defined]  as Megatron does, to save the next time faster
    metadata.mcore_data = {}  # type: ignore[attr-defined]  as 0.14 and 0.15 did
    writer.finish(metadata, results)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder
