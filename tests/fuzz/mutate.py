"""Open changed checkpoints of every container: `python -m tests.fuzz.mutate --count N --seed S`.

Only a CheckpointError may come out, in one printable line; within a second of processor time and 200 MB; and what
opens has its tensors within its files. The process that opens them imports no torch. A mutation is a function of the
seed and its number: `--first N --count 1 --keep FOLDER` writes the one that was reported.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from core.containers.container import Container
from core.errors import CheckpointError
from tests.fuzz.mutations import mutate

ROOT = Path(__file__).resolve().parent.parent.parent

SECONDS = 1.0
MEGABYTES = 200
HANG = 20
"""Seconds after which an input is given up."""

ODD_NAMES = (
    "x.pt",
    "model_rank00003.pt",
    "step_00000001",
    "\x1b[2J.pt",
    ".metadata",
    "model.safetensors",
    "iter_0000009",
)


class Hang(BaseException):
    """An input takes far too long."""


@dataclass
class Found:
    """What came out of one run."""

    opened: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[str]] = field(default_factory=dict)  # where in the code, the numbers of the mutations
    slowest: tuple[float, str] = (0.0, "")
    peak: float = 0.0

    def add(self, what: str, number: str) -> None:
        self.findings.setdefault(what, []).append(number)


@dataclass(frozen=True)
class Example:
    """A sound checkpoint in memory."""

    name: str
    files: dict[str, bytes]

    @property
    def single(self) -> str:
        """Its file where it is but one, which is opened in place of the folder."""
        return next(iter(self.files)) if len(self.files) == 1 and "/" not in next(iter(self.files)) else ""


def read_examples(folder: Path) -> list[Example]:
    """Read what `tests.fuzz.seeds` wrote."""
    found = []
    for place in sorted(folder.iterdir()):
        files = {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}
        files.pop(".lock", None)
        found.append(Example(place.name, files))
    return found


def write(example: Example, folder: Path) -> None:
    for name, data in example.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def change(example: Example, folder: Path, rng: random.Random, pool: list[bytes]) -> list[str]:
    """Change one or two files of a written example, seldom their names; returns the files that only differ in bytes.

    None are returned when anything else was changed.
    """
    changed: list[str] = []
    renamed = False
    for _ in range(rng.choice([1, 1, 1, 2])):
        name = rng.choice(list(example.files))
        path, how = folder / name, rng.random()
        if not path.is_file() or path.is_symlink():
            continue
        path.unlink()  # never write through a link
        if len(example.files) == 1 or how < 0.92:
            path.write_bytes(mutate(example.files[name], rng, pool))
            changed.append(name)
            continue
        renamed = True
        other = path.with_name(rng.choice([*ODD_NAMES, Path(rng.choice(list(example.files))).name]))
        if how < 0.94:
            path.mkdir()
        elif how < 0.96:
            path.symlink_to(rng.choice(["../outside.pt", "..", name, "/", "gone"]))
        elif how < 0.98 and not os.path.lexists(other):
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(example.files[name])
    return [] if renamed else changed


def restore(example: Example, folder: Path, changed: list[str]) -> None:
    """Make a changed example sound again."""
    for name in changed:
        (folder / name).write_bytes(example.files[name])
    if not changed:
        clear(folder)
        write(example, folder)


def clear(folder: Path) -> None:
    """Remove all that is in a folder."""
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def outside(container: Container) -> str:
    """Name a tensor that does not lie within its file; "" when all do."""
    only = next(iter(container.files)) if len(container.files) == 1 else ""
    sizes = container.files | {name: one.size for name, one in container.unpacked.items()}
    for name, spec in container.tensors.items():
        places = [(c.file, c.offset, c.nbytes) for c in spec.chunks] or [(spec.file or only, spec.offset, spec.extent)]
        for file, offset, size in places:
            if offset < 0 or size < 0 or offset + size > sizes[file]:
                return f"{name!r}: {offset} + {size} of {file}, which has {sizes[file]}"
    return ""


def open_as_container(path: Path) -> None:
    from core.containers.open import open_container

    container = open_container(path)
    fault = outside(container)
    assert not fault, f"opened, and a tensor is outside of its file: {fault}"


def open_as_bundle(path: Path) -> None:
    from core.bundle.bundle import open_bundle

    try:
        with open_bundle(path) as opened:
            assert opened.weights.tensors is not None
            assert opened.optimizer is None or opened.optimizer.tensors is not None
    except OSError as error:  # which every script reports in one line: core.console.commandline.run
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error


def inspect(path: Path, *words: str) -> None:
    """What the command line does with it, without its output."""
    from inspect_model import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main([str(path), *words]) in (0, 1)


def opener(name: str, rng: random.Random, share: float) -> Callable[[Path], None]:
    if rng.random() < share:
        words = rng.choice([[], ["--json"], ["--tensors"]])
        return lambda path: inspect(path, *words)
    return open_as_bundle if name == "bundle" else open_as_container


def attempt(open_it: Callable[[Path], None], path: Path) -> str | None:
    """Open a path: None when it opens, "" when it is refused in a proper way, else what went wrong and where."""
    try:
        open_it(path)
    except CheckpointError as error:
        text = str(error).replace(str(path), "")
        return "" if text.isprintable() else f"a message that is not printable: {type(error).__name__} {_place(error)}"
    except Hang:
        return f"hangs for over {HANG} s"
    except BaseException as error:
        said = str(error).partition("\n")[0][:80]
        return f"{type(error).__name__}: {said if not isinstance(error, OSError) else ''} {_place(error)}"
    return None


def _place(error: BaseException) -> str:
    """The last place in our code of a traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
    ours = [frame for frame in frames if str(ROOT) in frame.filename and "/lib/" not in frame.filename]
    return f"at {Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else ""


