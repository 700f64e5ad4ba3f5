"""What a save costs: training stopped, training slowed, seconds until it is durable, memory; beside other ways.

    python benchmarks/save.py [--repeats 5] [--parts durable loop memory toy] [--steps 6] [--folder DIR] [--json]
    pip install safetensors accelerate torchsnapshot psutil          # peers; one that is missing is said and left out

124M parameters with AdamW, 1.49 GB; the ways take turns, and medians are compared. Parts:

durable  `save` called while nothing else runs: seconds in it (blocked), seconds until `wait` returns (wall), seconds of
         processors. The floor is as many bytes past the page cache into reserved room, and an fsync.
loop     `--steps` steps of training and a save after the first of them, against the same steps without; the time
         until all is written counts. So does what the save takes away from the steps.
memory   each way twice in a process of its own: the peak beyond the live weights and moments.
toy      the small preset of train.py, saved after every step: what limits it are fsyncs, which are counted.

On a machine that others use as well, trust the seconds of processors. `--size small` tries the program.
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
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.console.commandline import spin_briefly

spin_briefly()  # as train.py does, and like it before torch is loaded

from benchmarks.rows import FAST, Row, against, hand_over
from benchmarks.savers import WAYS, Ours, Saver
from benchmarks.trained import SIZES, TOY, Trained, machine, machine_line
from core.bundle.storage import DISK

PARTS = ("durable", "loop", "memory", "toy")
LOOPED = ("ours", "torch.save", "clone + thread", "dcp.async_save", "torchsnapshot")
REMEMBERED = ("ours", "ours, ring", "torch.save", "clone + thread", "dcp.async_save")
TOKENS = 128
"""In a batch of the loop: a step takes a second or so."""

Figures = dict[str, dict[str, float]]
"""Medians by way."""


def open_ways(names: tuple[str, ...], folder: Path, trained: Trained) -> dict[str, Saver]:
    """Make the ways that are installed, and say which are not."""
    found = {}
    for i, name in enumerate(names):
        try:
            found[name] = WAYS[name](folder / f"way{i}", trained)
        except ImportError as error:
            say(f"{name}: not installed ({error})")
    return found


def take_turns(runs: dict[str, Callable[[int], dict[str, float]]], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Run all so often, one after another; the first round is warm-up."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            os.sync()  # a way that is not durable leaves its bytes to be written in the time of the next one
            figures = run(turn)
            if turn:
                found[name].append(figures)
    return found


def medians(found: dict[str, list[dict[str, float]]]) -> Figures:
    """The median of each figure."""
    return {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}


def measure_durable(folder: Path, sizes: dict[str, int], args: argparse.Namespace) -> Figures:
    """Blocked, wall and processor seconds of a save while nothing else runs."""
    trained = Trained(sizes, TOKENS)
    say(f"{trained.nbytes / 1e9:.2f} GB of weights and moments")
    ways = open_ways(tuple(WAYS), folder, trained)

    def run(way: Saver, turn: int) -> dict[str, float]:
        processors, begin = time.process_time(), time.perf_counter()
        way.save(turn)
        blocked = time.perf_counter() - begin
        way.wait()
        wall, processors = time.perf_counter() - begin, time.process_time() - processors
        way.clear()
        return {"blocked": blocked, "wall": wall, "cpu": processors}

    found = take_turns({name: lambda turn, way=way: run(way, turn) for name, way in ways.items()}, args.repeats)
    for way in ways.values():
        way.close()
    return medians(found)


def measure_loop(folder: Path, sizes: dict[str, int], args: argparse.Namespace) -> Figures:
    """Extra seconds of a loop of training for each save in it."""
    trained = Trained(sizes, TOKENS)
    ways = open_ways(LOOPED, folder, trained)

    def run(way: Saver | None, turn: int) -> dict[str, float]:
        processors, begin = time.process_time(), time.perf_counter()
        for i in range(args.steps):
            trained.update()
            if way and i == 0:
                way.save(turn)
        if way:
            way.wait()
        wall, processors = time.perf_counter() - begin, time.process_time() - processors
        if way:
            way.clear()
        return {"wall": wall, "cpu": processors}

    def turns() -> dict[str, Callable[[int], dict[str, float]]]:
        runs: dict[str, Callable[[int], dict[str, float]]] = {}
        for name, way in ways.items():  # each beside a loop without a save, so that a slow minute hits both
            runs[f"{name}, without"] = lambda turn: run(None, turn)
            runs[name] = lambda turn, way=way: run(way, turn)
        return runs

    found = take_turns(turns(), args.repeats)
    for way in ways.values():
        way.close()
    extra = {
        name: [
            {f"extra {key}": run[key] - base[key] for key in run}
            for run, base in zip(found[name], found[f"{name}, without"], strict=True)
        ]
        for name in ways
    }
    alone = [run for name in ways for run in found[f"{name}, without"]]
    return {**medians(extra), "without": medians({"without": alone})["without"]}


def measure_memory(folder: Path, sizes: dict[str, int], args: argparse.Namespace) -> Figures:
    """Peak memory of two saves beyond that of the live state, each way in a process of its own."""
    found: Figures = {}
    for name in REMEMBERED:
        command = [sys.executable, __file__, "--size", args.size, "--folder", str(folder), "--remember", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: memory of {name}: {done.stderr}")
        found[name] = json.loads(done.stdout)
    return found


def remember(folder: Path, name: str, sizes: dict[str, int]) -> dict[str, float]:
    """Save twice, and return the megabytes at the peak beyond those before."""
    trained = Trained(sizes, TOKENS)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        way = WAYS[name](Path(place) / "way", trained)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        for turn in range(2):
            way.save(turn)
            way.wait()
            way.clear()
        way.close()
        return {"state MB": trained.nbytes / 1e6, "extra MB": (resident("VmHWM") - before) / 1e6}


def resident(field: str) -> int:
    """Bytes of memory that this process has, or had at most."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) * 1024


