"""How time and memory grow with bytes and with tensors: inspect, verify, convert, save, resume; a table and a plot.

    python benchmarks/growth.py [--megabytes 10 100 1000 3000 10000] [--tensors 100 1000 10000] [--plot SVG]

Bytes grow in a nanoGPT checkpoint of 100 tensors, tensors in one of 100 MB. `convert` writes safetensors and proves
them, so bytes only move; `save` is until the step of a model with AdamW is durable, `resume` until its model and
optimizer are there; neither is measured beyond 3,000 MB, which are in memory several times. Each run is a process of
its own that does the same with a model of a few kilobytes first: imports are not counted, and peak memory is what
comes on top of them. The page cache is warm as far as it reaches. The constant of a way is where the line through its
times at 10 and at 1,000 MB meets zero. Needs 2.2 times the largest size on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import Row, hand_over

LIVE = ("save", "resume")
"""The ways that need a model in memory."""

WAYS = ("inspect", "verify", "convert", *LIVE)
LAYERS, MEGABYTES, MOST_LIVE = 8, 100, 3000
TINY = 1, 0.05
"""Layers and megabytes of the model that warms up."""

PER_LAYER = 12
"""Tensors of a layer."""

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc3311", "#aa4499")
STYLE = """
svg { font: 15px sans-serif; fill: #888 } .mid { text-anchor: middle } .end { text-anchor: end }
path { fill: none; stroke-width: 2 } .grid { stroke: #8884 } .axis { stroke: #888 }
"""

Figures = dict[str, float]
"""Of a run, and medians of runs: seconds, seconds of processors (cpu), and peak megabytes (peak)."""
Place = tuple[int, float]
"""Layers and megabytes."""


def sizes_of(place: Place, copies: int) -> dict[str, int]:
    """The sizes of a GPT with so many layers and, in `copies` tensors of each of its own, so many megabytes."""
    layers, megabytes = place
    width = max(4, round(math.sqrt(megabytes * 1e6 / 4 / copies / (12 * layers))))
    return {"n_layer": layers, "n_head": 1, "n_embd": width, "block_size": 64, "vocab_size": 128}


def write_file(path: Path, place: Place) -> None:
    """Write a nanoGPT checkpoint, a few megabytes at a time."""
    import numpy as np

    from core.bundle.storage import DISK
    from core.containers.torch_files.layout import TensorRecord, pickled, write_torch_file

    sizes = sizes_of(place, 1)
    d, n = sizes["n_embd"], "transformer."
    shapes = {f"{n}wte.weight": (sizes["vocab_size"], d), f"{n}wpe.weight": (sizes["block_size"], d)}
    layer = {"attn.c_attn": (3 * d, d), "attn.c_proj": (d, d), "mlp.c_fc": (4 * d, d), "mlp.c_proj": (d, 4 * d)}
    for i in range(sizes["n_layer"]):
        for name, shape in layer.items():
            shapes |= {f"{n}h.{i}.{name}.weight": shape, f"{n}h.{i}.{name}.bias": shape[:1]}
        shapes |= {f"{n}h.{i}.ln_{k}.{part}": (d,) for k in (1, 2) for part in ("weight", "bias")}
    shapes |= {f"{n}ln_f.weight": (d,), f"{n}ln_f.bias": (d,), "lm_head.weight": (sizes["vocab_size"], d)}
    records = {
        name: TensorRecord(key, "float32", shape, 4 * math.prod(shape))
        for key, (name, shape) in enumerate(shapes.items())
    }
    block = memoryview(np.random.default_rng(1).standard_normal(1 << 21, np.float32)).cast("B")

    def pieces(nbytes: int):
        for start in range(0, nbytes, len(block)):
            yield block[: min(len(block), nbytes - start)]

    content = {"model": records, "model_args": {**sizes, "bias": True, "dropout": 0.0}, "iter_num": 5, "config": {}}
    with DISK.create(path) as output:
        write_torch_file(output, pickled(content), ((r.nbytes, pieces(r.nbytes)) for r in records.values()))


def ready(way: str, folder: Path, place: Place) -> Callable[[], object]:
    """Prepare a way for a place, and return what is measured."""
    if way in LIVE:
        return ready_live(way, folder, place)
    import convert_checkpoints
    import inspect_model

    path = file_in(folder, place)
    if way == "convert":
        return lambda: convert_checkpoints.main([str(path), f"{path}.safetensors", "--to", "safetensors"])
    return lambda: inspect_model.main([str(path), *(["--verify"] if way == "verify" else [])])


def ready_live(way: str, folder: Path, place: Place) -> Callable[[], object]:
    """The same for a model in memory; a save stays for the resume after it."""
    from benchmarks.trained import Trained, config_of
    from core.checkpoint import CheckpointManager
    from core.data.tokenizer import make_char

    sizes = sizes_of(place, 3)
    name = f"live_{place[0]}_{place[1]:g}"
    manager = CheckpointManager(name, folder, keep=0, say=lambda line: None)
    if way == "save":
        trained = Trained(sizes, 64)

        def save() -> None:
            with manager:
                manager.save(trained.model, trained.optimizer, step=1)

        return save

    def resume() -> None:
        with manager:
            bundle = manager.newest_intact(to_train=True)
            tokenizer = make_char(["".join(map(chr, range(0x100, 0x100 + sizes["vocab_size"])))])
            manager.initialize_for_training(config_of(sizes), tokenizer, None, 1e-4, bundle=bundle)

    return resume


def file_in(folder: Path, place: Place) -> Path:
    """Where the file of a place is."""
    return folder / f"file_{place[0]}_{place[1]:g}.pt"


def measure(way: str, folder: Path, place: Place) -> Figures:
    """Warm up with a tiny model, and measure a way; in a process of its own."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ready(way, folder, TINY)()
        run = ready(way, folder, place)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        cpu, begin = time.process_time(), time.perf_counter()
        run()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "peak": (resident("VmHWM") - before) / 1e6}


def resident(field: str) -> int:
    """Bytes of memory that this process has, or had at most."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) * 1024


def median_of(way: str, folder: Path, place: Place, repeats: int) -> Figures:
    """Medians of a way at a place."""
    runs: list[Figures] = []
    command = [sys.executable, __file__, "--folder", str(folder), "--run", way, *map(str, place)]
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {way} at {place}: {done.stderr}")
        runs.append(json.loads(done.stdout))
        clear(folder, "*.safetensors")
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def clear(folder: Path, pattern: str) -> None:
    """Remove what was made."""
    for path in folder.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def measure_all(folder: Path, places: list[Place], repeats: int) -> dict[str, dict[Place, Figures]]:
    """Medians of all ways, a place at a time, so that the disk has room."""
    found: dict[str, dict[Place, Figures]] = {way: {} for way in WAYS}
    write_file(file_in(folder, TINY), TINY)
    for place in places:
        write_file(file_in(folder, place), place)
        os.sync()
        for way in WAYS:
            if way not in LIVE or place[1] <= MOST_LIVE:
                is_long = place[1] > MOST_LIVE and way != "inspect"
                found[way][place] = median_of(way, folder, place, 1 if is_long else repeats)
                print(way, place, found[way][place], file=sys.stderr, flush=True)
        file_in(folder, place).unlink()
        clear(folder, "live_*")
    return found


def claims(found: dict[str, dict[Place, Figures]]) -> list[Row]:
    """That inspection does not grow with bytes, and everything else along a line that begins near zero."""
    rows = []
    for way, runs in found.items():
        times = {mb: figures["seconds"] for (layers, mb), figures in runs.items() if layers == LAYERS}
        if not {10, 1000} <= times.keys():
            continue
        low, high = times[10], times[max(times)]
        if way == "inspect":
            rows.append(Row(f"inspect, {max(times):,g} MB against 10 MB", high / low, 1.2, ours=f"{high:.4f} s"))
            continue
        slope = (times[1000] - low) / 990
        rows.append(Row(f"{way}, constant", low - 10 * slope, 0.2, " s", ours=f"{low:.3f} s at 10 MB"))
        if max(times) > 1000:
            line = low + slope * (max(times) - 10)
            shown = f"{high:.2f} s", f"{line:.2f} s on the line"
            rows.append(
                Row(f"{way}, {max(times):,g} MB of the line through 10 and 1,000", high / line, 1.2, "x", False, *shown)
            )
    return rows


def table(found: dict[str, dict[Place, Figures]], is_bytes: bool) -> list[str]:
    """Seconds (of processors) and peak megabytes of each way, as Markdown."""
    places = sorted(
        {
            place
            for runs in found.values()
            for place in runs
            if is_bytes == (place[0] == LAYERS) or place == (LAYERS, MEGABYTES)
        }
    )
    heading = [f"{mb:,g} MB" if is_bytes else f"{tensors_of(layers):,} tensors" for layers, mb in places]
    lines = [f"| seconds (of processors), peak | {' | '.join(heading)} |", "|---" + "|--:" * len(heading) + "|"]
    for way, runs in found.items():
        cells = [cell(runs[place]) if place in runs else "" for place in places]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def cell(figures: Figures) -> str:
    """The figures of a run for people."""
    return "{seconds:.3f} ({cpu:.3f}), {peak:.0f} MB".format(**figures)


def tensors_of(layers: int) -> int:
    """Tensors of a model, rounded as they are asked for."""
    return round(layers * PER_LAYER, -2)


def plot(found: dict[str, dict[Place, Figures]]) -> str:
    """Time and peak memory, by bytes and by tensors, on logarithmic axes: an SVG for light and dark pages."""
    from core.inspection.html.chart import WIDTH, Chart, Line

    height, parts = 300, []
    for row, (is_bytes, x_title) in enumerate(((True, "MB, in 100 tensors"), (False, "tensors, of 100 MB in all"))):
        for column, (key, y_title) in enumerate((("seconds", "seconds"), ("peak", "peak MB"))):
            lines = []
            for number, way in enumerate(WAYS):
                runs = {p: f for p, f in found[way].items() if (p[0] == LAYERS if is_bytes else p[1] == MEGABYTES)}
                x = [p[1] if is_bytes else tensors_of(p[0]) for p in sorted(runs)]
                lines.append(Line(way, x, [max(runs[p][key], 1e-3) for p in sorted(runs)], f"c{number}", True))
            drawn = Chart(lines, f"{y_title} by {x_title}", x_title, y_title, height, log=True, log_x=True).svg()
            parts.append(
                drawn.replace(
                    "<svg", f'<svg x="{column * WIDTH}" y="{40 + row * height}" width="{WIDTH}" height="{height}"', 1
                )
            )
    names = "".join(f'<text x="{80 + 120 * i}" y="26" class="c{i}">{way}</text>' for i, way in enumerate(WAYS))
    style = STYLE + "".join(f"path.c{i}{{stroke:{c}}}circle.c{i},text.c{i}{{fill:{c}}}" for i, c in enumerate(COLOURS))
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {40 + 2 * height}"'
    return f"<svg {box}><style>{style}</style>{names}{''.join(parts)}</svg>\n"


def main() -> None:
    """Measure, print the tables and the claims, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="beyond 3,000 MB each runs once")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000, 3000, 10000])
    parser.add_argument("--tensors", type=int, nargs="*", default=[100, 1000, 10000])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the drawing, an SVG")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        way, layers, megabytes = args.run
        print(json.dumps(measure(way, args.folder, (int(layers), float(megabytes)))))
        return
    places: list[Place] = [(LAYERS, float(size)) for size in args.megabytes]
    places += [(count // PER_LAYER, float(MEGABYTES)) for count in args.tensors]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure_all(Path(folder), list(dict.fromkeys(places)), args.repeats)
    print("", *table(found, True), "", *table(found, False), sep="\n")
    if args.plot:
        args.plot.write_text(plot(found))
    hand_over(claims(found))


if __name__ == "__main__":
    main()
