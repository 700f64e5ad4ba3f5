"""--to dcp: torch.distributed.checkpoint loads what was written, and it is the source."""

from __future__ import annotations

import io
import pickletools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from core.containers.dcp.folder import open_dcp
from core.errors import CheckpointMismatch
from tests.conftest import ROOT
from tests.makers.conversions import converted, same
from tests.makers.dcp_folders import load, save

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn, torch.uint16,
)  # fmt: skip


def loaded(folder: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What dcp.load puts into tensors that were something else before."""
    found = {name: torch.full_like(tensor, 1) for name, tensor in like.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it loads in one process
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


def state() -> dict[str, torch.Tensor]:
    made = {f"layers.{k}.weight": (torch.randn(6, 5) * 40).to(dtype) for k, dtype in enumerate(DTYPES)}
    return {**made, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "odd ü": torch.ones(1, 2, 3)}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_dcp_load_gives_back_every_dtype_and_shape(suffix, tmp_path):
    source, tensors = tmp_path / f"model.{suffix}", state()
    if suffix == "pt":
        torch.save(tensors, source)
    else:
        tensors = {name: t for name, t in tensors.items() if t.dtype != torch.complex64}
        safetensors.torch.save_file(tensors, source)
    converted(source, tmp_path / "dcp", "dcp")
    assert same(loaded(tmp_path / "dcp", tensors), tensors)
    assert same(load(tmp_path / "dcp"), tensors)
    assert sorted(p.name for p in (tmp_path / "dcp").iterdir()) == [".metadata", "__0_0.distcp"]


def test_metadata_says_what_torchs_own_says(tmp_path):
    tensors = {name: t for name, t in state().items() if t.numel()}
    torch.save(tensors, tmp_path / "model.pt")
    converted(tmp_path / "model.pt", tmp_path / "ours", "dcp")
    save(tensors, tmp_path / "theirs")
    ours, theirs = (dcp.FileSystemReader(tmp_path / name).read_metadata() for name in ("ours", "theirs"))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert {type(index.offset) for index in ours.storage_data} == {torch.Size}
    assert {info.relative_path for info in ours.storage_data.values()} == {"__0_0.distcp"}
    pickletools.dis((tmp_path / "ours/.metadata").read_bytes(), out=io.StringIO())


def test_every_byte_belongs_to_an_item_of_our_own_reader(tmp_path):
    torch.save(state(), tmp_path / "model.pt")
    converted(tmp_path / "model.pt", tmp_path / "dcp", "dcp")
    container = open_dcp(tmp_path / "dcp")
    assert (container.notes, container.foreign) == ([], [])
    assert all(check.crc32 is not None for check in container.checks if check.file != ".metadata" and check.size)


def test_a_bundle_goes_with_its_optimizer(folder, tmp_path):
    from tests.makers.migrations import fresh

    fresh(folder)
    source = folder / "latest.pt"
    converted(source, tmp_path / "made.pt", "pt", include_optimizer=True)
    converted(source, tmp_path / "dcp", "dcp", include_optimizer=True)
    expected, found = torch.load(tmp_path / "made.pt"), load(tmp_path / "dcp")
    assert same(found["model"], expected["model"])
    groups = [dict(group) for group in expected["optimizer"]["param_groups"]]
    names = {i: n for g in groups for i, n in zip(g["params"], g["param_names"], strict=True)}
    for group in groups:  # as torch's get_optimizer_state_dict lays it out
        group["params"] = group.pop("param_names")
    assert found["optimizer"]["param_groups"] == groups
    state = expected["optimizer"]["state"]
    assert all(same(found["optimizer"]["state"][names[number]], entry) for number, entry in state.items())


@pytest.mark.parametrize("source", ["0000002", "nested_step-3"])
def test_shards_of_four_ranks_become_one(shared, source, tmp_path):
    ranks = shared / "fixtures/dcp_fsdp2_4ranks"
    expected = safetensors.torch.load_file(ranks / "expected_model.safetensors")
    converted(ranks / source, tmp_path / "flat", "dcp")
    assert same(loaded(tmp_path / "flat", expected), expected)
    converted(ranks / source, tmp_path / "nested", "dcp", include_optimizer=True)
    found = load(tmp_path / "nested")
    optim = torch.load(ranks / "expected_optim.pt", weights_only=False)
    assert same(found["model"], expected)
    assert found["optimizer"]["param_groups"] == optim["param_groups"]
    assert all(same(found["optimizer"]["state"][name], entry) for name, entry in optim["state"].items())


def test_there_and_back_are_the_same_bytes(tmp_path):
    tensors = {name: t for name, t in state().items() if t.dtype != torch.complex64}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path / "dcp", "dcp")
    converted(tmp_path / "dcp", tmp_path / "b.safetensors", "safetensors")
    converted(tmp_path / "dcp", tmp_path / "again", "dcp")
    assert (tmp_path / "a.safetensors").read_bytes()[-600:] == (tmp_path / "b.safetensors").read_bytes()[-600:]
    assert same(safetensors.torch.load_file(tmp_path / "b.safetensors"), tensors)
    for name in (".metadata", "__0_0.distcp"):
        assert (tmp_path / "dcp" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_two_entries_of_one_name_are_refused():
    from core.conversion.plan import Plan, Source, WeightFile
    from core.conversion.targets.dcp import in_dcp

    model = Source(Path("x"), None, "", {}, {}, {})  # type: ignore[arg-type]
    plan = Plan(model, Path("y"), "pt", [WeightFile("y", [], {"a": {"b": 1}, "a.b": 2})])
    with pytest.raises(CheckpointMismatch, match=r"two of its entries would be called a\.b"):
        in_dcp(plan)


def test_no_torch_is_imported(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import convert_checkpoints as c; "
        "code = c.main(['a.safetensors', 'dcp', '--to', 'dcp']); "
        "code += c.main(['dcp', 'b.safetensors', '--to', 'safetensors']); "
        "assert code == 0 and 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", program, str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(load(tmp_path / "dcp"), {"w": torch.ones(3)})
