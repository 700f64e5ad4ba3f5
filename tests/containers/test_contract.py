"""The contract of all containers; what a container is, `tests/makers/containers.py` says."""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.containers.container import Container
from core.containers.open import open_container
from core.containers.pickles.inert import as_text
from core.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound
from tests.makers.containers import BOTH, CASES, Case, assert_same, checksum_fails, place
from tests.makers.mutations import MUTATIONS, mutated


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> dict[str, Path]:
    """An example of every container, by the name of its case."""
    return {case.name: case.write(tmp_path_factory.mktemp(case.name)) for case in CASES}


@pytest.fixture(scope="module")
def files(examples) -> dict[str, list[Path]]:
    """The files of every example."""
    opened = {case.name: case.opener(examples[case.name]) for case in CASES}
    return {name: [place(container, file) for file in sorted(container.files)] for name, container in opened.items()}


def each(function):
    return pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)(function)


@each
def test_names_types_shapes_and_bytes_equal_those_of_the_formats_own_library(case: Case, examples):
    path = examples[case.name]
    container = case.opener(path)
    assert container.path == path and container.kind == case.kind
    assert container.foreign == []
    assert_same(container, case.load(path))


@each
def test_opening_changes_nothing_and_leaves_no_file_open(case: Case, examples):
    path = examples[case.name]
    folder = path if path.is_dir() else path.parent
    before = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}
    held = len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0
    case.door(path)
    assert {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")} == before
    assert held == (len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0)


@each
def test_one_call_finds_out_which_it_is(case: Case, examples):
    path = examples[case.name]
    assert described(case.door(path)) == described(case.opener(path))


def described(container: Container) -> dict[str, Any]:
    """All that a container says; its content as text, since two inert records are never equal."""
    said = {field.name: getattr(container, field.name) for field in dataclasses.fields(Container)}
    return {**said, "content": as_text(container.content, 1 << 20)}


@each
def test_opens_no_container_of_another_kind_unless_it_is_both(case: Case, examples):
    others = [other for other in CASES if other.opener is not case.opener]
    assert others
    for other in others:
        path = examples[other.name]
        if (case.opener, other.opener) in BOTH:
            assert case.opener(path).path == path
            continue
        with pytest.raises(CheckpointError) as caught:
            case.opener(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("case", [case for case in CASES if case.shares], ids=lambda case: case.name)
def test_tensors_share_a_storage_exactly_where_torch_shares_memory(case: Case, examples):
    theirs, ours = case.load(examples[case.name]), case.opener(examples[case.name]).tensors
    shared = 0
    for a, b in itertools.combinations([name for name, t in theirs.items() if t.numel()], 2):
        same = theirs[a].untyped_storage().data_ptr() == theirs[b].untyped_storage().data_ptr()
        assert (ours[a].storage == ours[b].storage) == same, (a, b)
        shared += same
    assert shared


@each
def test_files_checks_and_tensors_lie_where_the_disk_has_them(case: Case, examples):
    container = case.opener(examples[case.name])
    assert container.files == {name: place(container, name).stat().st_size for name in container.files}
    checked = {name for check in container.checks for name in check.names}
    assert container.tensors.keys() <= checked
    for check in container.checks:
        assert 0 <= check.offset <= check.offset + check.size <= container.files[check.file]


@each
def test_recorded_checksums_are_those_of_the_bytes(case: Case, examples):
    container = case.opener(examples[case.name])
    assert [check.names for check in container.checks if checksum_fails(container, check)] == []


@each
def test_a_file_cut_off_anywhere_is_named(case: Case, examples, files):
    assert files[case.name]
    for file in files[case.name]:
        whole = file.read_bytes()
        last = len(whole.rstrip()) - 1  # a text that lost its last line break lost nothing
        try:
            for length in sorted({0, 1, 7, 8, 9, len(whole) // 3, len(whole) // 2, last}):
                file.write_bytes(whole[:length])
                assert str(file) in complaint(case, examples[case.name]), length
        finally:
            file.write_bytes(whole)


def complaint(case: Case, path: Path) -> str:
    """What is said of a damaged example."""
    try:
        container = case.door(path)
    except CheckpointError as error:
        return str(error)
    assert case.lenient, container
    return "\n".join(container.notes)


WITHOUT_CHECKSUMS = {"torch_stream", "safetensors", "hf_one", "hf_shards"}


@each
def test_a_flipped_bit_in_a_checked_record_is_found_and_names_it(case: Case, examples):
    path = examples[case.name]
    container = case.opener(path)
    generator = random.Random(5)
    checks = [c for c in container.checks if c.crc32 is not None and c.size and c.names[0] in container.tensors]
    assert bool(checks) == (case.name not in WITHOUT_CHECKSUMS)
    for check in checks:
        file = place(container, check.file)
        whole = file.read_bytes()
        at = check.offset + generator.randrange(check.size)
        covering = [c for c in container.checks if c.file == check.file and c.offset <= at < c.offset + c.size]
        data = bytearray(whole)
        data[at] ^= 1 << generator.randrange(8)
        try:
            file.write_bytes(data)
            failing = [c for c in case.door(path).checks if checksum_fails(container, c)]
            assert check in failing and failing == covering
        finally:
            file.write_bytes(whole)


@each
@given(mutations=MUTATIONS, which=st.integers(0, 99), head=st.booleans())
@settings(max_examples=100, deadline=None)
def test_whatever_the_bytes_only_checkpoint_errors_come_out_within_a_second(
    case: Case, examples, files, mutations, which, head
):
    file = files[case.name][which % len(files[case.name])]
    whole = file.read_bytes()
    if head:  # where the structure is: at the beginning, or of a zip at its end
        mutations = [(how, at % 600 - (at % 2) * 600, value) for how, at, value in mutations]
    file.write_bytes(mutated(whole, mutations))
    start = time.process_time()
    try:
        case.door(examples[case.name])
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        took = time.process_time() - start
        file.write_bytes(whole)
    assert took < 1


def test_nothing_there_is_said_with_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "log.csv").write_text("x")
    with pytest.raises(CheckpointNotFound) as caught:
        open_container(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}: no checkpoint here. Looked for config.json + model.pt (bundle), ")
    assert said.endswith("; found log.csv, notes.txt.")
    for name in ["latest.pt", "model.safetensors", ".metadata", "*.distcp", "model_rank*.pt", "iter_*", "*.pt"]:
        assert name in said
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFound, match=r"; found nothing\.$"):
        open_container(tmp_path / "empty")


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointNotFound, match=r"gone\.pt: cannot be opened \(No such file or directory\)\."):
        open_container(tmp_path / "gone.pt")
    with pytest.raises(CheckpointNotFound, match="cannot be opened"):
        open_container(Path("a\0b"))
    with pytest.raises(CheckpointNotFound, match="/dev/null: a device or a pipe, expected a file"):
        open_container(Path("/dev/null"))


def test_a_folder_with_one_checkpoint_file_opens_that_file(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "ckpt.pt")
    (tmp_path / "config.yaml").write_text("x: 1")
    container = open_container(tmp_path)
    assert (container.path, container.kind, list(container.tensors)) == (tmp_path / "ckpt.pt", "torch zip", ["w"])


def test_a_folder_with_several_checkpoint_files_names_them(tmp_path):
    for name in ("a.pt", "b.pth"):
        torch.save({}, tmp_path / name)
    with pytest.raises(CheckpointNotFound, match=r"2 files that may each be one: a\.pt, b\.pth\. Name one of them"):
        open_container(tmp_path)


@pytest.mark.parametrize("pattern", ["ckpt_shard_{}.pt", "m-0000{}-of-00004.pt"])  # ranks: test_part.py
def test_a_series_of_parts_is_not_offered_one_by_one(tmp_path, pattern):
    for i in range(4):
        torch.save({"w": torch.ones(2)}, tmp_path / pattern.format(i))
    with pytest.raises(CheckpointNotFound) as caught:
        open_container(tmp_path)
    said = f"{tmp_path}: 4 files that are parts of one checkpoint by their names: {pattern.format(0)}, "
    assert str(caught.value).startswith(said) and "Name one of them" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["model_00{}.pt", "state_step{}.pt", "tmp{}.pt", "ckpt-{}.pth"])
