"""Every container once: how an example is written, opened, and read by the library that owns the format.

A new container needs one entry in `CASES`; `tests/containers/test_contract.py` holds it to the contract of all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard as SavedShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardedTensorMetadata, ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from core.bundle.bundle import open_bundle
from core.bundle.legacy import open_legacy
from core.containers.container import Check, Container
from core.containers.dcp.folder import open_dcp
from core.containers.hf_folder import open_hf_folder
from core.containers.megatron_folder import open_megatron_folder
from core.containers.open import open_container
from core.containers.rank_files import open_rank_files
from core.containers.safetensors import open_safetensors
from core.containers.step_folder import open_step_folder
from core.containers.torch_files.container import open_torch_single
from core.containers.trainer_folder import open_trainer_folder
from core.inspection.inspect import Inspection, inspect_path, of_bundle
from tests.makers import dcp_folders
from tests.makers.models import SMALL, started, train_and_save
from tests.makers.torch_files import bits, flattened


@dataclass(frozen=True)
class Case:
    """A container as the contract needs it."""

    name: str
    kind: str  # what `Container.kind` says of the example
    opener: Callable[[Path], Container]
    write: Callable[[Path], Path]  # writes an example into a folder, returns what to open
    load: Callable[[Path], dict[str, torch.Tensor]]  # what the format's own library makes of it
    shares: bool = False  # whether tensors may share bytes
    door: Callable[[Path], Container] = open_container  # the call that finds out which it is
    lenient: bool = False  # whether a damaged file leaves the others open, and is told in the notes


def plain_tensors() -> dict[str, torch.Tensor]:
    """Tensors of many types and shapes, which every container can hold."""
    torch.manual_seed(3)
    return {
        "wte.weight": torch.randn(7, 4),
        "h.0.bf16": torch.randn(3, 5).bfloat16(),
        "h.0.half": torch.randn(5).half(),
        "h.1.fp8": torch.arange(16, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(4, 4),
        "h.1.fp8_wide": torch.arange(6, dtype=torch.uint8).view(torch.float8_e5m2),
        "mask": torch.tensor([[True, False, True]]),
        "count": torch.arange(9),
        "double": torch.randn(2, 1, 3).double(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 6),
        "größe": torch.ones(1),
    }


def checkpoint() -> dict:
    """What a training program saves: tensors, some of them shared or views, and plain values."""
    tensors = plain_tensors()
    tied = tensors["wte.weight"]
    model = {**tensors, "lm_head.weight": tied, "view": tied[1:3, ::2], "turned": tied.t()}
    moments = {0: {"exp_avg": torch.randn(7, 4), "step": torch.tensor(4.0)}}
    return {"model": model, "optimizer": {"state": moments}, "step": 7, "note": "größer", "losses": [1.5, None]}


def write_torch(zipped: bool) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(checkpoint(), folder / "ckpt.pt", _use_new_zipfile_serialization=zipped)
        return folder / "ckpt.pt"

    return write


def load_torch(path: Path) -> dict[str, torch.Tensor]:
    return flattened(torch.load(path, weights_only=False))


def as_saved(path: Path) -> dict[str, torch.Tensor]:
    """What was saved, where torch writes types into a stream (float8) that it cannot read from one."""
    return flattened(checkpoint())


def write_safetensors(folder: Path) -> Path:
    safetensors.torch.save_file(plain_tensors(), folder / "x.safetensors", {"format": "pt", "step": "7"})
    return folder / "x.safetensors"


def write_hf(suffix: str, shards: int) -> Callable[[Path], Path]:
    """Write a Hugging Face folder; more than one shard get an index."""

    def write(folder: Path) -> Path:
        tensors = plain_tensors()
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
        names = [f"{stem}-{i:05}-of-{shards:05}.{suffix}" for i in range(1, shards + 1)]
        names = names if shards > 1 else [f"{stem}.{suffix}"]
        for i, file in enumerate(names):
            save({name: tensors[name] for name in list(tensors)[i::shards]}, folder / file)
        if shards > 1:
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
        return folder

    return write


def load_hf(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= safetensors.torch.load_file(path)
    for path in sorted(folder.glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    return found


def write_dcp(folder: Path) -> Path:
    return dcp_folders.save({"model": plain_tensors(), "step": 7}, folder / "dcp")


def write_accelerate(folder: Path) -> Path:
    dcp_folders.save({"model": plain_tensors()}, folder / "pytorch_model_fsdp_0")
    return folder


def write_blocks(folder: Path) -> Path:
    """Write a DCP folder whose tensors are cut in three along their rows."""
    writer = dcp_folders.Writer(folder / "dcp", files=3)
    for name, tensor in plain_tensors().items():
        rows, *rest = tensor.shape or (0,)
        cuts = itertools.pairwise(rows * i // 3 for i in range(4))
        boxes = [((begin, *(0 for _ in rest)), (end - begin, *rest)) for begin, end in cuts if begin < end]
        writer.tensor(name, tensor, boxes if rows > 1 else None)
    return writer.close()


def load_dcp(folder: Path) -> dict[str, torch.Tensor]:
    return flattened(dcp_folders.load(folder))


def write_ranks(folder: Path, mesh: tuple[int, ...], tensors: dict, stem: str = "model", plain=lambda rank: {}) -> Path:
    """Write the file of every rank of a mesh; `tensors` has (tensor, placements) by name. Nothing is communicated."""
    world = torch.Size(mesh).numel()
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            device_mesh = init_device_mesh("cpu", mesh)
            parts = {n: distribute_tensor(t, device_mesh, p, src_data_rank=None) for n, (t, p) in tensors.items()}
            torch.save({**parts, **plain(rank)}, folder / f"{stem}_rank{rank:05}.pt")
        finally:
            dist.destroy_process_group()
    return folder


def write_rank_local(folder: Path, tensors: dict[str, torch.Tensor], world: int, plain: dict) -> Path:
    """Write a DCP folder in which each rank has a `.metadata` of its own; rows are cut, what is no matrix is copied."""
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            mesh = init_device_mesh("cpu", (world,))
            cut = {n: (Shard(0) if t.dim() > 1 else Replicate(),) for n, t in tensors.items()}
            parts = {n: distribute_tensor(t, mesh, cut[n], src_data_rank=None) for n, t in tensors.items()}
            with warnings.catch_warnings(action="ignore"):  # it takes the first rank's for an older save
                dcp.save({"model": parts, **plain}, checkpoint_id=folder, use_collectives=False)
        finally:
            dist.destroy_process_group()
    return folder


def sharded_tensor(shards: list[tuple[torch.Tensor, list[int]]], shape: tuple[int, ...], places: list) -> ShardedTensor:
    """What one rank of FSDP1 has of a tensor; `places` has offsets, sizes and rank of all shards of the whole."""
    boxes = [ShardMetadata(list(begin), list(size), f"rank:{rank}/cpu") for begin, size, rank in places]
    properties = TensorProperties(shards[0][0].dtype if shards else torch.float32)
    whole = ShardedTensorMetadata(boxes, torch.Size(shape), properties)
    mine = [SavedShard.from_tensor_and_offsets(part, begin, dist.get_rank()) for part, begin in shards]
    return ShardedTensor._init_from_local_shards_and_global_metadata(mine, whole)


def write_fsdp1(folder: Path, name: str, tensors: dict[str, torch.Tensor], world: int, plain=lambda rank: {}) -> Path:
    """Write the files of ranks with ShardedTensors, each rank its rows as torch.chunk cuts them; `name` has {rank}."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            made = {}
            for key, tensor in tensors.items():
                parts = torch.chunk(tensor, world)
                starts = [[sum(len(p) for p in parts[:i]), *[0] * (tensor.dim() - 1)] for i in range(len(parts))]
                places = [(starts[i], tuple(part.shape), i) for i, part in enumerate(parts)]
                mine = [(parts[rank].clone(), starts[rank])] if rank < len(parts) else []
                made[key] = sharded_tensor(mine, tuple(tensor.shape), places)
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch says that it is deprecated
                torch.save({**made, **plain(rank)}, folder / name.format(rank=rank))
        finally:
            dist.destroy_process_group()
    return folder


