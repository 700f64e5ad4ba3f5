"""Shards of torch's HuggingFaceStorageWriter: joined by their offsets, and refused where parts are missing."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from core.containers.open import open_container
from core.errors import CheckpointDamaged, CheckpointMismatch
from tests.makers.conversions import converted, same

WHOLE = {"a.weight": (10, 4), "b.weight": (4, 6), "c.weight": (5,), "scale": ()}


def values(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}


def shards(folder: Path, whole: dict[str, torch.Tensor], ranks: int, dim: int = 0, files: int = 1) -> list[Path]:
    """Write what each rank has as torch does: parts as by torch.chunk, tensors without dimensions on the first rank."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for rank in range(ranks):
        parts: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
        offsets: dict[str, dict[str, list[int]]] = {}
        for k, (name, tensor) in enumerate(whole.items()):
            cut = min(dim, tensor.ndim - 1)
            if cut < 0 and rank:
                continue
            begin, part = [0] * tensor.ndim, tensor
            if cut >= 0:
                rows = -(-tensor.shape[cut] // ranks)
                begin[cut] = min(rows * rank, tensor.shape[cut])
                part = tensor.narrow(cut, begin[cut], min(rows, tensor.shape[cut] - begin[cut])).contiguous()
            parts[k % files][name] = part
            offsets[name] = {"saved_offsets": begin}
        for i, held in enumerate(parts):
            path = folder / f"shard-{rank + 1:05}-model-{i + 1:05}-of-{files:05}.safetensors"
            here = json.dumps({name: offsets[name] for name in held})
            save_file(held, path, {"DCP_SHARDING_INFO": here, "DCP_VERSION": "1.0", "format": "pt"})
            paths.append(path)
    return paths


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 5), st.integers(0, 1), st.integers(1, 2), st.sampled_from(["pt", "safetensors"]), st.integers(1, 9)
)
def test_the_shards_of_all_ranks_are_the_whole_tensors(ranks, dim, files, to, rows):
    with tempfile.TemporaryDirectory() as made:
        whole = values({**WHOLE, "d.weight": (rows, 3, 2)})
        shards(Path(made) / "m", whole, ranks, dim, files)
        out = Path(made) / f"o.{to}"
        notes = converted(Path(made) / "m", out, to)["notes"]
        found = load_file(out) if to == "safetensors" else torch.load(out, weights_only=True)
        assert same(found, whole)
        assert f"torch's shards of ranks 1 to {ranks}. No file records how many ranks there were" in notes[0]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_missing_rank_is_named_with_the_tensor_that_lacks_it(tmp_path, ranks):
    whole = values(WHOLE)
    for gone in range(1, ranks):
        paths = shards(tmp_path / f"m{gone}", whole, ranks)
        paths[gone - 1].unlink()
        with pytest.raises(
            CheckpointDamaged, match=rf"not there: shard-{gone:05}-model-\*.safetensors. Download or copy"
        ):
            open_container(tmp_path / f"m{gone}")


def test_an_index_of_shards_opens_all_ranks_and_names_a_missing_part(tmp_path):
    whole = values(WHOLE)
    paths = shards(tmp_path / "m", whole, 3)
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(whole, paths[0].name)}))
    converted(tmp_path / "m", tmp_path / "o.pt", "pt")
    assert same(torch.load(tmp_path / "o.pt", weights_only=True), whole)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(["a.weight"], "moved.safetensors")}))
    shutil.copyfile(paths[1], tmp_path / "m" / "moved.safetensors")
    with pytest.raises(CheckpointDamaged, match=r"a.weight is in moved.safetensors alone: its blocks have 16 elements"):
        open_container(index)


@pytest.mark.parametrize("kept", [1, 2])
def test_the_shard_of_one_rank_alone_is_no_model(tmp_path, kept):
    paths = shards(tmp_path / "all", values(WHOLE), 2)
    (tmp_path / "m").mkdir()
    one = Path(shutil.copy(paths[kept - 1], tmp_path / "m"))
    lost = "shard-00002-model-*" if kept == 1 else "shard-00001-model-*"
    for source in (one, tmp_path / "m"):
        with pytest.raises((CheckpointMismatch, CheckpointDamaged)) as caught:
            converted(source, tmp_path / "o.pt", "pt")
        assert str(caught.value).startswith(str(source)) and lost in str(caught.value)
    with pytest.raises(CheckpointMismatch, match=r"one of the shards of 2 ranks of one model .* Name the folder"):
        converted(paths[kept - 1], tmp_path / "o.pt", "pt")
    assert not (tmp_path / "o.pt").exists()
    if kept == 2:  # its offsets tell under any name
        moved = one.rename(tmp_path / "model.safetensors")
        with pytest.raises(
            CheckpointMismatch, match=r"a.weight begins at \(5, 0\) of the whole tensor: a rank's shard"
        ):
            converted(moved, tmp_path / "o.pt", "pt")
    if kept == 1:  # what one rank saved whole, by the word of the user
        one.rename(tmp_path / "m" / "model.safetensors")
        converted(tmp_path / "m", tmp_path / "o.pt", "pt")


def test_shards_of_an_earlier_save_among_them_are_told_apart(tmp_path):
    shards(tmp_path, values(WHOLE), 4)
    shards(tmp_path, values(WHOLE), 2)
    with pytest.raises(CheckpointDamaged, match=r"some (occur twice|of its blocks overlap).*Files of another save"):
        open_container(tmp_path)


@pytest.mark.parametrize("offsets", [None, [0], [-1, 0], ["0", 0], {}])
def test_offsets_that_do_not_fit_the_tensor_are_refused_with_both(tmp_path, offsets):
    record = json.dumps({"a.weight": {"saved_offsets": offsets}})
    save_file({"a.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors", {"DCP_SHARDING_INFO": record})
    with pytest.raises(CheckpointDamaged, match=r"places a.weight at .*, expected 2 whole numbers"):
        open_container(tmp_path)


def _save(rank: int, folder: str, port: int, consolidate: bool) -> None:
    import os
    import warnings

    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    parts = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in values(WHOLE).items() if t.ndim}
    mapping = {name: 1 + k % 2 for k, name in enumerate(parts)}
    writer = HuggingFaceStorageWriter(folder, mapping, save_distributed=True, enable_consolidation=consolidate)
    dcp.save(parts, storage_writer=writer)
    dist.destroy_process_group()


@pytest.mark.full
@pytest.mark.parametrize("consolidate", [False, True])
def test_what_torch_wrote_on_two_ranks_is_read_whole(tmp_path, consolidate):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_save, (str(tmp_path / "m"), port, consolidate), nprocs=2)
    whole = {name: tensor for name, tensor in values(WHOLE).items() if tensor.ndim}
    for k, folder in enumerate([tmp_path / "m", *([tmp_path / "m" / "sharded"] if consolidate else [])]):
        converted(folder, tmp_path / f"{k}.pt", "pt")
        assert same(torch.load(tmp_path / f"{k}.pt", weights_only=True), whole)