def test_a_series_of_steps_is(tmp_path, pattern):
    for i in range(3):
        torch.save({"w": torch.ones(2)}, tmp_path / pattern.format(i))
    with pytest.raises(CheckpointNotFound, match=r"3 files that may each be one: .*\. Name one of them"):
        open_container(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("config.json", b'{"a": 1}', "a JSON text, not a checkpoint. Name the folder"),
        ("x.h5", b"\x89HDF\r\n\x1a\n0123", "an HDF5 file"),
        ("x.txt", b"hello", 'a text file that begins with "hello"'),
        ("x.safetensors", b"<html>hello", "its header claims"),
        ("x.zip", b"PK\5\6" + bytes(18), "zip"),
        ("x.bin", b"\x80\x02}.", "a pickle without the magic number"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_container(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("name", ["x", "x.pt", "x.bin", "x.tmp", "x.json.bak"])
def test_a_file_is_known_by_its_first_bytes_whatever_it_is_called(examples, tmp_path, name):
    files = [case for case in CASES if examples[case.name].is_file()]
    assert len(files) >= 3
    for case in files:
        shutil.copyfile(examples[case.name], tmp_path / name)
        assert open_container(tmp_path / name).kind == case.kind


def test_a_damaged_disk_is_an_error_of_the_file(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("core.containers.torch_files.container.open_torch_file", fail)
    with pytest.raises(CheckpointDamaged, match=r"x\.pt: cannot be read \(Input/output error\)"):
        open_container(tmp_path / "x.pt")
