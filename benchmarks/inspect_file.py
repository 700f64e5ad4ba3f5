"""Measure inspect_model.py as a whole process, beside what torch, safetensors and DCP offer for the same files.

    python benchmarks/inspect_file.py [--repeats 7] [--kinds pt safetensors dcp bundle shards] [--folder DIR]

Each kind holds GPT-2 124M and its AdamW moments (1.5 GB), and a narrower model with as many tensors (0.15 GB), because
the time to look into a file must not depend on its size; `shards` is a Hugging Face folder of 64 files and 10,002
tensors without data. `--verify` runs beside a plain loop of zlib.crc32 over the same files. The commands take turns,
and a kind is deleted before the next is made: 1.7 GB of disk are enough. This process stays free of torch: the peak of
a child counts from the memory of the process that started it. (It is not called inspect.py: that would hide the
standard library's `inspect` from every script in this folder.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import Row, hand_over

WIDTHS = {"large": 768, "small": 168}
"""Width of the model of 1.5 GB, and of that of 0.15 GB."""

TENSORS = """
import sys, torch
place, D = sys.argv[1], int(sys.argv[2])
shapes = {"wte.weight": (50257, D), "wpe.weight": (1024, D)}
for i in range(12):
    shapes.update({f"h.{i}.{n}.weight": s for n, s in {
        "ln_1": (D,), "attn.c_attn": (3 * D, D), "attn.c_proj": (D, D),
        "ln_2": (D,), "mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}.items()})
    shapes.update({f"h.{i}.{n}.bias": (s,) for n, s in {
        "ln_1": D, "attn.c_attn": 3 * D, "attn.c_proj": D, "ln_2": D, "mlp.c_fc": 4 * D, "mlp.c_proj": D}.items()})
shapes.update({"ln_f.weight": (D,), "ln_f.bias": (D,)})
model = {n: torch.randn(s) for n, s in shapes.items()}
moments = {n: {"step": torch.tensor(1.0), "exp_avg": torch.randn(s), "exp_avg_sq": torch.rand(s)}
           for n, s in shapes.items()}
"""
MAKE = {
    "pt": TENSORS
    + """
state = dict(enumerate(moments.values()))
groups = [{"lr": 6e-4, "params": list(state)}]
torch.save({"model": model, "optimizer": {"state": state, "param_groups": groups}, "step": 1000}, place)
""",
    "safetensors": TENSORS
    + """
from safetensors.torch import save_file
flat = {f"optimizer.{n}.{k}": t for n, entry in moments.items() for k, t in entry.items()}
save_file({f"model.{n}": t for n, t in model.items()} | flat, place, {"step": "1000"})
""",
    "dcp": TENSORS
    + """
import torch.distributed.checkpoint as dcp
dcp.save({"model": model, "optimizer": {"state": moments}, "step": 1000}, checkpoint_id=place, no_dist=True)
""",
    "bundle": """
import sys, torch
from core.config import GPTConfig
from core.model import GPT
place, D = sys.argv[1], int(sys.argv[2])
sizes = {"n_layer": 12, "n_head": 12, "n_embd": D, "block_size": 1024, "vocab_size": 50257}
model = GPT(GPTConfig.from_dict({**sizes, "tied_head": True, "head_bias": False, "bias": True, "device": "cpu"}))
optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)
for p in model.parameters():
    p.grad = torch.randn_like(p)
optimizer.step()
model.save_checkpoint_bundle(place, step=1000, optimizer_state=optimizer.state_dict())
""",
}
"""Programs that write a place at a width."""

TORCH = "import sys, torch; torch.load(sys.argv[1], map_location='cpu', weights_only=True, mmap={mmap})"
DCP = "import sys; from torch.distributed.checkpoint import FileSystemReader as R; R(sys.argv[1]).read_metadata()"
SAFE_OPEN = """
import sys
from pathlib import Path
from safetensors import safe_open
place = Path(sys.argv[1])
for path in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
    with safe_open(path, framework="{framework}") as file:
        for name in file.keys():
            file.get_slice(name).get_shape()
"""
SAFETENSORS = {f"safe_open, {name}": SAFE_OPEN.format(framework=name) for name in ("numpy", "torch")}
READERS = {
    "pt": {"torch.load(mmap=True)": TORCH.format(mmap=True), "torch.load": TORCH.format(mmap=False)},
    "safetensors": SAFETENSORS,
    "dcp": {"FileSystemReader.read_metadata": DCP},
    "bundle": {},
    "shards": SAFETENSORS,
}
"""Programs that do as much with a place of a kind as its own library can, or more."""

CRC32 = """
import sys, zlib
from pathlib import Path
place = Path(sys.argv[1])
buffer = memoryview(bytearray(4 << 20))
for path in sorted(place.iterdir()) if place.is_dir() else [place]:
    crc = 0
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            crc = zlib.crc32(buffer[:size], crc)
"""

VERIFY, LOOP = "inspect_model.py --verify", "zlib.crc32, one thread"

Runs = dict[str, list[tuple[float, float]]]


def make(kind: str, folder: Path) -> dict[str, Path]:
    """Write the examples of a kind below a folder; returns them by what they are called."""
    if kind == "shards":
        write_shards(folder / "shards")
        return {"": folder / "shards"}
    places = {}
    for size, width in WIDTHS.items():
        places[size] = folder / size / {"pt": "ckpt.pt", "safetensors": "x.safetensors"}.get(kind, kind)
        places[size].parent.mkdir()
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MAKE[kind], places[size], str(width)], cwd=ROOT, check=True
        )
    return places


def write_shards(folder: Path) -> None:
    """Write a Llama of 1,111 layers and 30 GB as 64 safetensors with an index; the tensors are holes in the files."""
    wide, narrow = [1024, 1024], [3072, 1024]
    layer = {f"self_attn.{n}_proj": wide for n in "qkvo"} | {f"mlp.{n}_proj": narrow for n in ("gate", "up")}
    layer |= {"mlp.down_proj": narrow[::-1], "input_layernorm": [1024], "post_attention_layernorm": [1024]}
    shapes = {"model.embed_tokens.weight": [32000, 1024], "model.norm.weight": [1024], "lm_head.weight": [32000, 1024]}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(1111) for name, shape in layer.items()}
    folder.mkdir()
    files, names = [f"model-{i:05}-of-00064.safetensors" for i in range(1, 65)], list(shapes)
    for i, file in enumerate(files):
        header, end = {}, 0
        for name in names[i::64]:
            begin, end = end, end + 2 * shapes[name][0] * (shapes[name][1] if len(shapes[name]) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + end)
    index = {"metadata": {}, "weight_map": {name: files[i % 64] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "num_hidden_layers": 1111, "hidden_size": 1024, "num_attention_heads": 16}
    (folder / "config.json").write_text(json.dumps(config))


def commands_for(kind: str, places: dict[str, Path]) -> dict[str, list[str]]:
    """What to run for a kind, by the names of the rows; the readers and --verify see the large example alone."""
    inspect = [sys.executable, "inspect_model.py"]
    found = {f"inspect_model.py, {size}".rstrip(", "): [*inspect, str(place)] for size, place in places.items()}
    place = str(next(iter(places.values())))
    found["inspect_model.py --json"] = [*inspect, place, "--json"]
    found |= {name: [sys.executable, "-c", code, place] for name, code in READERS[kind].items()}
    if kind not in ("shards", "safetensors"):  # which have no checksums
        found[VERIFY] = [*inspect, place, "--verify"]
        found[LOOP] = [sys.executable, "-c", CRC32, place]
    return found


def take_turns(commands: dict[str, list[str]], repeats: int, bytecode: str) -> Runs:
    """Run all commands so often, one after another, so that a slow minute meets all of them; the first is warm-up."""
    runs: Runs = {name: [] for name in commands}
    for _ in range(repeats + 1):
        for name, command in commands.items():
            runs[name].append(measure(command, bytecode))
    return {name: values[1:] for name, values in runs.items()}


def measure(command: list[str], bytecode: str) -> tuple[float, float]:
    """Seconds and peak megabytes of a process, start to end; compiled modules are kept in the folder `bytecode`."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": bytecode}
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(command[:2])} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6


