"""What opens any torch file: it tells zips from streams, and calls other files by their names."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import save

from core.containers.pickles.inert import as_text
from core.errors import CheckpointError
from tests.conftest import ROOT
from tests.makers.torch_files import assert_same_as_torch, damage, example, failure, opened, saved

ZIP = saved(example())
STREAM = saved(example(), _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(("data", "kind"), [(ZIP, "zip"), (STREAM, "stream")], ids=["zip", "stream"])
def test_zips_and_streams_are_opened_as_what_they_are(data, kind):
    archive = opened(data)
    assert archive.container == kind
    assert_same_as_torch(data, archive)


@pytest.mark.parametrize("data", [ZIP, STREAM], ids=["zip", "stream"])
def test_opening_imports_neither_torch_nor_pickle(data):
    code = (
        "import sys, io; before = set(sys.modules)\n"
        "from core.containers.torch_files.file import open_torch_file\n"
        "import core.containers.pickles.foreign\n"
        "open_torch_file(io.BytesIO(sys.stdin.buffer.read()), 'x.pt')\n"
        "print(sorted({'torch', 'numpy', 'pickle', 'zipfile', 'tarfile'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, input=data)
    assert (done.stdout, done.stderr) == (b"[]\n", b"")


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


def tar(name: str, form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


TAR_OF_TORCH = "torch's tar format from before version 0.1.10, expected a zip or stream file of torch. Load and save it"
OTHERS = {
    "safetensors": (save({"w": torch.ones(3)}), "a safetensors file, expected a torch file"),
    "numpy": (npy(), "a numpy array, not a torch file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "a gzip file, not a torch file: it begins with b'\\x1f\\x8b"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Fetch the file with git lfs pull."),
    "web page": (b"\n<!DOCTYPE html><title>404</title>", "a web page, not a torch file"),
    "html": (b"<HTML><body>Sorry</body>", "a web page"),
    "json": (b'{"n_layer": 6}', 'not a torch zip file: a text file that begins with "{\\"n_layer'),
    "text": ("größer\n".encode() * 200, "a text file that begins with"),
    "plain pickle": (pickle.dumps({"itos": dict(enumerate("abcdefghijklmnopqrstuvw"))}), "without the magic number"),
    "small pickle": (pickle.dumps([1]), "without the magic number of torch (0x1950a86a20f9469cfc6c): torch.save did"),
    "cut plain pickle": (pickle.dumps(list(range(2000)))[:900], "without the magic number"),
    "tar": (tar("notes.txt", tarfile.USTAR_FORMAT), "a tar archive, expected a torch file. Unpack it first."),
    **{
        f"torch tar {name} {form}": (tar(name, form), TAR_OF_TORCH)
        for name, form in (("sys_info", tarfile.PAX_FORMAT), ("./pickle", tarfile.GNU_FORMAT), ("storages", 0))
    },
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_file_is_called_by_its_name(kind):
    data, message = OTHERS[kind]
    assert message in failure(data)
    with pytest.raises(CheckpointError) as caught:
        opened(data)
    assert type(caught.value) is CheckpointError  # it is not damaged, it is something else


@pytest.mark.parametrize("data", [b"\xff\x00\x93\x11" * 30, bytes(1000), b"\x80\xf0abc", b"\x00"])
def test_random_bytes_are_damage_and_named(data):
    message = damage(data)
    assert f"not a torch zip file: it begins with {as_text(data[:8])}" in message
