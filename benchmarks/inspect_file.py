"""Measure inspect_model.py on a 1.5 GB file as a whole process, beside torch.load; medians of several runs.

    python benchmarks/inspect_file.py [--repeats 7] [--folder DIR]

The file holds GPT-2 124M and its AdamW moments. This process stays free of torch: the peak of a child counts from the
memory of the process that started it. (It is not called inspect.py: that would hide the standard library's `inspect`
from every script in this folder.)
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MAKE = """
import sys, torch
D, shapes = 768, {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
for i in range(12):
    shapes.update({f"h.{i}.{n}.weight": s for n, s in {
        "ln_1": (D,), "attn.c_attn": (3 * D, D), "attn.c_proj": (D, D),
        "ln_2": (D,), "mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}.items()})
    shapes.update({f"h.{i}.{n}.bias": (s,) for n, s in {
        "ln_1": D, "attn.c_attn": 3 * D, "attn.c_proj": D, "ln_2": D, "mlp.c_fc": 4 * D, "mlp.c_proj": D}.items()})
shapes.update({"ln_f.weight": (D,), "ln_f.bias": (D,)})
state = {i: {"step": torch.tensor(1.0), "exp_avg": torch.randn(s), "exp_avg_sq": torch.rand(s)}
         for i, s in enumerate(shapes.values())}
torch.save({"model": {n: torch.randn(s) for n, s in shapes.items()},
            "optimizer": {"state": state, "param_groups": [{"lr": 6e-4, "params": list(state)}]},
            "step": 1000}, sys.argv[1])
"""
LOAD = "import sys, torch; torch.load(sys.argv[1], map_location='cpu', weights_only=True, mmap={mmap})"


def measure(command: list[str], bytecode: str) -> tuple[float, float]:
    """Seconds and peak megabytes of a process, start to end; compiled modules are kept in the folder `bytecode`."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": bytecode}
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(command[:2])} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1000


def main() -> None:
    """Make the file, run each way in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", help="where the 1.5 GB file is made (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = str(Path(folder) / "ckpt.pt")
        subprocess.run([sys.executable, "-c", MAKE, path], check=True)
        commands = {
            "inspect_model.py": [sys.executable, "inspect_model.py", path],
            "inspect_model.py --json": [sys.executable, "inspect_model.py", path, "--json"],
            "torch.load(mmap=True)": [sys.executable, "-c", LOAD.format(mmap=True), path],
            "torch.load": [sys.executable, "-c", LOAD.format(mmap=False), path],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            "python -c pass": [sys.executable, "-c", "pass"],
        }
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(args.repeats + 1):  # interleaved, so that a slow minute meets all of them; the first is warm-up
            for name, command in commands.items():
                runs[name].append(measure(command, folder))
        print(f"{Path(path).stat().st_size / 1e9:.2f} GB, medians of {args.repeats} runs, page cache warm")
        print(f"{'':26}{'seconds':>9}{'peak MB':>9}")
        for name, values in runs.items():
            seconds, peak = (statistics.median(column) for column in zip(*values[1:], strict=True))
            print(f"{name:26}{seconds:9.3f}{peak:9.1f}")


if __name__ == "__main__":
    main()
