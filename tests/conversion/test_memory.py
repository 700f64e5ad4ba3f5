"""A conversion needs memory for its largest tensor, never for the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from core.conversion import proof
from core.errors import CheckpointError
from tests.conftest import ROOT

MEMORY = """
import resource, sys
sys.path.insert(0, {root!r})
import convert_checkpoints
from core.conversion import command, planning, proof, text, writing
import numpy, tqdm
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before = peak()
assert convert_checkpoints.main({words!r}) == 0
print("PEAK", peak() - before)
"""


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
    words = [str(tmp_path / "hf"), str(tmp_path / "out"), "--to", to]
    code = MEMORY.format(root=str(ROOT), words=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    beyond = int(done.stdout.split("PEAK")[1]) - (largest if to == "bundle" else 0)
    assert beyond < 25e6, f"{beyond / 1e6:.1f} MB"
    assert np.prod(tensors["transformer.wte.weight"].shape) and proof and CheckpointError
