"""The average of one of our bundles, converted in the place of its weights."""

from __future__ import annotations

import subprocess
import sys

import torch

from core.checkpoint import CheckpointManager
from core.console.commandline import DONE, FAILED
from tests.conftest import ROOT
from tests.makers.models import equal
from tests.makers.runs import bits, same
from tests.scripts.test_train import ENVIRONMENT
from tests.training.test_ema import average, go_on


def convert(source, target, *words):
    return subprocess.run(
        [sys.executable, ROOT / "convert_checkpoints.py", source, target, *words],
        cwd=target.parent, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip


def test_a_conversion_takes_the_average_of_a_bundle_in_the_place_of_its_weights(tmp_path, one_thread):
    go_on(tmp_path, 6)
    done = convert(tmp_path / "dante", tmp_path / "ema.pt", "--to", "pt", "--save_ema")
    assert done.returncode == DONE, done.stderr
    assert "the average of the weights (ema.pt); the weights and their optimizer are left out" in done.stdout
    converted = torch.load(tmp_path / "ema.pt", weights_only=True)
    assert equal(converted, average(tmp_path))
    whole = convert(tmp_path / "dante", tmp_path / "bundle", "--to", "bundle", "--save_ema")
    assert whole.returncode == DONE, whole.stderr
    model = CheckpointManager.load_for_inference("bundle", tmp_path)
    assert equal(model.state_dict(), average(tmp_path)) and model.step == 6
    assert not (tmp_path / "bundle/optimizer.pt").exists()
    (tmp_path / "plain").mkdir()
    go_on(tmp_path / "plain", 2, ema=0.0)
    none = convert(tmp_path / "plain/dante", tmp_path / "none.pt", "--to", "pt", "--save_ema")
    assert none.returncode == FAILED and "dante/ema.pt: step 2 has no average of its weights" in none.stderr
    assert not (tmp_path / "none.pt").exists()


def test_a_converted_bundle_does_not_claim_to_be_the_one_that_was_saved(tmp_path, one_thread, capsys):
    go_on(tmp_path, 4, ema=0.0)
    (tmp_path / "moved").mkdir()
    assert convert(tmp_path / "dante", tmp_path / "moved/dante", "--to", "bundle").returncode == DONE
    capsys.readouterr()
    go_on(tmp_path / "moved", 6, ema=0.0)
    assert "is exact: step 4 was saved without a certificate" in capsys.readouterr().err
    go_on(tmp_path, 6, ema=0.0)
    assert same(bits(tmp_path / "dante"), bits(tmp_path / "moved/dante"))
