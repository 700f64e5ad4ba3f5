"""Measure convert_checkpoints.py as a whole process, beside cp of the same bytes and what torch offers.

    python benchmarks/convert.py [--repeats 5] [--kinds nanogpt dcp] [--gigabytes 1.5] [--cold] [--folder DIR]

`nanogpt`: a ckpt.pt of weights, to a Hugging Face folder (with transposed matrices) and to safetensors (bytes only
move). `dcp`: a folder of four ranks, each with its rows of every tensor, to one safetensors file. Each is converted
with and without the proof; `cp` copies the source, `sync -d` makes the copy durable, as a conversion is. The ways
take turns, and what one wrote is deleted before the next. Beside the seconds of the wall stand those of processors
(user and system): they move less where other programs run as well. With --cold the source is put out of the page cache
before each run (posix_fadvise). Compiled modules are kept, as they are on anybody's machine. This process stays free of
torch: the peak of a child counts from the memory of the process that started it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import FAST, Row, hand_over

TENSORS = """
import io, math, pickle, sys, torch
place, gigabytes = sys.argv[1], float(sys.argv[2])
D, V = 1024, 50304
layers = max(1, round((gigabytes * 1e9 / 4 - (V + 1024) * D) / (12 * D * D)))
shapes = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (1024, D)}
for i in range(layers):
    shapes.update({f"transformer.h.{i}.{n}.weight": s for n, s in {
        "ln_1": (D,), "attn.c_attn": (3 * D, D), "attn.c_proj": (D, D),
        "ln_2": (D,), "mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}.items()})
    shapes.update({f"transformer.h.{i}.{n}.bias": (s,) for n, s in {
        "ln_1": D, "attn.c_attn": 3 * D, "attn.c_proj": D, "ln_2": D, "mlp.c_fc": 4 * D, "mlp.c_proj": D}.items()})
shapes.update({"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)})
model = {n: torch.randn(s) for n, s in shapes.items()}
"""
MAKE = {
    "nanogpt": TENSORS
    + """
model["lm_head.weight"] = model["transformer.wte.weight"]
sizes = {"n_layer": layers, "n_head": 16, "n_embd": D, "block_size": 1024, "vocab_size": V}
args = {**sizes, "bias": True, "dropout": 0.0}
torch.save({"model": model, "model_args": args, "iter_num": 5, "best_val_loss": 3.0, "config": {}}, place)
""",
    "dcp": TENSORS
    + """
import torch.distributed.checkpoint.metadata as m
from pathlib import Path
from torch.distributed.checkpoint.filesystem import _StorageInfo
folder = Path(place); folder.mkdir()
said = m.Metadata({}, {n: (n,) for n in model}, {})
for n, t in model.items():
    said.state_dict_metadata[n] = m.TensorStorageMetadata(m.TensorProperties.create_from_tensor(t), t.size(), [])
for rank in range(4):
    name = f"__{rank}_0.distcp"
    with open(folder / name, "wb") as file:
        for n, t in model.items():
            step = math.ceil(len(t) / 4)
            part = t[rank * step : (rank + 1) * step].clone()
            begin = torch.Size([rank * step, *[0] * (t.dim() - 1)])
            said.state_dict_metadata[n].chunks.append(m.ChunkStorageMetadata(begin, part.size()))
            buffer = io.BytesIO()
            torch.save(part, buffer)
            said.storage_data[m.MetadataIndex(n, begin, rank)] = _StorageInfo(name, file.tell(), buffer.tell())
            file.write(buffer.getbuffer())
(folder / ".metadata").write_bytes(pickle.dumps(said))
""",
}
"""Programs that write a source."""

LOAD_SAVE = """
import sys, torch
from safetensors.torch import save_file
model = torch.load(sys.argv[1], map_location="cpu", weights_only=True)["model"]
del model["lm_head.weight"]
save_file(model, sys.argv[2] + ".safetensors")
"""
DCP_TO_TORCH = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
"""
CONVERT = [sys.executable, "convert_checkpoints.py"]
LARGEST = 50304 * 1024 * 4 / 1e6
"""Megabytes of the token table."""

COPY, DURABLE = "cp", "cp, then sync -d"

Run = tuple[float, float, float]
"""Seconds, seconds of processors, and peak megabytes."""
Runs = dict[str, list[Run]]


def commands_for(kind: str, source: Path, made: Path) -> dict[str, list[str]]:
    """What to run for a kind, by the names of the rows; `made` is where each may write."""
    one = [*CONVERT, str(source), f"{made}.safetensors", "--to", "safetensors"]
    found = {COPY: ["cp", "-r", str(source), str(made)]}
    durable = 'cp -r "$0" "$1" && find "$1" -type f -exec sync -d {} +'
    found[DURABLE] = ["sh", "-c", durable, str(source), str(made)]
    found |= {"safetensors, --no_verify": [*one, "--no_verify"], "safetensors, proven": one}
    if kind == "nanogpt":
        hf = [*CONVERT, str(source), str(made), "--to", "hf"]
        found |= {"hf, --no_verify": [*hf, "--no_verify"], "hf, proven": hf}
        found["torch.load + save_file"] = [sys.executable, "-c", LOAD_SAVE, str(source), str(made)]
    else:
        found["dcp_to_torch_save"] = [sys.executable, "-W", "ignore", "-c", DCP_TO_TORCH, str(source), str(made)]
    return found


def take_turns(commands: dict[str, list[str]], source: Path, made: Path, repeats: int, is_cold: bool) -> Runs:
    """Run all commands so often, one after another; the first round is warm-up."""
    runs: Runs = {name: [] for name in commands}
    bytecode = str(made.parent / "bytecode")
    for _ in range(repeats + 1):
        for name, command in commands.items():
            if is_cold:
                forget(source)
            runs[name].append(measure(command, bytecode))
            for path in made.parent.glob(f"{made.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {name: values[1:] for name, values in runs.items()}


def forget(source: Path) -> None:
    """Put the files of a source out of the page cache."""
    for path in [source] if source.is_file() else source.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure(command: list[str], bytecode: str) -> Run:
    """Measure a process, start to end; compiled modules are kept in the folder `bytecode`."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": bytecode}
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(command[:6])} failed")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def table(title: str, runs: Runs) -> list[str]:
    """Medians of each row, and of its ratios to the `cp` of the same round and to that made durable."""
    lines = [f"{title:32}{'seconds':>9}{'cpu':>7}{'peak MB':>9}{'of cp':>8}{'of durable':>12}"]
    for name, values in runs.items():
        seconds, processors, peak = (statistics.median(column) for column in zip(*values, strict=True))
        copied, durable = (
            statistics.median(mine[0] / copy[0] for mine, copy in zip(values, runs[other], strict=True))
            for other in (COPY, DURABLE)
        )
        lines.append(f"{name:32}{seconds:9.2f}{processors:7.2f}{peak:9.1f}{copied:7.2f}x{durable:11.2f}x")
    return lines


def claims(kind: str, runs: Runs, largest: float, is_cold: bool) -> list[Row]:
    """What is claimed of a kind, against a durable copy in the same round; `largest` is the largest tensor, in MB."""
    proven = 1.25 if is_cold else 1.0 if FAST else 1.1
    bars = {"safetensors, proven": proven, "safetensors, --no_verify": 0.7, "hf, proven": 1.4}
    cold = ", cold" if is_cold else ""
    seconds = {name: statistics.median(run[0] for run in values) for name, values in runs.items()}
    rows = []
    for name, bar in bars.items():
        if name in runs:
            ratio = statistics.median(a[0] / b[0] for a, b in zip(runs[name], runs[DURABLE], strict=True))
            shown = f"{seconds[name]:.2f} s", f"{seconds[DURABLE]:.2f} s"
            rows.append(Row(f"{kind} to {name}{cold}; cp + sync", ratio, bar, "x", False, *shown))
    peak = max(run[2] for name in bars for run in runs.get(name, []))
    shown = f"{peak:.0f} MB", f"{largest:.0f} MB"
    rows.append(Row(f"{kind}{cold}, peak beyond the largest tensor", peak - largest, 40, " MB", False, *shown))
    return rows


def main() -> None:
    """Make one source after another, convert it each way in turn, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=MAKE, default=list(MAKE), help="default: all")
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--cold", action="store_true", help="the source is not in the page cache")
    parser.add_argument("--folder", help="where the files are made (default: the system's temporary folder)")
    args = parser.parse_args()
    print(
        f"medians of {args.repeats} runs, page cache {'cold' if args.cold else 'warm'}; load {os.getloadavg()[0]:.1f}"
    )
    rows: list[Row] = []
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            source, made = Path(folder) / {"nanogpt": "ckpt.pt"}.get(kind, kind), Path(folder) / "made"
            command = [sys.executable, "-W", "ignore", "-c", MAKE[kind], str(source), str(args.gigabytes)]
            subprocess.run(command, cwd=ROOT, check=True)
            size = sum(p.stat().st_size for p in ([source] if source.is_file() else source.iterdir()))
            runs = take_turns(commands_for(kind, source, made), source, made, args.repeats, args.cold)
            print("", *table(f"{kind}, {size / 1e9:.2f} GB", runs), sep="\n", flush=True)
            rows += claims(kind, runs, LARGEST, args.cold)
    hand_over(rows)


if __name__ == "__main__":
    main()
