"""Elements in row-major order, whatever order and blocks they lie in; torch's `contiguous()` is the oracle."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.containers.container import Container
from core.containers.dcp.folder import open_dcp
from core.containers.open import open_container
from core.containers.spec import Chunk, TensorSpec, dense_strides, reach
from core.containers.tensors import reading
from core.containers.tensors.reading import pieces
from core.containers.tensors.views import stored
from core.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from core.inspection.inspect import inspect_path
from tests.conftest import ROOT
from tests.makers.containers import CASES
from tests.makers.dcp_folders import Writer
from tests.makers.models import save_steps


def dense(tensor: torch.Tensor) -> bytes:
    """The bytes that the pieces have to add up to."""
    if not tensor.numel():
        return b""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def assert_pieces(container: Container, name: str, tensor: torch.Tensor, size: int) -> None:
    found = [bytes(piece) for piece in pieces(stored(container, container.tensors[name]), size)]
    assert b"".join(found) == dense(tensor), name
    assert all(0 < len(piece) <= max(size, tensor.element_size()) for piece in found)
    assert all(len(piece) % tensor.element_size() == 0 for piece in found)


def strange_views() -> dict[str, torch.Tensor]:
    table = torch.arange(24 * 10, dtype=torch.float32).reshape(24, 10)
    cube = torch.arange(4 * 6 * 5, dtype=torch.int16).reshape(4, 6, 5)
    return {
        "contiguous": table,
        "transposed": table.t(),
        "columns": table[:, 3],
        "slices": table[1::3, ::2],
        "slices of transposed": table.t()[2::2, 1::5],
        "permuted": cube.permute(2, 0, 1),
        "permuted slices": cube.permute(1, 2, 0)[::2, 1:4],
        "expanded": torch.tensor([1.5, 2.5]).expand(7, 2),
        "expanded columns": torch.arange(5).reshape(5, 1).expand(5, 6),
        "expanded and transposed": cube[:, :, :1].expand(4, 6, 3).permute(2, 1, 0),
        "expanded scalar": torch.tensor(7, dtype=torch.int8).expand(3, 4, 5),
        "overlapping": torch.arange(9).as_strided((4, 3, 2), (1, 2, 1)),
        "complex": torch.randn(5, 4, dtype=torch.complex128).t(),
        "half complex": torch.randn(5, 4).to(torch.complex64).t(),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "scalar of a table": table[3, 4],
        "empty": torch.zeros(0, 4).t(),
        "empty part": table[:, 5:5],
        "ones": torch.randn(6, 4).t().reshape(4, 1, 6, 1),
    }


@pytest.mark.parametrize("size", [1, 24, 40, 1000, 8 << 20])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
def test_views_of_every_kind_come_out_dense(tmp_path, size, zipped):
    tensors = strange_views()
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    container = open_container(tmp_path / "a.pt")
    assert container.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_pieces(container, name, tensor, size)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_container_gives_the_bytes_that_its_own_library_reads(tmp_path, case):
    path = case.write(tmp_path)
    container = case.opener(path)
    tensors = case.load(path)
    assert tensors
    for name, tensor in tensors.items():
        assert_pieces(container, name, tensor, 16)


def grid(shape: tuple[int, ...], cuts: tuple[tuple[int, ...], ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All blocks of a tensor that is cut at these places along its dimensions."""
    spans = [
        list(itertools.pairwise([0, *sorted(at), size]))
        for size, at in itertools.zip_longest(shape, cuts, fillvalue=())
    ]
    return [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in itertools.product(*spans)]


