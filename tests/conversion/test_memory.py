"""A conversion needs memory for its largest tensor, never for the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import ROOT
from tests.makers.generations import SIZES, LectureGPT, trained, write_single_file

MEMORY = """
import resource, sys
sys.path.insert(0, {root!r})
import convert_checkpoints
from core.conversion import command, planning, proof, text, writing
from core.conversion.migration import migrate
import numpy, tqdm
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before = peak()
assert convert_checkpoints.main({words!r}) == 0
print("PEAK", peak() - before)
"""


def peak_of(*words: str) -> int:
    """Bytes of memory that a conversion or a migration takes beyond what its imports take."""
    code = MEMORY.format(root=str(ROOT), words=list(words))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("PEAK")[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_migration_needs_no_memory_for_the_model_either(tmp_path):
    """100 MB of weights and moments, of which nothing is mapped or loaded."""
    model = LectureGPT(**{**SIZES, "n_layer": 3, "n_embd": 480})
    write_single_file(tmp_path / "dante" / "latest.pt", model, trained(model, 1), step=3)
    peak = peak_of(str(tmp_path / "dante"))
    assert (tmp_path / "dante" / "optimizer.pt").stat().st_size > 60e6 and peak < 30e6, f"{peak / 1e6:.1f} MB"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("to", ["bundle", "safetensors"])
def test_memory_is_bounded_by_the_largest_tensor_never_by_the_model(tmp_path, to):
    """120 MB of tensors, the largest of 16 MB; transposed ones are put in place in memory, others only pass through."""
    width = 1024
    tensors = {"transformer.wte.weight": torch.zeros(512, width), "transformer.wpe.weight": torch.zeros(64, width)}
    for i in range(2):
        shapes = {"ln_1": None, "attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width), "ln_2": None}
        shapes |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
        for name, shape in shapes.items():
            tensors[f"transformer.h.{i}.{name}.weight"] = torch.zeros(shape or (width,))
            tensors[f"transformer.h.{i}.{name}.bias"] = torch.zeros(shape[1] if shape else width)
    tensors |= {"transformer.ln_f.weight": torch.ones(width), "transformer.ln_f.bias": torch.zeros(width)}
    largest = max(t.nbytes for t in tensors.values())
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "gpt2", "n_head": 16, "activation_function": "gelu_new"}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    beyond = peak_of(str(tmp_path / "hf"), str(tmp_path / "out"), "--to", to) - (largest if to == "bundle" else 0)
    assert beyond < 25e6, f"{beyond / 1e6:.1f} MB"
