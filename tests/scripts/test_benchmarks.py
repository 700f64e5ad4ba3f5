"""The measurements of saving and loading run, on a model too small to say anything, and leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.full]


def measured(script: str, folder: Path, *flags: str) -> dict:
    """The figures of a run."""
    command = [sys.executable, f"benchmarks/{script}", "--size", "small", "--repeats", "1", "--json", *flags]
    done = subprocess.run([*command, "--folder", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return json.loads(done.stdout)


def test_save_measures_each_claim(tmp_path):
    found = measured("save.py", tmp_path, "--steps", "1")
    figures = found["figures"]
    assert {"ours", "ours, ring", "torch.save", "torch.save + fsync", "dcp.async_save", "floor"} <= set(
        figures["durable"]
    )
    assert all(0 < way["blocked"] <= way["wall"] for way in figures["durable"].values())
    assert {"ours", "torch.save", "without"} <= set(figures["loop"])
    assert figures["memory"]["ours"]["state MB"] > 0.4
    assert figures["toy"]["every step"]["fsyncs per step"] > 1
    assert len(found["claims"]) == 8


def test_load_measures_each_claim(tmp_path):
    found = measured("load.py", tmp_path)
    figures = found["figures"]
    assert set(figures["resume"]) == set(figures["token"]) == {"ours", "nanoGPT"}
    parts = figures["resume"]["ours"]
    alone = [name for name in parts if not name.endswith(", cpu") and name != "total"]
    assert alone == ["found and verified", "model and optimizer", "first step"]
    assert sum(parts[name] for name in alone) == pytest.approx(parts["total"])
    assert len(found["claims"]) == 3


def test_distributed_measures_every_way_to_save_shards(tmp_path):
    sizes = {"ranks": 2, "rounds": 1, "n_layer": 1, "n_embd": 96, "tokens": 8}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "benchmarks/distributed.py", *flags, "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds = json.loads((tmp_path / "figures.json").read_text())["seconds"]
    assert all(0 <= blocked <= durable for blocked, durable, _ in seconds.values()) and len(seconds) == 3


@pytest.mark.parametrize("arch", ["gpt", "llama"])
@pytest.mark.parametrize("part", ["generation", "tuning"])
def test_generate_compares_the_same_model_in_transformers(arch, part):
    pytest.importorskip("transformers")
    sizes = {"arch": arch, "part": part, "n_layer": 1, "new_tokens": 4, "batch": 1, "length": 8, "repeats": 1}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "benchmarks/generate.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # also where texts or losses differ
    rows = ["ours", "transformers"] + (["ours, no cache", "limit of memory"] if part == "generation" else [])
    assert all(f"| {name:22} |" in done.stdout for name in rows)
    assert "x transformers: " in done.stdout


def test_every_part_of_the_check_of_a_gpu_runs_on_a_cpu_too():
    command = [sys.executable, "benchmarks/gpu_check.py", "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["part"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == ["pinned", "order", "stall", "speed", "exact", "flex", "generate", "fsdp"]
    assert not [line for line in lines.values() if "failed" in line]
    assert lines["order"]["torn"] == 0 and lines["exact"]["deterministic_has_the_same_bits"]


def test_the_check_of_a_gpu_says_what_it_has_not():
    command = [sys.executable, "benchmarks/gpu_check.py", "--small", "stal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no part is called stal: there are pinned, order, stall" in done.stderr