def measure_toy(folder: Path, sizes: dict[str, int], args: argparse.Namespace) -> Figures:
    """A step of the toy without a save, and with one after each; of a save, what its fsyncs took."""
    trained = Trained(TOY, 64, rows=12)
    way = Ours(folder / "toy", trained)
    synced: list[float] = []

    def counted(call: Callable[..., Any], *call_args: Any) -> Any:
        begin = time.perf_counter()
        result = call(*call_args)
        if call is os.fsync:
            synced.append(time.perf_counter() - begin)
        return result

    DISK.change = counted  # type: ignore[method-assign]
    saves = 20 * args.steps

    def run(turn: int, saving: bool) -> dict[str, float]:
        synced.clear()
        begin = time.perf_counter()
        for i in range(saves):
            trained.update()
            if saving:
                way.save(turn * saves + i)
        way.wait()
        figures = {"ms per step": (time.perf_counter() - begin) / saves * 1e3}
        if saving:
            figures |= {"fsyncs per step": len(synced) / saves, "ms in fsync per step": sum(synced) / saves * 1e3}
        return figures

    runs = {"without": lambda turn: run(turn, False), "every step": lambda turn: run(turn, True)}
    found = medians(take_turns(runs, args.repeats))
    way.close()
    return found


MEASURES = {"durable": measure_durable, "loop": measure_loop, "memory": measure_memory, "toy": measure_toy}


def claims(found: dict[str, Figures]) -> list[Row]:
    """What was claimed, and what was measured."""
    rows = []
    if durable := found.get("durable"):
        ours, floor, saved = (durable[way]["wall"] for way in ("ours", "floor", "torch.save + fsync"))
        blocked, clone = (durable[way]["blocked"] * 1e3 for way in ("ours", "clone + thread"))
        shown = f"{ours:.2f} s"
        rows += [
            Row("training stopped inside save(), ms; a clone + thread", blocked, 2, " ms", peer=f"{clone:.0f} ms"),
            against("durable save, the disk's floor", ours, floor, 1.15 if FAST else 1.25),
            Row("durable save, torch.save + fsync", saved / ours, 1.8, "x", True, shown, f"{saved:.2f} s"),
        ]
    if loop := found.get("loop"):
        extra, peer = (loop[way]["extra wall"] for way in ("ours", "torch.save"))
        rows.append(against("extra time of a loop per save, torch.save", extra, peer, 0.12))
        rows.append(Row("extra time of a loop per save", extra, 0.3, " s"))
    if memory := found.get("memory"):
        staged = memory["ours"]
        rows.append(Row("extra memory, staged", staged["extra MB"] / staged["state MB"], 1.05, " states"))
        rows.append(Row("extra memory, ring", memory["ours, ring"]["extra MB"], 64, " MB"))
    if toy := found.get("toy"):
        each, without = toy["every step"], toy["without"]["ms per step"]
        syncs = f"{each['fsyncs per step']:.0f} fsyncs take {each['ms in fsync per step']:.3g} ms"
        rows.append(
            Row("step of a toy, saved every step", each["ms per step"], 45, " ms", False, syncs, f"{without:.3g} ms")
        )
    return rows


def say(line: str) -> None:
    """Print to stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure the parts, and print the figures and the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=6, help="steps of the loop")
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--remember", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = SIZES[args.size]
    if args.remember:
        print(json.dumps(remember(args.folder, args.remember, sizes)))
        return
    say(machine_line())
    warnings.simplefilter("ignore")  # of peers: that there is one process, that names are old
    before, found = machine(), {}
    for part in args.parts:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            found[part] = MEASURES[part](Path(folder), sizes, args)
    if args.json:
        print(
            json.dumps(
                {
                    "machine": before,
                    "repeats": args.repeats,
                    "figures": found,
                    "claims": [asdict(row) for row in claims(found)],
                }
            )
        )
        return
    for part, ways in found.items():
        print(f"\n{part}, medians of {args.repeats}")
        for name, figures in ways.items():
            print(f"  {name:22}" + "  ".join(f"{key} {value:10.4f}" for key, value in figures.items()))
    print(f"\nload at the end {machine()['load'][0]}")
    hand_over(claims(found))


if __name__ == "__main__":
    main()