@pytest.mark.parametrize("size", [4, 60, 8 << 20])
@pytest.mark.parametrize(
    "cuts",
    [((3, 5),), ((), (2, 6)), ((4,), (1, 5)), ((1, 2, 3), (3,), (2,)), ((7,),)],
    ids=["rows", "columns", "both", "all three", "an empty block"],
)
def test_blocks_of_a_dcp_folder_are_put_together(tmp_path, cuts, size):
    tensor = torch.randn(7, 8, 3)
    writer = Writer(tmp_path / "dcp", files=3)
    writer.tensor("w", tensor, reversed(grid((7, 8, 3), cuts)))
    writer.tensor("b", tensor[0, 0], grid((3,), ((1,),)))
    container = open_dcp(writer.close())
    assert_pieces(container, "w", tensor, size)
    assert_pieces(container, "b", tensor[0, 0], size)


@st.composite
def layouts(draw):
    """A tensor in blocks, each with strides of its own choice, and where its bytes are in one file."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    cuts = tuple(tuple(draw(st.sets(st.integers(1, n - 1), max_size=2))) if n > 1 else () for n in shape)
    dtype = draw(st.sampled_from(["uint8", "int16", "float32", "int64", "complex128"]))
    item = getattr(torch, dtype).itemsize
    chunks, memory = [], bytearray()
    for begin, size in grid(shape, cuts):
        strides = tuple(draw(st.integers(0, 9)) for _ in size)
        if draw(st.booleans()):
            strides = dense_strides(size)
        offset = len(memory) + draw(st.integers(0, 5))
        memory += bytes(offset - len(memory))
        memory += draw(st.randoms(use_true_random=False)).randbytes(reach(size, strides) * item)
        chunks.append(Chunk("", offset, 0, begin, size, strides))
    return dtype, shape, chunks, bytes(memory), draw(st.integers(1, 300))


@settings(max_examples=300, deadline=None)
@given(
    layouts(),
    st.sampled_from([16, 64, 2 << 20]),
    st.sampled_from([0, 64, 1 << 14]),
    st.sampled_from([16, 60, 16 << 20]),
)
def test_any_blocks_with_any_strides_come_out_as_torch_reads_them(tmp_path_factory, layout, slab, small, room):
    dtype, shape, chunks, memory, size = layout
    kind = getattr(torch, dtype)
    expected = torch.zeros(shape, dtype=kind)
    for chunk in chunks:
        count = reach(chunk.shape, chunk.strides)
        flat = torch.frombuffer(bytearray(memory[chunk.offset :]), dtype=kind, count=count)
        index = tuple(slice(b, b + n) for b, n in zip(chunk.begin, chunk.shape, strict=True))
        expected[index] = flat.as_strided(chunk.shape, chunk.strides)
    path = tmp_path_factory.mktemp("layout") / "x"
    path.write_bytes(memory)
    spec = TensorSpec("w", dtype, shape, dense_strides(shape), 0, expected.nbytes, "0", "", tuple(chunks))
    container = Container("", path, {"w": spec}, None, {"x": len(memory)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "SLAB", slab)
        patch.setattr(reading, "SMALL", small)
        patch.setattr(reading, "ROOM", room)
        assert_pieces(container, "w", expected, size)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process so")
def test_a_large_transposed_matrix_needs_memory_for_a_few_pieces_only(tmp_path):
    rows, columns = 6000, 5000
    torch.save(torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns).t(), tmp_path / "a.pt")
    code = rf"""
import hashlib, re, sys
from pathlib import Path
from core.containers.tensors.reading import pieces
from core.containers.tensors.views import stored
from core.containers.open import open_container
container = open_container(Path({str(tmp_path / "a.pt")!r}))
total = hashlib.sha256()
for piece in pieces(stored(container, container.tensors[""])):
    total.update(piece)
peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
print(total.hexdigest(), peak, {{"torch"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    digest, peak, modules = done.stdout.split(maxsplit=2)
    expected = torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns).t().contiguous()
    assert digest == hashlib.sha256(expected.numpy().tobytes()).hexdigest()
    assert int(peak) < 80_000  # kilobytes; the matrix has 120,000
    assert modules.strip() == "set()"


def test_a_view_that_claims_more_than_the_files_have_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "a.pt")
    container = open_container(tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        next(pieces(stored(container, container.tensors["w"])))
    size = (tmp_path / "a.pt").stat().st_size
    assert str(caught.value) == (
        f"{tmp_path / 'a.pt'}: w has {4 << 40} bytes, all files together {size}: a view that repeats its elements, "
        "not read."
    )


def saved(folder: Path, tensor: torch.Tensor) -> Container:
    torch.save({"w": tensor}, folder / "a.pt")
    return open_container(folder / "a.pt")


@pytest.mark.parametrize("turned", [False, True], ids=["dense", "transposed"])
def test_a_file_that_was_cut_off_since_it_was_opened_is_said(tmp_path, turned):
    tensor = torch.randn(100, 100)
    container = saved(tmp_path, tensor.t() if turned else tensor)
    with (tmp_path / "a.pt").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointDamaged, match=r"a\.pt: w ends after 2000 of \d+ bytes of the file\. It was cut off"):
        list(pieces(stored(container, container.tensors["w"])))


@pytest.mark.parametrize("answer", ["all", "a part", "nothing", "an error", "no call for it"])
def test_rows_that_share_a_cache_set_are_put_apart_and_come_out_as_torch_reads_them(tmp_path, monkeypatch, answer):
    turned = {
        "floats": torch.arange(700 * 512, dtype=torch.float32).reshape(700, 512).t(),
        "halves": torch.arange(9 * 2048, dtype=torch.int16).reshape(9, 2048).t(),
        "columns": torch.arange(70 * 1024, dtype=torch.int32).reshape(70, 1024)[:, 5:900:3].t(),
        "cube": torch.arange(6 * 4 * 512, dtype=torch.float32).reshape(6, 4, 512).permute(2, 0, 1),
    }
    torch.save(turned, tmp_path / "a.pt")
    calls = []

    def preadv(fd, rows, position, real=os.preadv):
        if len(rows) > 1:
            calls.append(len(rows))
            if answer == "an error":
                raise OSError(5, "Input/output error")
            if answer == "nothing":
                return 0
        return real(fd, rows[:1] if answer == "a part" else rows, position)

    monkeypatch.setattr(os, "preadv", preadv)
    if answer == "no call for it":
        monkeypatch.setattr("core.containers.checksum.POSITIONED_READS", False)
    container = open_container(tmp_path / "a.pt")
    for name, tensor in turned.items():
        assert_pieces(container, name, tensor, 8 << 20)
    assert bool(calls) == (answer != "no call for it")


def test_a_file_that_is_gone_since_it_was_opened_is_said(tmp_path):
    container = saved(tmp_path, torch.randn(3))
    (tmp_path / "a.pt").unlink()
    with pytest.raises(CheckpointNotFound, match=r"a\.pt: cannot be opened \(No such file or directory\)"):
        list(pieces(stored(container, container.tensors["w"])))


def test_a_bundle_that_was_moved_since_it_was_opened_is_read_all_the_same(tmp_path):
    gpt, _ = save_steps(tmp_path, 1)
    expected = {name: dense(tensor) for name, tensor in gpt.state_dict().items()}
    with inspect_path(tmp_path / "dante") as inspected:
        (tmp_path / "dante").rename(tmp_path / "elsewhere")
        for name, spec in inspected.weights.items():
            assert b"".join(map(bytes, pieces(stored(inspected.container, spec), 1000))) == expected[name], name
    assert inspected.weights


def test_a_legacy_file_is_read_from_where_it_was_opened(tmp_path):
    gpt, _ = save_steps(tmp_path, 1)
    values = json.loads((tmp_path / "dante/config.json").read_text())
    torch.save({"model_state_dict": gpt.state_dict(), "config": values}, tmp_path / "latest.pt")
    with inspect_path(tmp_path / "latest.pt") as inspected:
        assert inspected.bundle is not None
        (tmp_path / "latest.pt").unlink()
        for name, tensor in gpt.state_dict().items():
            found = pieces(stored(inspected.container, inspected.weights[name]))
            assert b"".join(map(bytes, found)) == dense(tensor), name