def write_rows_of_ranks(folder: Path, stem: str = "model") -> Path:
    """Write files of three ranks, each with its rows of every tensor that has any."""
    tensors = plain_tensors()
    scalars = {name: t for name, t in tensors.items() if not t.dim()}
    rows = {name: (t, (Shard(0),)) for name, t in tensors.items() if t.dim()}
    return write_ranks(folder, (3,), rows, stem, lambda rank: scalars)


def write_step(folder: Path) -> Path:
    dcp_folders.save(plain_tensors(), folder / "model_sharded")
    write_rows_of_ranks(folder, "optimizer")
    (folder / "metadata.json").write_text(json.dumps({"train_steps": 2}))
    return folder


def load_step(folder: Path) -> dict[str, torch.Tensor]:
    return flattened({"model": plain_tensors(), "optimizer": plain_tensors()})


def layers_stacked() -> dict[str, torch.Tensor]:
    """A model as Megatron's torch_dist keeps it: the layers of a kind in one tensor."""
    torch.manual_seed(2)
    return {
        "embedding.word_embeddings.weight": torch.randn(16, 4),
        "decoder.layers.self_attention.linear_qkv.weight": torch.randn(3, 12, 4),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": torch.ones(3, 4),
        "optimizer.state.exp_avg.embedding.word_embeddings.weight": torch.randn(16, 4),
    }


def write_megatron(folder: Path) -> Path:
    """Write what Megatron saves of an iteration as torch_dist: a DCP folder, arguments of the run beside it."""
    args = argparse.Namespace(num_layers=3, hidden_size=4, swiglu=True, params_dtype=torch.bfloat16)
    common = {"args": args, "iteration": 100, "checkpoint_version": 3.0, "seen": torch.arange(3)}
    dcp_folders.save(layers_stacked(), folder)
    torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "common_backend": "torch"}))
    return folder


def load_megatron(folder: Path) -> dict[str, torch.Tensor]:
    return load_dcp(folder) | {"common.seen": torch.arange(3)}


