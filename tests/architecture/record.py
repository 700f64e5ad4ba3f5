"""Record what the program does, so that a change of its shape can be compared with what it did before.

    python -m tests.architecture.record write before.json [--root CHECKOUT]
    python -m tests.architecture.record compare before.json after.json

A refactor is right when the two are equal: 50 losses of two kinds of model to the last bit, the bytes of what they
saved, what inspection says of six upstream files, and exit codes and first lines of the four scripts. Start-up times
are recorded beside them and reported, never compared for equality.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

STEPS = 50
RUNS = {
    "gpt": ["--dropout", "0.1", "--ema", "0.9"],
    "flex_small": ["--arch", "flex_small"],
}
"""Flags of each recorded run, by the name of its model."""

HASHED = ("model.pt", "optimizer.pt", "config.json", "tokenizer.json")
VARIES = ("commit_id", "parent", "run", "saved_at", "environment", "elapsed_seconds")
"""Fields of the training state that no two runs share."""

INSPECTED = (
    "fixtures/lecture_char/legacy/latest.pt",
    "fixtures/nanogpt_char_biasFalse/ckpt.pt",
    "fixtures/hf_gpt2_sharded",
    "fixtures/dcp_fsdp2_4ranks/0000002",
    "fixtures/megatron_llama_gqa/exported_model.pt",
    "fixtures/modded_small_16e2da07_d128h1_opt/state_step000005.pt",
)
LINES = (
    "train.py --help",
    "train.py --n_layer none",
    "train.py --model_name absent --input_file absent.txt",
    "train.py --model_name gpt --checkpoint_root checkpoints --n_layer 7",
    "train.py --model_name gpt --checkpoint_root checkpoints",
    "train.py --model_name flex_small --checkpoint_root checkpoints --max_iters 50",
    "train.py --model_name gpt --checkpoint_root checkpoints --resume_from 7",
    "generate.py --help",
    "generate.py --model_name absent",
    "generate.py --model_name gpt --prompt abc --max_new_tokens 20 --seed 3 --device cpu",
    "generate.py --model_name flex_small --prompt abc --max_new_tokens 20 --seed 3 --device cpu --ema",
    "inspect_model.py --help",
    "inspect_model.py absent.pt",
    "inspect_model.py text.txt",
    "inspect_model.py --diff checkpoints/gpt checkpoints/gpt/step_00000025",
    "convert_checkpoints.py --help",
    "convert_checkpoints.py --list",
    "convert_checkpoints.py absent.pt out --to hf",
    "convert_checkpoints.py checkpoints/gpt out.safetensors --to safetensors",
    "convert_checkpoints.py checkpoints/gpt nano --to nanogpt --dry_run",
    "convert_checkpoints.py checkpoints/gpt gpt2 --to hf",
)
STARTS = 21  # runs of inspect_model.py, of which the median counts


class Recorder:
    """Runs the scripts of one checkout in a folder of their own."""

    def __init__(self, root: Path, shared: Path, home: Path) -> None:
        self.root, self.shared, self.home = root, shared, home
        text = home / "text.txt"
        text.write_bytes((shared / "data/dante.txt").read_bytes())
        os.utime(text, ns=(0, 0))  # a text is recorded with its time

    def run(self, line: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run one script to its end."""
        env = {**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "100"}
        command = [sys.executable, str(self.root / line[0]), *line[1:]]
        return subprocess.run(command, cwd=cwd or self.home, env=env, capture_output=True, text=True)

    def train(self, name: str) -> dict[str, Any]:
        """Train one model for STEPS steps; its losses and the digests of what it saved."""
        flags = f"--model_name {name} --input_file text.txt --max_iters {STEPS} --eval_interval 10 --eval_iters 1"
        flags += " --save_interval 25 --seed 1337 --device cpu"
        done = self.run(["train.py", *flags.split(), *RUNS[name]])
        assert done.returncode == 0, done.stderr
        folder = self.home / "checkpoints" / name
        state = json.loads((folder / "training_state.json").read_text())
        for field in VARIES:
            del state[field]
        del state["integrity"]["self"]  # a checksum of the whole document
        state["data"]["path"] = Path(state["data"]["path"]).name
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        files = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in HASHED}
        files["training_state.json"] = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert len(losses) == STEPS
        return {"losses": losses, "val_losses": [e["val_loss"] for e in log if "val_loss" in e], "sha256": files}

    def inspect(self, path: str) -> Any:
        """What `inspect_model.py --json` says of an upstream file."""
        done = self.run(["inspect_model.py", path, "--json", "--tensors"], cwd=self.shared)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def outcome(self, line: str) -> dict[str, Any]:
        """The exit code of a command line and the first line that it prints on each stream."""
        done = self.run(line.split())
        first = {name: (getattr(done, name).splitlines() or [""])[0] for name in ("stdout", "stderr")}
        return {"exit_code": done.returncode, **first}

    def start_up(self) -> float:
        """Median seconds from start to end of `inspect_model.py` on the model just trained."""
        seconds = []
        for _ in range(STARTS):
            begun = time.perf_counter()
            self.run(["inspect_model.py", "--model_name", "gpt"])
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds)


def record(root: Path, shared: Path) -> dict[str, Any]:
    """Record what the scripts of a checkout do, in a folder that is removed afterwards."""
    home = Path(tempfile.mkdtemp(prefix="record-"))
    try:
        recorder = Recorder(root, shared, home)
        return {
            "runs": {name: recorder.train(name) for name in RUNS},
            "inspect": {path: recorder.inspect(path) for path in INSPECTED},
            "lines": {line: recorder.outcome(line) for line in LINES},
            "seconds": {"inspect_model.py": recorder.start_up()},
        }
    finally:
        shutil.rmtree(home)


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Name every place where two records differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [*before, *(name for name in after if name not in before)]
        return [line for n in names for line in differences(before.get(n), after.get(n), f"{where}/{n}")]
    return [] if before == after else [f"{where}: {str(before)[:200]!r} before, {str(after)[:200]!r} after"]


def main() -> int:
    """Write or compare records, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.architecture.record", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    write = verbs.add_parser("write", help="run the scripts and write what they did")
    write.add_argument("file", type=Path)
    write.add_argument("--root", type=Path, default=ROOT, help="the checkout to run (this one)")
    compare = verbs.add_parser("compare", help="exit with 1 and name what differs")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.verb == "write":
        made = record(args.root.resolve(), ROOT.parent / "shared")
        args.file.write_text(json.dumps(made, indent=1) + "\n")
        return 0
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    for script, seconds in before.pop("seconds").items():
        print(f"{script}: {seconds:.3f} s before, {after['seconds'][script]:.3f} s after")
    del after["seconds"]
    found = differences(before, after)
    print("\n".join(found) or "equal")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
