"""Run tests on the oldest and newest versions that pyproject.toml allows, and write the table of docs/versions.md.

    python -m tests.matrix [--python python3.12 ...] [--torch 2.11 ...] [--minutes 10] [--whole]

Each cell is an environment of its own, removed afterwards: one with the lowest version of each package, one with each
later minor version of torch on the first Python, and the oldest and newest torch on the others. A Python that is not
installed is left out, and so is what pip cannot install, with the reason. Rows of cells that do not run stay as they
are.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/versions.md"
PYTHONS = ("python3.11", "python3.12", "python3.13")
TORCH = ("2.11", "2.12", "2.13", "2.14", "2.15")
SHOWN = ("torch", "numpy", "tiktoken", "tqdm")
TOOLS = ("pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "safetensors")

TESTS = {
    "architecture": "without_torch",
    "bundle": "commit verify_on_load",
    "checkpoint": "also checkpoint every_module live loadable optimizer tensors torch_file",
    "containers": "torch_zip",
    "conversion": "nanogpt",
    "data": "tokenizer",
    "logs": "hand_over",
    "networks": "generation muon",
    "training": "loop resume",
}
"""What a version of Python, torch or numpy can break: files, arithmetic, optimizers, loops, readers."""


class Cell(NamedTuple):
    """A Python, and what pip installs beside it."""

    python: str
    torch: str
    lowest: bool = False

    @property
    def name(self) -> str:
        """The first two columns of its row."""
        return f"{self.python.removeprefix('python')} | {self.torch}{', all lowest' if self.lowest else ''}"


def bounds() -> dict[str, str]:
    """The lower bound of each package in pyproject.toml."""
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return dict(line.split(">=") for line in said)


def cells(pythons: list[str], versions: list[str]) -> Iterator[Cell]:
    """All cells, the lowest first."""
    first, *others = pythons
    yield from (Cell(first, torch, lowest=torch == bounds()["torch"]) for torch in versions)
    yield from (Cell(python, torch) for python in others for torch in dict.fromkeys((versions[0], versions[-1])))


def run(cell: Cell, minutes: float, whole: bool) -> str:
    """Make the environment of a cell, run its tests, and return the rest of its row."""
    if (python := found(cell.python)) is None:
        return f"{'| ' * len(SHOWN)}left out: {cell.python} is not installed"
    folder = Path(tempfile.mkdtemp(prefix="matrix-"))
    try:
        inside = folder / "bin/python"
        subprocess.run([python, "-m", "venv", folder], check=True)
        pins = [f"{name}=={low}" for name, low in bounds().items()] if cell.lowest else [f"torch=={cell.torch}.*"]
        tools = re.findall(rf"^({'|'.join(TOOLS)})(==\S+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
        wanted = [*pins, *(name for name in bounds() if not cell.lowest), *map("".join, tools)]
        pip = subprocess.run(
            [inside, "-m", "pip", "install", "--quiet", *dict.fromkeys(wanted)], capture_output=True, text=True
        )
        if pip.returncode:
            why = next((line for line in pip.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
            return f"{'| ' * len(SHOWN)}left out: {why[:200]}"
        return f"{installed(inside)} | {tested(inside, minutes, whole)}"
    finally:
        shutil.rmtree(folder)


def found(name: str) -> str | None:
    """An interpreter that starts; a name on PATH may be a shim of one that is not there."""
    path = shutil.which(name)
    works = path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0
    return path if works else None


def installed(python: Path) -> str:
    """The versions in an environment, as cells of a table."""
    listed = json.loads(subprocess.check_output([python, "-m", "pip", "list", "--format", "json"]))
    versions = {entry["name"].lower(): entry["version"] for entry in listed}
    return " | ".join(versions[name] for name in SHOWN)


def tested(python: Path, minutes: float, whole: bool) -> str:
    """Run the tests with an interpreter, and return pytest's last line, with the names of those that failed."""
    paths = ["tests"] if whole else [f"tests/{room}/test_{name}.py" for room in TESTS for name in TESTS[room].split()]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *paths]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=minutes * 60).stdout
    except subprocess.TimeoutExpired:
        return f"not done within {minutes:g} minutes"
    print(done[-6000:], file=sys.stderr)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done, re.MULTILINE)
    last = re.sub(r"=+ | in .*", "", done.rstrip().rpartition("\n")[2])
    names = f": {', '.join(failed[:5])}" if failed else ""
    return last + names


def write(cell: Cell, rest: str) -> None:
    """Put the row of a cell into the page, in the place of the one it had."""
    text = PAGE.read_text(encoding="utf-8")
    row = f"| {cell.name} | {rest} | {time.strftime('%Y-%m-%d')} |"
    head, line, table = text.partition("|---|---|---|---|---|---|---|---|\n")
    rows = {cells_of(old): old for old in table.splitlines()}
    rows[cells_of(row)] = row
    ordered = [rows[name] for name in sorted(rows, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]
    PAGE.write_text(head + line + "\n".join(ordered) + "\n", encoding="utf-8")


def cells_of(row: str) -> str:
    """The first two cells of a row, which say which it is."""
    return " ".join(row.split(" | ")[:2])


def main() -> int:
    """Run the cells one after the other; 1 where tests failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[*PYTHONS], metavar="NAME", help="interpreters on PATH")
    parser.add_argument("--torch", nargs="+", default=[*TORCH], metavar="VERSION", help="minor versions, in order")
    parser.add_argument("--minutes", type=float, default=10, help="for the tests of a cell (10)")
    parser.add_argument("--whole", action="store_true", help="all tests of tier ci but the slow ones")
    args = parser.parse_args()
    failed = False
    for cell in cells(args.python, args.torch):
        rest = run(cell, args.minutes, args.whole)
        print(f"{cell.name} | {rest}", flush=True)
        write(cell, rest)
        failed |= "passed" in rest and "failed" in rest
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
