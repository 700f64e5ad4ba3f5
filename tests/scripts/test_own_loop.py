"""The loops of docs/own_loop.md: each is run as it stands there, interrupted, run again, and compared."""

from __future__ import annotations

import random
import re

import pytest
import torch

from core.checkpoint import CheckpointManager
from tests.conftest import ROOT
from tests.makers import own_loop

PAGE = (ROOT / "docs/own_loop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CELLS = [i for i, block in enumerate(BLOCKS) if "# back to the last save" in block]
LOOPS = {
    "torch": BLOCKS[0],
    "notebook": BLOCKS[CELLS[0] - 1] + BLOCKS[CELLS[0]],
    "accelerate": next(block for block in BLOCKS if "Accelerator()" in block),
    "Fabric": next(block for block in BLOCKS if "Fabric()" in block),
}
OTHERS = [
    block
    for block in BLOCKS
    if block not in LOOPS.values() and block not in LOOPS["notebook"] and "dante" not in block  # which README trains
]
CASES = [pytest.param(name, marks=[pytest.mark.full] * (name in ("accelerate", "Fabric"))) for name in LOOPS]


@pytest.fixture(autouse=True)
def own_generators():
    """Leave the generators of the process as they were."""
    before = random.getstate(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    torch.set_rng_state(before[1])


def run(code, seed):
    torch.manual_seed(seed)
    namespace = {}
    exec(code, namespace)
    return namespace


@pytest.mark.parametrize("name", CASES)
def test_a_loop_that_was_stopped_ends_with_the_bits_of_one_that_was_not(tmp_path, monkeypatch, name):
    package = {"accelerate": "accelerate", "Fabric": "lightning"}.get(name)
    if package:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    whole = [p.detach().clone() for p in run(LOOPS[name], 0)["model"].parameters()]
    (tmp_path / "checkpoints").rename("whole")
    run(LOOPS[name].replace("300):", "250):"), 0)  # saved at 100 and 200
    again = run(LOOPS[name], 1)
    assert all(map(torch.equal, whole, again["model"].parameters()))
    assert CheckpointManager("linear").saved_step() == 300


@pytest.mark.parametrize("code", OTHERS, ids=range(len(OTHERS)))
def test_every_other_example_runs(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    run(code, 0)


@pytest.mark.full
@pytest.mark.slow
def test_the_table_says_what_is_exact():
    for package in ("accelerate", "lightning_fabric", "lion_pytorch", "prodigyopt", "schedulefree"):
        pytest.importorskip(package)
    assert "\n".join(own_loop.table()) in PAGE
