"""What is crashed: saves, changes of format, edits, a walk back, each alone and after the others.

python -m tests.faults.crash_model [--exhaustive] [--minutes N] [SCENARIO ...]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

from core.bundle.commit import CONFIG, MODEL, entries
from core.bundle.training_state import STATE, seal, unseal
from core.bundle.write import write_bundle
from core.containers.json_files import dump_json
from core.errors import CheckpointDamaged
from tests.faults.explorer import Action, Explorer, Fault, Run, folder_files, identity, recover
from tests.faults.memory_disk import ROOT, Disk, MemoryStorage, Overlay, RenamesNoFolder
from tests.faults.tally import Tally


def config(architecture: int = 64, **edits: Any) -> dict[str, Any]:
    """A config.json of some width."""
    return {"n_embd": architecture, "n_head": 1, "batch_size": 4, **edits}


def save(
    step: int,
    label: str,
    optimizer: bool = True,
    prune: Iterable[int] = (),
    extra: tuple[str, ...] = (),
    width: int = 64,
    shards: tuple[str, ...] | None = None,
) -> Action:
    """What CheckpointManager.save does on disk."""

    def act(run: Run) -> None:
        folder = run.folder
        folder.recover()
        names = [*([MODEL] if shards is None else shards), *(["optimizer.pt"] if optimizer else []), *extra]
        files: dict[str, Any] = {name: _content(f"{name} of {label}") for name in names}
        files[CONFIG] = config(width, saved_with=label)
        with folder.staging() as stage:
            for entry in entries(files):
                if entry not in files:
                    folder.storage.make_folder(stage / entry)
            state = {"step": step, "format_version": 2, "commit_id": label, "parent": folder.newest_id()}
            write_bundle(folder, stage, state, files)
            run.stage(stage)
            folder.commit(stage)
        run.acked = True
        folder.roll_forward()
        kept = folder.kept_steps()
        going = [s for s in prune if s in kept]
        run.doomed = frozenset(identity(folder_files(folder.storage, kept[s])) for s in going)
        folder.prune(going)

    return act


def keep(step: int, label: str) -> Action:
    """What the migration of a file that is older than the top does on disk."""

    def act(run: Run) -> None:
        folder = run.folder
        folder.recover()
        stage = folder.stage()
        state = {"step": step, "format_version": 2, "commit_id": label, "parent": None}
        write_bundle(folder, stage, state, {MODEL: _content(f"model of {label}"), CONFIG: config()})
        files = folder_files(folder.storage, stage)
        run.steps[identity(files)] = files
        folder.keep(stage, step)

    return act


def _content(text: str) -> Callable[[Any], None]:
    return lambda output: output.write(text.encode()) and None


def go_back(step: int, *later: int) -> Action:
    """What `train.py --resume_from` does on disk."""

    def act(run: Run) -> None:
        run.folder.recover()
        kept = run.folder.kept_steps()
        run.new = identity(folder_files(run.folder.storage, kept[step]))
        run.folder.go_back(kept[step], "abandoned", [kept[s] for s in later if s in kept])
        run.acked = True

    return act


def measure(run: Run) -> None:
    """What CheckpointManager.add_metrics does on disk."""
    folder = run.folder
    folder.recover()
    files = folder_files(folder.storage, ROOT)
    state = {**unseal(files[STATE], STATE), "val_loss": 1.5}
    run.doomed, run.new = frozenset({identity(files)}), seal(state)
    run.steps[run.new] = {**files, STATE: run.new}
    folder.replace_state(state)
    run.acked = True


def resume(run: Run) -> None:
    """What resume does: recover, and walk back from a damaged newest step to the newest kept one."""
    folder = run.folder
    folder.recover()
    try:
        opened = folder.open_newest()
        files = {name: file.read() for name, file in opened.files.items()}
        recorded = opened.state.get("integrity", {}).get("files", {})
        intact = MODEL in files or any("/" in name for name in files)
        intact = intact and all(
            f"{zlib.crc32(data):08x}" == recorded.get(name, {}).get("crc32", f"{zlib.crc32(data):08x}")
            for name, data in files.items()
            if name != CONFIG
        )
    except CheckpointDamaged:
        intact = False
    if not intact:
        kept = list(folder.kept_steps().values())[-1]
        folder.go_back(kept, "damaged")


def built(explorer: Explorer, *actions: Action) -> Disk:
    """Make the folder that some actions leave when nothing goes wrong."""
    disk = Disk()
    for act in actions:
        disk = explorer.trace(disk, act, frozenset())[0][-1].disk
    return disk.sync_all()


def put(disk: Disk, **files: bytes) -> Disk:
    """Make files at the top as a person does; `_` in a name stands for a dot before its ending."""
    storage = MemoryStorage(disk)
    for name, data in files.items():
        stem, _, ending = name.rpartition("_")
        if storage.exists(path := ROOT / f"{stem}.{ending}"):
            storage.remove(path)
        storage.write(path, data)
    return disk.sync_all()


def empty_folder(explorer: Explorer) -> list[Disk]:
    """Three saves into a new folder, the third with pruning, each from whatever crashes of the last one led to."""
    explorer.user = {"notes.txt": b"mine"}
    disks = [put(Disk(), notes_txt=b"mine")]
    for n in (1, 2, 3):
        disks = explorer.run(disks, save(n, "ABC"[n - 1], prune=[1] if n == 3 else ()), f"save {n}")
    return disks


def changing_files(explorer: Explorer) -> list[Disk]:
    """A save without optimizer and with another file over one with, and back; the architecture changes too."""
    disk = built(explorer, save(1, "A"))
    disks = explorer.run([disk], save(2, "B", optimizer=False, extra=("ema.pt",), width=128), "without optimizer")
    return explorer.run(disks, save(3, "C"), "with optimizer again")


def sharded(explorer: Explorer) -> list[Disk]:
    """A step of two shards over a plain one, then one of another number of shards, then a plain one."""
    disk = built(explorer, save(1, "A"))
    two = ("model_sharded/__0_0.distcp", "model_sharded/__1_0.distcp")
    disks = explorer.run([disk], save(2, "B", optimizer=False, shards=two), "shards over a plain step")
    disks = explorer.run(disks, save(3, "C", optimizer=False, shards=two[:1]), "another number of shards")
    return explorer.run(disks, save(4, "D", prune=[2]), "a plain step over shards")


def walk_back_to_shards(explorer: Explorer) -> list[Disk]:
    """The newest of two sharded steps is damaged; what comes next replaces a folder that is kept already."""
    one = ("model_sharded/__0_0.distcp",)
    disk = built(explorer, save(1, "A", False, shards=one), save(2, "B", False, shards=one))
    inode = disk.find(ROOT / one[0])
    assert inode is not None
    disk.files[inode] = (b"damaged", b"damaged")
    return walked_back(explorer, disk, save(2, "C", False, shards=one))


def rewind_over_shards(explorer: Explorer) -> list[Disk]:
    """Back from a plain step to a sharded one, over a sharded one, and on from there."""
    one = ("model_sharded/__0_0.distcp",)
    shards = [save(n, "AB"[n - 1], False, shards=one) for n in (1, 2)]
    disks = explorer.run([built(explorer, *shards, save(3, "C"))], go_back(1, 2), "back")
    return explorer.run(disks[:2], save(2, "D", False, shards=one), "on from there")


def old_format(explorer: Explorer, **files: bytes) -> list[Disk]:
    """Two saves over a bundle of format version 1, which has no commit id."""
    disk = put(Disk(), **files)
    step = folder_files(explorer.storage(disk), ROOT)
    explorer.steps[identity(step)] = step
    return explorer.run(explorer.run([disk], save(6, "A"), "over version 1"), save(7, "B"), "and again")


OLD_STATE = b'{"step": 5, "optimizer_file": "optimizer.pt"}'
OLD_CONFIG = dump_json(config())


def edited_config(explorer: Explorer) -> list[Disk]:
    """A person edits config.json between two saves."""
    disk = built(explorer, save(1, "A"), save(2, "B"))
    return explorer.run([put(disk, config_json=dump_json(config(batch_size=7)))], save(3, "C"), "after an edit")


def same_step(explorer: Explorer) -> list[Disk]:
    """The same step three times with other content."""
    disk = built(explorer, save(1, "A"))
    disks = explorer.run([disk], save(1, "B"), "the same step again")
    return explorer.run(disks, save(1, "C"), "and again")


def measured(explorer: Explorer) -> list[Disk]:
    """A loss is added to a step after its save, and the next save follows."""
    disks = explorer.run([built(explorer, save(1, "A"), save(2, "B"))], measure, "measure")
    return explorer.run(disks, save(3, "C"), "and the next")


def walk_back(explorer: Explorer) -> list[Disk]:
    """The newest step is damaged and put aside, the older one restored, and training goes on over it."""
    disk = put(built(explorer, save(1, "A"), save(2, "B")), optimizer_pt=b"damaged")
    return explorer.run(walked_back(explorer, disk, save(2, "C")), save(3, "D"), "and the next")


def walked_back(explorer: Explorer, disk: Disk, next_save: Action) -> list[Disk]:
    """Walk back from a damaged top to step 1, and save from there."""
    damaged, intact = disk.text(ROOT / STATE), disk.text(ROOT / "step_00000001" / STATE)
    explorer.steps[damaged] = folder_files(explorer.storage(disk), ROOT)
    explorer.recovery, explorer.unsure = resume, frozenset({damaged})
    explorer.also = explorer.unsure | {intact}
    explorer.depth = 1  # each walk back that did not commit gives what goes aside another name: no end would come
    disks = explorer.run([disk], resume, "walk back")
    explorer.depth = 1000
    explorer.recovery, explorer.unsure, explorer.also = recover, frozenset(), frozenset()
    return explorer.run(disks[:2], next_save, "the step again")


def walk_back_twice(explorer: Explorer) -> list[Disk]:
    """A step that was gone back to shares its files with the kept one; more damage leads back to it again."""
    disk = built(
        explorer, save(1, "A"), save(2, "B"), lambda run: run.folder.go_back(ROOT / "step_00000001", "damaged")
    )
    return explorer.run([disk], lambda run: run.folder.go_back(ROOT / "step_00000001", "damaged"), "back again")


def rewind(explorer: Explorer) -> list[Disk]:
    """Back to an older step over two later ones, on from there, and back again to the same step."""
    disk = put(built(explorer, *(save(n, "ABCD"[n - 1]) for n in (1, 2, 3, 4))), metrics_jsonl=b"{}")
    disks = explorer.run([disk], go_back(2, 3), "back")
    disks = explorer.run(disks[:2], save(3, "E"), "on from there")
    disks = explorer.run(disks[:2], save(4, "F"), "and on")
    return explorer.run(disks[:2], go_back(2, 3), "and back again")


def kept_step(explorer: Explorer) -> list[Disk]:
    """An older step is added to the kept ones, and saves go on."""
    disk = built(explorer, save(5, "A"))
    disks = explorer.run([disk], keep(2, "B"), "keep an older step")
    return explorer.run(disks, save(6, "C"), "and the next")


SCENARIOS: dict[str, Callable[[Explorer], list[Disk]]] = {
    "three saves": empty_folder,
    "changing files": changing_files,
    "version 1": lambda e: old_format(
        e, model_pt=b"m", config_json=OLD_CONFIG, optimizer_pt=b"o", training_state_json=OLD_STATE
    ),
    "version 1, no training state": lambda e: old_format(e, model_pt=b"m", config_json=OLD_CONFIG),
    "version 1, only a model": lambda e: old_format(e, model_pt=b"m"),
    "edited config": edited_config,
    "same step": same_step,
    "kept step": kept_step,
    "measured": measured,
    "walk back": walk_back,
    "walk back twice": walk_back_twice,
    "rewind": rewind,
    "shards": sharded,
    "walk back to shards": walk_back_to_shards,
    "rewind over shards": rewind_over_shards,
}


MODES: dict[str, tuple[bool, type[MemoryStorage]]] = {
    "links": (True, MemoryStorage),
    "moves": (False, MemoryStorage),
    "overlay": (True, Overlay),
    "bucket": (False, RenamesNoFolder),
}
"""Kinds of file systems: whether they have hard links, and which renames they refuse."""

EXHAUSTIVE = (2**30, 1)
QUICK = (8, 32)
"""`limit` and `share` of a run that takes seconds."""


def run(folder: Path) -> Tally:
    """Explore every scenario in seconds, until one has a fault; all of it is in memory."""
    tally = Tally()
    for name, scenario in SCENARIOS.items():
        for mode, (links, storage_type) in MODES.items():
            explorer = Explorer(links, *QUICK, storage_type=storage_type)
            try:
                scenario(explorer)
            except (Fault, OSError) as fault:
                tally.losses.append(f"{name}, {mode}: {fault!r}")
            tally.counts += explorer.counts
    return tally


def explore(task: tuple[str, str, tuple[int, int]]) -> tuple[tuple[str, str], Counter[str], float]:
    """Explore one scenario on one kind of file system: which one, what was looked at, the seconds.

    Raises: Fault when the protocol broke a promise.
    """
    name, mode, limits = task
    links, storage_type = MODES[mode]
    explorer, started = Explorer(links, *limits, storage_type=storage_type), time.perf_counter()
    SCENARIOS[name](explorer)
    return (name, mode), explorer.counts, time.perf_counter() - started


def main(argv: list[str]) -> int:
    """Explore scenarios on each kind of file system, side by side, and print what was looked at."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.crash_model")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--exhaustive", action="store_true", help="every crash point instead of a sample")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after this time and list what was not reached")
    args = parser.parse_args(argv)
    if unknown := set(args.scenarios) - set(SCENARIOS):
        parser.error(f"{', '.join(sorted(unknown))}: no such scenario. There are {', '.join(SCENARIOS)}.")
    tasks = [(name, mode) for name in SCENARIOS if name in (args.scenarios or SCENARIOS) for mode in MODES]
    # Another scenario is the first on each day, so that runs which are too short for all of them reach each in turn.
    first = 7 * date.today().toordinal() % len(tasks)
    tasks = tasks[first:] + tasks[:first]
    limits, stop = EXHAUSTIVE if args.exhaustive else QUICK, time.monotonic() + 60 * args.minutes
    print(f"{'scenario':30} {'':7} {'crash points':>12} {'disk states':>12} {'outcomes':>12} {'readers':>9} {'s':>6}")
    left = dict.fromkeys(tasks)
    spawn, out_of_time = multiprocessing.get_context("spawn"), contextlib.suppress(multiprocessing.TimeoutError)
    with out_of_time, spawn.Pool(os.cpu_count()) as pool:
        found = pool.imap_unordered(explore, [(*task, limits) for task in tasks])
        while left:
            task, c, seconds = found.next(timeout=max(0.0, stop - time.monotonic()))
            del left[task]
            print(
                f"{task[0]:30} {task[1]:7} {c['crash points']:12,} {c['disk states']:12,} "
                f"{c['outcomes']:12,} {c['readers']:9,} {seconds:6.1f}",
                flush=True,
            )
    if left:
        print(f"not reached in {args.minutes:g} minutes: {', '.join(f'{name} ({mode})' for name, mode in left)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