def peak_megabytes() -> float:
    """The most memory that this process has had; of the program itself, not of what started it, where Linux says so."""
    with contextlib.suppress(OSError), Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)


def fuzz(
    examples: list[Example], first: int, count: int, seed: int, inspected: float, keep: Path | None, seconds: float
) -> Found:
    """Open `count` mutations, the containers in turn, until `seconds` are over."""
    found = Found()
    pool = [data for example in examples for data in example.files.values() if len(data) < 20_000]
    signal.signal(signal.SIGALRM, _hang)
    stop = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as place:
        for example in examples:
            (Path(place) / example.name).mkdir()
            write(example, Path(place) / example.name)
        os.chdir(place)
        Path("outside.pt").write_bytes(pool[0])
        for number in range(first, first + count):
            if time.monotonic() > stop:
                break
            example = examples[number % len(examples)]
            rng = random.Random(f"{seed}/{number}")
            folder = Path(place) / example.name
            changed = change(example, folder, rng, pool)
            open_it = opener(example.name, rng, inspected)
            path = folder / example.single if example.single and rng.random() < 0.8 else folder
            shown = f"{example.name} {number}"
            before = peak_megabytes() if number % 64 == 0 else found.peak
            signal.setitimer(signal.ITIMER_REAL, HANG)
            start = time.process_time()
            fault = attempt(open_it, path)
            took = time.process_time() - start
            signal.setitimer(signal.ITIMER_REAL, 0)
            (found.opened if fault is None else found.refused)[example.name] += 1
            if Path("executed").exists():
                fault = "was executed"
            if took > SECONDS:
                fault = f"takes over {SECONDS:g} s"
            peak = peak_megabytes() if number % 64 == 0 or took > 0.05 else before
            if peak > MEGABYTES >= found.peak:
                fault = f"takes over {MEGABYTES} MB"
            found.peak = max(found.peak, peak)
            found.slowest = max(found.slowest, (took, shown))
            if fault:
                found.add(fault, shown)
                if keep and len(found.findings[fault]) <= 3:
                    shutil.copytree(folder, keep / f"{seed}_{number}_{example.name}", symlinks=True, dirs_exist_ok=True)
            restore(example, folder, changed)
    found.peak = max(found.peak, peak_megabytes())
    return found


def _hang(*_: object) -> None:
    raise Hang


def report(found: Found) -> Iterator[str]:
    """The count of each container, what was found, the slowest input and the memory."""
    for name in sorted({*found.opened, *found.refused}):
        opened, refused = found.opened[name], found.refused[name]
        yield f"{name:<36} {opened + refused:>7} mutations  {opened:>7} opened  {refused:>7} refused"
    yield f"{'all':<36} {found.opened.total() + found.refused.total():>7} mutations"
    yield f"slowest input: {found.slowest[0]:.3f} s ({found.slowest[1]}); most memory: {found.peak:.0f} MB"
    yield f"findings: {len(found.findings)}"
    for what, numbers in sorted(found.findings.items(), key=lambda item: -len(item[1])):
        yield f"  {len(numbers):>5} x {what}  [{', '.join(numbers[:3])}]"


def make_seeds(folder: Path, shared: Path | None) -> None:
    """Write the sound examples, in a process that may import torch."""
    words = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.seeds", str(folder), *([str(shared)] if shared else [])]
    subprocess.run(words, cwd=ROOT, check=True)


def main(argv: list[str]) -> int:
    """Run mutations; returns 1 when there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.mutate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000, metavar="N", help="mutations of all containers together")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first mutation")
    parser.add_argument("--seconds", type=float, default=1e9, metavar="S", help="stop after this time")
    parser.add_argument("--inspect", type=float, default=0.1, metavar="SHARE", help="share that inspect_model.py opens")
    parser.add_argument("--only", metavar="NAME", help="one container; numbers then count its mutations alone")
    parser.add_argument(
        "--seeds", type=Path, metavar="FOLDER", help="examples of tests.fuzz.seeds, which are made if missing"
    )
    parser.add_argument(
        "--shared", type=Path, metavar="FOLDER", help="the folder with upstream fixtures, to start from too"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write three inputs of each finding there")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.seeds or Path(scratch) / "seeds"
        if not folder.is_dir():
            make_seeds(folder.absolute(), args.shared.absolute() if args.shared else None)
        examples = read_examples(folder)
    examples = [example for example in examples if args.only in (None, example.name)]
    keep = args.keep.absolute() if args.keep else None
    found = fuzz(examples, args.first, args.count, args.seed, args.inspect, keep, args.seconds)
    print("\n".join(report(found)))
    assert "torch" not in sys.modules, "torch was imported: the memory is not that of the readers"
    return 1 if found.findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