def table(title: str, runs: Runs) -> list[str]:
    """Medians of each row, and how many times the first row's seconds and megabytes they are."""
    medians = {name: [statistics.median(column) for column in zip(*v, strict=True)] for name, v in runs.items()}
    first = next(iter(medians.values()))
    lines = [f"{title:32}{'seconds':>9}{'peak MB':>9}{'time':>9}{'memory':>9}"]
    for name, (seconds, peak) in medians.items():
        lines.append(f"{name:32}{seconds:9.3f}{peak:9.1f}{seconds / first[0]:8.1f}x{peak / first[1]:8.1f}x")
    return lines


def claims(kind: str, runs: Runs) -> list[Row]:
    """What is claimed of a kind."""
    medians = {name: [statistics.median(column) for column in zip(*v, strict=True)] for name, v in runs.items()}
    ours = "inspect_model.py, large" if "inspect_model.py, large" in medians else "inspect_model.py"
    seconds, peak = medians[ours]
    peer = next((f"{name} {medians[name][0]:.3f} s" for name in READERS[kind]), "")
    what = "10,002 tensors in 64 shards" if kind == "shards" else f"{kind} of 1.5 GB"
    shown = f"{peak:.0f} MB"
    rows = [Row(f"inspect_model.py, {what}", seconds, 0.2 if kind == "shards" else 0.07, " s", False, shown, peer)]
    if VERIFY in medians:
        verified, loop = medians[VERIFY][0], medians[LOOP][0]
        shown = f"{verified:.2f} s", f"{loop:.2f} s"
        rows.append(Row(f"--verify, {what}; a loop of zlib.crc32", verified / loop, 1.25, "x", False, *shown))
    return rows


def bytes_of(place: Path) -> int:
    """What the files of a place hold."""
    return sum(path.stat().st_size for path in ([place] if place.is_file() else place.iterdir()) if path.is_file())


def main() -> None:
    """Make one kind after another, run each way in turn, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kinds", nargs="+", choices=READERS, default=list(READERS), help="default: all")
    parser.add_argument("--folder", help="where the files are made (default: the system's temporary folder)")
    args = parser.parse_args()
    print(f"medians of {args.repeats} runs, page cache warm; time and memory as multiples of the first row")
    with tempfile.TemporaryDirectory() as bytecode:
        floor = {f"python -c {code!r}": [sys.executable, "-c", code] for code in ("pass", "import torch")}
        print("", *table("nothing", take_turns(floor, args.repeats, bytecode)), sep="\n", flush=True)
        rows: list[Row] = []
        for kind in args.kinds:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                places = make(kind, Path(folder))
                sizes = " and ".join(f"{bytes_of(place) / 1e9:.2f}" for place in places.values())
                runs = take_turns(commands_for(kind, places), args.repeats, bytecode)
                print("", *table(f"{kind}, {sizes} GB", runs), sep="\n", flush=True)
                rows += claims(kind, runs)
    hand_over(rows)


if __name__ == "__main__":
    main()
