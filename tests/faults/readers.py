"""Load in a loop beside a process that saves: every load is one whole step.

python -m tests.faults readers
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from core.bundle.bundle import open_bundle
from core.bundle.verify import verify
from core.checkpoint import CheckpointManager
from core.loading.tensors import load_optimizer
from tests.conftest import ROOT
from tests.faults.scenarios import NAME
from tests.faults.tally import Tally

SAVES = 200

WRITER = """
import sys, torch
from core.bundle.storage import DISK
from tests.makers.models import save_durably, started, update
torch.set_num_threads(1)
DISK.links = sys.argv[2] == "links"
made, model, optimizer = started(sys.argv[1])
update(model, optimizer)
for step in range(1, int(sys.argv[3]) + 1):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
            optimizer.state[parameter]["exp_avg"].fill_(step)
    save_durably(made, model, optimizer, step=step, extra={"step": step})
"""


def read_beside_saves(folder: Path, kind: str, saves: int) -> Tally:
    """Load beside a writer to write text with, and every other time the whole bundle, until its last step is seen."""
    tally, seen = Tally(), []
    writer = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WRITER, folder, kind, str(saves)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (folder / NAME / "training_state.json").exists():
        if writer.poll() is not None:
            tally.losses.append(f"{kind}: the writer ended before its first save, with {writer.returncode}")
            return tally
    while not seen or seen[-1] != saves:
        if writer.poll() not in (None, 0):
            tally.losses.append(f"{kind}: the writer ended with {writer.returncode}")
            break
        load = _load_bundle if len(seen) % 2 else _load_for_inference
        step, is_whole = load(folder)
        tally.check(is_whole, f"{kind}: a load of step {step} was a mixture")
        seen.append(step)
    writer.wait()
    tally.check(seen == sorted(seen), f"{kind}: a later load found an older step")
    tally.counts["loads"] += len(seen)
    tally.counts["saves beside them"] += saves
    tally.counts["different steps seen"] += len(set(seen))
    return tally


def _load_for_inference(folder: Path) -> tuple[int, bool]:
    model = CheckpointManager.load_for_inference(NAME, folder)
    return model.step, all(bool(torch.all(p == model.step)) for p in model.parameters())


def _load_bundle(folder: Path) -> tuple[int, bool]:
    with open_bundle(folder / NAME) as bundle:
        faults, moments = verify(bundle), load_optimizer(bundle)
    told = bundle.state["extra"] == {"step": bundle.step}
    assert moments is not None
    return bundle.step, told and not faults and all(
        bool(torch.all(entry["exp_avg"] == bundle.step)) for entry in moments["state"].values()
    )


def run(folder: Path, saves: int = SAVES) -> Tally:
    """Read beside saves with hard links, and without."""
    torch.set_num_threads(1)
    tally = Tally()
    for kind in ("links", "moves"):
        (folder / kind).mkdir()
        tally.add(read_beside_saves(folder / kind, kind, saves // 2))
    return tally