def write_bundle(folder: Path) -> Path:
    """Train a small model for a step, and save it as we do."""
    manager, model, optimizer = started(folder, config=SMALL | {"n_layer": 1, "n_embd": 8})
    train_and_save(manager, model, optimizer, 1)
    manager.close()
    return folder / "dante"


def load_bundle(folder: Path) -> dict[str, torch.Tensor]:
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    return torch.load(folder / "model.pt", weights_only=True) | flattened({"optimizer": optimizer})


def open_ours(path: Path) -> Container:
    return kept_open(of_bundle(open_bundle(path) if path.is_dir() else open_legacy(path)))


def inspect(path: Path) -> Container:
    return kept_open(inspect_path(path))


def kept_open(found: Inspection) -> Container:
    """The container of a bundle, whose files are open for as long as somebody has it."""
    assert found.bundle
    weakref.finalize(found.container, found.bundle.close)
    return found.container


MEGATRON = "Megatron iteration (torch_dist), DCP folder, 1 file"
STEP = "step folder, model (DCP), optimizer (3 ranks)"

CASES = [
    Case("torch_zip", "torch zip", open_torch_single, write_torch(True), load_torch, shares=True),
    Case("torch_stream", "torch stream", open_torch_single, write_torch(False), as_saved, shares=True),
    Case("safetensors", "safetensors", open_safetensors, write_safetensors, safetensors.torch.load_file),
    Case("hf_one", "Hugging Face folder, safetensors", open_hf_folder, write_hf("safetensors", 1), load_hf),
    Case("hf_shards", "Hugging Face folder, safetensors, 3 files", open_hf_folder, write_hf("safetensors", 3), load_hf),
    Case("hf_bin", "Hugging Face folder, torch zip", open_hf_folder, write_hf("bin", 1), load_hf),
    Case("hf_bins", "Hugging Face folder, torch zip, 2 files", open_hf_folder, write_hf("bin", 2), load_hf),
    Case("dcp", "DCP folder, 1 file", open_dcp, write_dcp, load_dcp),
    Case("dcp_blocks", "DCP folder, 3 files", open_dcp, write_blocks, load_dcp),
    Case(
        "fsdp_folder",
        "folder of accelerate's FSDP, DCP folder, 1 file",
        open_trainer_folder,
        write_accelerate,
        lambda folder: flattened({"model": plain_tensors()}),
    ),
    Case("rank_files", "files of 3 ranks", open_rank_files, write_rows_of_ranks, lambda folder: plain_tensors()),
    Case("step", STEP, open_step_folder, write_step, load_step),
    Case(
        "megatron",
        MEGATRON,
        open_megatron_folder,
        lambda folder: write_megatron(folder / "iter_0000100"),
        load_megatron,
    ),
    Case("bundle", "bundle", open_ours, write_bundle, load_bundle, door=inspect, lenient=True),
]

BOTH = {(open_dcp, open_megatron_folder), (open_rank_files, open_step_folder)}
"""What is two things at once: the first opener reads what the second is for, too."""


def place(container: Container, name: str) -> Path:
    """The path of one of a container's files."""
    return container.path / name if container.path.is_dir() else container.path


def tensor(container: Container, name: str) -> torch.Tensor:
    """A tensor, from its spec and the bytes of the container's files alone."""
    spec = container.tensors[name]
    if not spec.chunks:
        return _block(container, spec.file, spec.offset, spec.dtype, spec.shape, spec.strides)
    whole = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
    for chunk in spec.chunks:
        index = tuple(slice(b, b + n) for b, n in zip(chunk.begin, chunk.shape, strict=True))
        whole[index] = _block(container, chunk.file, chunk.offset, spec.dtype, chunk.shape, chunk.strides)
    return whole


def _block(container, file, offset, dtype, shape, strides) -> torch.Tensor:
    kind = getattr(torch, dtype)
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    count = 0 if 0 in shape else last + 1
    with container.open(file) as source:
        source.seek(offset)
        data = source.read(count * kind.itemsize)
    assert len(data) == count * kind.itemsize, (file, offset)
    return torch.frombuffer(bytearray(data or bytes(kind.itemsize)), dtype=kind)[:count].as_strided(shape, strides)


def assert_same(container: Container, expected: dict[str, torch.Tensor]) -> None:
    """Names, types, shapes and bytes are those of the oracle."""
    assert set(container.tensors) == set(expected)
    for name, theirs in expected.items():
        spec, ours = container.tensors[name], tensor(container, name)
        assert (spec.name, spec.shape, f"torch.{spec.dtype}") == (name, tuple(theirs.shape), str(theirs.dtype))
        assert spec.nbytes == theirs.numel() * theirs.element_size()
        assert torch.equal(bits(ours), bits(theirs)), name


def checksum_fails(container: Container, check: Check) -> bool:
    """Whether the bytes on the disk have another CRC32 than was recorded for them."""
    data = place(container, check.file).read_bytes()[check.offset : check.offset + check.size]
    return check.crc32 is not None and zlib.crc32(data) != check.crc32
