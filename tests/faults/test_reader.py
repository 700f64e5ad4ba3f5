from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from core.bundle import open_bundle, verify
from core.materialize import load_model, load_optimizer
from tests.conftest import ROOT

SAVES = 100

WRITER = """
import sys, torch
from core.storage import DISK
from tests.helpers import started, update, save_durably
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


@pytest.mark.parametrize("links", ["links", "moves"])
def test_a_reader_beside_a_hundred_saves_always_sees_one_step_whole(tmp_path, links, tell):
    writer = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WRITER, tmp_path, links, str(SAVES)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "dante/training_state.json").exists():
        assert writer.poll() is None, "the writer ended before its first save"
    seen = []
    while writer.poll() is None or not seen or seen[-1] != SAVES:
        assert writer.poll() in (None, 0)
        with open_bundle(tmp_path / "dante") as bundle:
            assert verify(bundle) == []
            step = bundle.step
            assert bundle.state["extra"] == {"step": step}
            model = load_model(bundle)
            moments = load_optimizer(bundle)
        assert all(torch.all(p == step) for p in model.parameters())
        assert all(torch.all(m["exp_avg"] == step) for m in moments["state"].values())
        seen.append(step)
    assert seen == sorted(seen)
    tell(f"{len(seen)} loads beside {SAVES} saves saw {len(set(seen))} different steps, none a mixture ({links})")
