"""Every flipped bit that a checksum covers is found and its tensor named; what has none is said to have none."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.containers import checksum
from core.containers.container import Check, Container
from core.containers.open import open_container
from core.inspection import verification
from core.inspection.inspect import inspect_path
from core.inspection.verification import verify_container
from tests.conftest import ROOT
from tests.makers.dcp_folders import Writer
from tests.makers.limits import processor_seconds
from tests.makers.models import save_steps


def model() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tied = torch.randn(40, 12)
    layers = {f"h.{i}.w": torch.randn(12, 12).bfloat16() for i in range(5)}
    return {"wte": tied, "head": tied, **layers, "b": torch.tensor(1.5), "turned": torch.randn(7, 9).t()}


def torch_zip(folder: Path) -> Container:
    torch.save({"model": model(), "step": 3}, folder / "a.pt")
    return open_container(folder / "a.pt")


@pytest.fixture
def bundle(tmp_path):
    """The container of a bundle, whose files stay open."""
    save_steps(tmp_path, 1)
    with inspect_path(tmp_path / "dante") as inspected:
        yield inspected.container


def dcp_folder(folder: Path) -> Container:
    writer = Writer(folder / "dcp", files=2)
    for name, tensor in model().items():
        half = tensor.shape[0] // 2 if tensor.dim() else 0
        rest = tuple(tensor.shape[1:])
        zeros = (0,) * len(rest)
        cut = [((0, *zeros), (half, *rest)), ((half, *zeros), (tensor.shape[0] - half, *rest))] if half else None
        writer.tensor(name, tensor, cut)
    writer.value("step", torch.tensor(7))
    return open_container(writer.close())


def place(container: Container, file: str) -> Path:
    return container.path / file if container.path.is_dir() else container.path


def flip_in_place(path: Path, byte: int, bit: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def test_the_sentence_has_the_path_all_tied_names_and_both_checksums(tmp_path):
    container = torch_zip(tmp_path)
    spec = container.tensors["model.wte"]
    expected = bytearray(model()["wte"].numpy().tobytes())
    recorded = zlib.crc32(expected)
    expected[100] ^= 4
    flip_in_place(tmp_path / "a.pt", spec.offset + 100, 2)
    assert verify_container(container).damaged == [
        f"{tmp_path / 'a.pt'}: model.wte, model.head is damaged "
        f"(CRC32 {zlib.crc32(expected):08x}, recorded {recorded:08x})."
    ]


def test_each_of_several_damaged_tensors_is_named(tmp_path):
    container = torch_zip(tmp_path)
    for name in ("model.h.1.w", "model.h.3.w", "model.b"):
        flip_in_place(tmp_path / "a.pt", container.tensors[name].offset, 0)
    names = [sentence.split(" ")[1] for sentence in verify_container(container).damaged]
    assert sorted(names) == ["model.b", "model.h.1.w", "model.h.3.w"]


def test_every_byte_is_read_once_and_progress_is_told_of_it(tmp_path, bundle):
    told = []
    found = verify_container(bundle, told.append)
    folder = tmp_path / "dante"
    size = sum((folder / name).stat().st_size for name in ("model.pt", "optimizer.pt", "tokenizer.json"))
    assert sum(told) == found.checked_bytes == size  # though the records in these files have their own checksums
    assert found.seconds > 0
    assert found.unrecorded == [f"{folder / 'config.json'}: without a checksum."]


def test_a_file_that_was_replaced_by_a_whole_one_is_no_damage_but_said(tmp_path, bundle):
    path = tmp_path / "dante/model.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state, path)
    with inspect_path(tmp_path / "dante") as inspected:
        recorded = inspected.bundle.state["integrity"]["files"]["model.pt"]
        found = verify_container(inspected.container)
    assert found.damaged == []
    size = path.stat().st_size
    assert size != recorded["size"]
    assert found.replaced == [
        f"{path}: every record in it is whole, but it is not the file that was saved (ends at byte {size}, its "
        f"checksum was recorded for bytes up to {recorded['size']}). It was replaced, or changed between its records."
    ]


def test_a_tokenizer_that_an_editor_wrote_anew_is_replaced_and_one_of_another_vocabulary_is_damaged(tmp_path, bundle):
    path = tmp_path / "dante/tokenizer.json"
    size, content = path.stat().st_size, json.loads(path.read_text())
    path.write_text(json.dumps(content))
    with inspect_path(tmp_path / "dante") as inspected:
        found = verify_container(inspected.container)
    here = f"ends at byte {path.stat().st_size}, its checksum was recorded for bytes up to {size}"
    assert found.replaced == [f"{path}: whole, but it is not the file that was saved ({here}). It was replaced."]
    assert found.damaged == []
    path.write_text(json.dumps({**content, "fingerprint": "0" * 12}, indent=2))
    with inspect_path(tmp_path / "dante") as inspected:
        found = verify_container(inspected.container)
    assert (len(found.damaged), found.replaced) == (1, []) and found.damaged[0].startswith(f"{path}: ")


def test_a_bit_between_the_records_is_found_by_the_checksum_of_the_file(tmp_path, bundle):
    path = tmp_path / "dante/model.pt"
    flip_in_place(path, path.read_bytes().index(b"PK\1\2") - 1, 0)  # padding before the directory
    found = verify_container(bundle)
    assert len(found.damaged + found.replaced) == 1
    assert (found.damaged + found.replaced)[0].startswith(f"{path}: ")


def test_a_file_without_records_of_its_own_is_damaged_as_a_whole(tmp_path, bundle):
    path = tmp_path / "dante/tokenizer.json"
    recorded = zlib.crc32(path.read_bytes())
    flip_in_place(path, 20, 1)
    assert verify_container(bundle).damaged == [
        f"{path}: tokenizer.json is damaged (CRC32 {zlib.crc32(path.read_bytes()):08x}, recorded {recorded:08x})."
    ]


@pytest.mark.parametrize("change", [b"", b"{}" * 500], ids=["cut off", "longer"])
def test_a_file_that_changed_its_size_since_it_was_opened_is_said(tmp_path, change):
    container = torch_zip(tmp_path)
    size = (tmp_path / "a.pt").stat().st_size
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data + change if change else data[:1000])
    assert verify_container(container).damaged == [
        f"{tmp_path / 'a.pt'}: has {size + len(change) if change else 1000} bytes, {size} when it was opened. It was "
        "changed since; verify it again."
    ]


def test_a_file_that_changes_while_it_is_read_is_said(tmp_path):
    container = torch_zip(tmp_path)
    size = (tmp_path / "a.pt").stat().st_size
    found = verify_container(container, lambda _: os.truncate(tmp_path / "a.pt", size - 1))
    assert found.damaged == [f"{tmp_path / 'a.pt'}: was changed while it was read; verify it again."]


def test_a_file_that_vanished_since_it_was_opened_is_said_and_the_others_are_verified(tmp_path):
    container = dcp_folder(tmp_path)
    all_bytes = verify_container(container).checked_bytes
    gone = tmp_path / "dcp/__0_0.distcp"
    gone.unlink()
    found = verify_container(container)
    assert found.damaged == [
        f"{gone}: cannot be opened (No such file or directory). It was there when the checkpoint was opened."
    ]
    assert 0 < found.checked_bytes < all_bytes


@pytest.fixture
def unreadable(monkeypatch):
    """Have the disk refuse to read some ranges of bytes."""
    true_read = checksum.crc32_range

    def refuse(is_bad):
        def read(descriptor, start, end):
            if is_bad(start, end):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return true_read(descriptor, start, end)

        monkeypatch.setattr(checksum, "crc32_range", read)

    return refuse


def test_bytes_that_the_disk_cannot_read_are_named_with_their_tensor(tmp_path, unreadable):
    container = torch_zip(tmp_path)
    bad = container.tensors["model.h.2.w"]
    unreadable(lambda start, end: start <= bad.offset < end)
    assert verify_container(container).damaged == [
        f"{tmp_path / 'a.pt'}: model.h.2.w is damaged (bytes {bad.offset} to {bad.offset + bad.nbytes} cannot be read: "
        "Input/output error)."
    ]


def test_of_a_file_that_cannot_be_read_at_all_each_tensor_is_named(tmp_path, unreadable):
    container = torch_zip(tmp_path)
    unreadable(lambda start, end: True)
    found = verify_container(container)
    assert len(found.damaged) == sum(1 for check in container.checks if check.crc32)
    assert all(sentence.endswith("cannot be read: Input/output error).") for sentence in found.damaged)


def test_what_records_no_checksum_is_listed_and_not_read(tmp_path):
    safetensors.torch.save_file(
        {name: torch.zeros(1000) for name in ("a", "b", "c", "d", "e")}, tmp_path / "x.safetensors"
    )
    found = verify_container(open_container(tmp_path / "x.safetensors"))
    assert found.unrecorded == [f"{tmp_path / 'x.safetensors'}: 20.0 KB without a checksum: a, b, c and 2 more."]
    assert (found.damaged, found.checked_bytes) == ([], 0)
    assert found.notes == [
        f"{tmp_path / 'x.safetensors'}: safetensors; the names, types, shapes and places of its 5 tensors fit the "
        "lengths of its 1 file."
    ]


def test_records_that_torch_wrote_without_checksum_are_listed(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        container = torch_zip(tmp_path)
    finally:
        torch.serialization.set_crc32_options(before)
    (sentence,) = verify_container(container).unrecorded
    assert sentence.startswith(f"{tmp_path / 'a.pt'}: ") and " without a checksum: " in sentence
    assert verify_container(container).damaged == []


def test_what_a_checksum_of_the_whole_file_covers_is_not_unrecorded(tmp_path):
    data = os.urandom(1000)
    (tmp_path / "x").write_bytes(data)
    inner = [Check("x", 0, 100, None, ("a",)), Check("x", 500, 500, None, ("b",))]
    container = Container("", tmp_path, {}, None, {"x": 1000}, [Check("x", 0, 1000, zlib.crc32(data), ("x",)), *inner])
    assert verify_container(container).unrecorded == []
    (tmp_path / "x").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (sentence,) = verify_container(container).damaged
    assert sentence.startswith(f"{tmp_path / 'x'}: x is damaged (CRC32 ")
    container.checks = [Check("x", 0, 600, zlib.crc32(data[:600]), ("first",)), *inner]
    assert verify_container(container).unrecorded == [f"{tmp_path / 'x'}: 500 bytes without a checksum: b."]


spans = st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=300, max_size=300), st.lists(spans, max_size=8), st.integers(1, 64), st.booleans())
def test_overlapping_checks_agree_with_zlib_and_read_each_byte_once(tmp_path_factory, data, spans, piece, positioned):
    path = tmp_path_factory.mktemp("spans") / "x"
    path.write_bytes(data)
    checks = [Check("x", a, b - a, zlib.crc32(data[a:b]), (f"{a}:{b}",)) for a, b in spans]
    container = Container("", path, {}, None, {"x": 300}, checks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_PIECE", piece)
        patch.setattr(checksum, "POSITIONED_READS", positioned)
        found = verify_container(container)
        assert (found.damaged, found.replaced) == ([], [])
        assert found.checked_bytes == len({i for a, b in spans for i in range(a, b)})
        for check in checks:
            if check.size:
                wrong = Check("x", check.offset, check.size, check.crc32 ^ 1, check.names)
                container.checks = [wrong]
                assert len(verify_container(container).damaged) == 1


def test_a_file_that_grew_since_its_checksum_was_recorded_is_damaged(tmp_path):
    data = os.urandom(1000)
    (tmp_path / "x").write_bytes(data + b"more")
    container = Container("", tmp_path, {}, None, {"x": 1004}, [Check("x", 0, 1000, zlib.crc32(data), ("x",))])
    assert verify_container(container).damaged == [
        f"{tmp_path / 'x'}: x is damaged (ends at byte 1004, its checksum was recorded for bytes up to 1000)."
    ]


def test_bytes_between_records_that_cannot_be_read_are_damage(tmp_path, bundle, unreadable):
    bundle.files = {"model.pt": bundle.files["model.pt"]}
    bundle.checks = [check for check in bundle.checks if check.file == "model.pt"]
    first, second, *_ = sorted(check.offset for check in bundle.checks)
    assert first == 0
    unreadable(lambda start, end: (start, end) == (0, second))
    found = verify_container(bundle)
    sentence = f"model.pt is damaged (bytes 0 to {second} cannot be read: Input/output error)."
    assert (found.damaged, found.replaced) == ([f"{tmp_path / 'dante/model.pt'}: {sentence}"], [])


def test_a_check_that_reaches_beyond_the_file_is_a_sentence(tmp_path):
    (tmp_path / "x").write_bytes(bytes(50))
    container = Container("", tmp_path / "x", {}, None, {"x": 50}, [Check("x", 10, 100, 1, ("w",))])
    found = verify_container(container)
    assert found.checked_bytes == 0
    assert found.damaged == [
        f"{tmp_path / 'x'}: w is damaged (ends at byte 50, its checksum was recorded for bytes up to 110)."
    ]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process so")
def test_a_large_file_is_verified_in_little_memory_without_torch_and_numpy(tmp_path):
    torch.save({"a": torch.zeros(20_000_000), "b": torch.ones(20_000_000)}, tmp_path / "a.pt")
    code = rf"""
import re, sys
from pathlib import Path
from core.containers.open import open_container
from core.inspection.verification import verify_container
found = verify_container(open_container(Path({str(tmp_path / "a.pt")!r})))
assert found.damaged == [] and found.checked_bytes > 160_000_000, found
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1], {{"torch", "numpy"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    peak, modules = done.stdout.split(maxsplit=1)
    assert int(peak) < 40_000 and modules.strip() == "set()"  # kilobytes


def test_many_small_records_are_verified_without_a_sum_over_all_pairs(tmp_path):
    data = os.urandom(400_000)
    (tmp_path / "x").write_bytes(data)
    edges = [0, *sorted(random.Random(1).sample(range(1, 400_000), 5000)), 400_000]
    checks = [Check("x", a, b - a, zlib.crc32(data[a:b]) ^ 1, (f"{a}",)) for a, b in itertools.pairwise(edges)]
    whole = Check("x", 0, 400_000, zlib.crc32(data) ^ 1, ("x",))
    with processor_seconds(5):
        found = verify_container(Container("", tmp_path / "x", {}, None, {"x": 400_000}, [*checks, whole]))
    assert [sentence.split(" ")[1] for sentence in found.damaged] == [str(a) for a in edges[:-1]]
