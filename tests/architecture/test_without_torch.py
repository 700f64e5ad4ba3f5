"""To look into a checkpoint takes neither torch nor numpy, to migrate one no torch: they cannot be imported here."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

import inspect_model
from tests.conftest import ROOT
from tests.makers.containers import CASES
from tests.makers.generations import SIZES, FusedGPT, fuse, trained, write_single_file
from tests.makers.migrations import bits, plain, write
from tests.makers.old_runs import assert_same_bits

MODULES = [
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for room in ("containers", "families", "inspection")
    for path in sorted((ROOT / "core" / room).rglob("[!_]*.py"))
    if path.stem not in ("statistics", "change")  # which need numpy
]

BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy"):
            raise ImportError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
"""


def run(code: str, *args: object, blocked: str = BLOCKED) -> subprocess.CompletedProcess:
    """Run Python where torch and numpy cannot be imported."""
    command = [sys.executable, "-c", blocked + code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_container_is_inspected_and_verified_as_where_they_are(tmp_path_factory, capsys):
    paths = [str(case.write(tmp_path_factory.mktemp(case.name))) for case in CASES]
    done = run(
        f"import {', '.join(MODULES)}\n"
        "import inspect_model\n"
        "from pathlib import Path\n"
        "for path in sys.argv[1:]:\n"
        "    with core.inspection.inspect.inspect_path(Path(path)) as found:\n"
        "        assert core.inspection.verification.verify_container(found.container).damaged == []\n"
        "sys.exit(inspect_model.main([*sys.argv[1:], '--json', '--tensors']))",
        *paths,
    )
    assert (done.returncode, done.stderr) == (0, "tensors beside the model are left out: 1 of optimizer, 1 of common\n")
    assert inspect_model.main([*paths, "--json", "--tensors"]) == 0
    here = capsys.readouterr().out
    assert done.stdout == here
    assert len(json.loads(here)) == len(CASES)


def test_an_import_would_be_noticed():
    for name in ("torch", "numpy"):
        assert f"{name} is imported" in run(f"import {name}").stderr


def test_single_files_are_migrated_and_compared_as_where_torch_is(tmp_path):
    root = tmp_path / "checkpoints"
    model = FusedGPT(**SIZES)
    write_single_file(root / "fused" / "latest.pt", model, trained(model), step=5)
    lectures = [write(root / "lecture", "latest.pt", 30), write(root / "lecture", "final.pt", 20)]
    write(root / "lecture", "again.pt", 30)
    code = "import convert_checkpoints; sys.exit(convert_checkpoints.main(sys.argv[1:]))"
    with_numpy = BLOCKED.replace('("torch", "numpy")', '("torch",)')
    done = run(code, "--checkpoint_root", root, blocked=with_numpy)
    assert done.returncode == 0, done.stderr
    assert "nothing: same weights as the bundle (step 30)" in done.stdout
    assert_same_bits(bits(root / "fused"), plain(model))
    for step, lecture in zip((None, 20), lectures, strict=True):
        assert_same_bits(bits(root / "lecture", step), fuse(plain(lecture)))
    state = torch.load(root / "lecture" / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(bits(root / "lecture"))
