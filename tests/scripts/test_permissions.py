"""What is written may be read by whom the umask says, and by nobody else."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from pathlib import Path

import pytest

import convert_checkpoints
import train
from tests.fuzz.fields import SIZES
from tests.hostile.test_doors import SCRIPTS

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.mark.parametrize(("mask", "expected"), [(0o027, 0o640), (0o002, 0o664)])
def test_files_are_written_with_0666_less_umask(mask, expected, home):
    Path("text.txt").write_text("to be or not to be\n" * 50)
    place = ["--model_name", "m", "--input_file", "text.txt", "--device", "cpu", "--eval_iters", "1", "--ema", "0.9"]
    before = os.umask(mask)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for steps in ("2", "4"):
                assert train.main([*place, *SIZES, "--max_iters", steps, "--save_interval", "1", "--keep", "9"]) == 0
            assert SCRIPTS["data/prepare.py"].main(["text.txt", "--output_dir", "tokens"]) == 0
            for to, target in {"pt": "a.pt", "safetensors": "b.safetensors", "bundle": "c", "dcp": "d"}.items():
                assert convert_checkpoints.main(["checkpoints/m", f"out_{target}", "--to", to]) == 0
    finally:
        os.umask(before)
    made = [path for place in ("checkpoints", "tokens") for path in Path(place).rglob("*")]
    made += [path for out in Path().glob("out_*") for path in (out, *out.rglob("*"))]
    files = {str(p): stat.S_IMODE(p.stat().st_mode) for p in made if p.is_file()}
    folders = {str(p): stat.S_IMODE(p.stat().st_mode) for p in made if p.is_dir()}
    assert {name: oct(mode) for name, mode in files.items() if mode != expected} == {} and len(files) > 25
    assert {name: oct(mode) for name, mode in folders.items() if mode != 0o777 & ~mask} == {} and len(folders) >= 5
