"""Run the benchmarks and write their table into docs/benchmarks.md, with the date and the machine: `make bench`.

    python -m benchmarks [NAME ...] [--input_file TEXT] [--nanogpt CLONE] [--folder DIR] [--quick]

All of them take more than an hour; with names (save, convert, ...) those alone run, and only their rows are replaced.
What sums bytes runs twice: with zlib-ng where that is installed (the extra `fast`), and with zlib alone. `--quick`
tries all of it in some minutes, with one round and small models, and writes nothing: its figures are of nothing that
is claimed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import FAST, FILE, Row
from benchmarks.trained import machine_line

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- written by make bench -->", "<!-- end of what make bench writes -->"
PLAIN = ROOT / "benchmarks" / "plain"
"""A folder whose `zlib_ng` cannot be imported."""


HEADING = (
    "| claim; peer | bar | ours | peer | figure | with zlib alone | measured | command |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Script:
    """A benchmark as the table runs it; `sums`: it sums bytes; `needs`, `takes`: flags of ours that it has as well."""

    name: str
    flags: str = ""
    quick: str = ""
    sums: bool = False
    needs: str = ""
    takes: str = ""

    @property
    def command(self) -> str:
        """What anybody types to measure it."""
        return f"`{f'python benchmarks/{self.name}.py {self.flags}'.strip()}`"


SCRIPTS = (
    Script("save", "--repeats 3 --steps 4", "--repeats 1 --steps 2 --size small", sums=True),
    Script("load", "--repeats 5", "--repeats 1 --size small", sums=True, takes="nanogpt"),
    Script("start", "--repeats 5", "--repeats 1", sums=True),
    Script("convert", "--repeats 3", "--repeats 1 --gigabytes 0.3", sums=True),
    Script("convert", "--repeats 3 --cold", "--repeats 1 --gigabytes 0.3 --cold", sums=True),
    Script("inspect_file", "--repeats 5", "--repeats 1", sums=True),
    Script("distributed", "--rounds 3 --tokens 16 --n_layer 9", "--rounds 1 --tokens 4 --n_layer 1"),
    Script("train_step", "--steps 60 --repeats 9", "--steps 2 --repeats 1", needs="input_file", takes="nanogpt"),
    Script("generate", "--repeats 3", "--repeats 1 --new_tokens 8 --n_layer 2"),
    Script(
        "generate", "--arch llama --new_tokens 64 --repeats 3 --no_uncached", "--arch llama --new_tokens 8 --repeats 1"
    ),
    Script("generate", "--arch llama --part tuning --repeats 3", "--arch llama --part tuning --repeats 1 --n_layer 2"),
    Script("flex", "--part tuning --repeats 2", "--part tuning --repeats 1 --n_layer 2"),
    Script("growth", "--plot docs/growth.svg", "--repeats 1 --megabytes 10 1000 --tensors 100"),
)


def run(script: Script, args: argparse.Namespace, is_plain: bool) -> list[Row]:
    """Run a benchmark, and return its rows; one that fails is reported and has none."""
    command = [sys.executable, f"benchmarks/{script.name}.py", *script.flags.split()]
    for name in filter(None, (script.needs, script.takes)):
        if value := getattr(args, name):
            command += [f"--{name}", value]
    if args.folder and script.name not in ("train_step", "generate", "flex", "start"):
        command += ["--folder", args.folder]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        environment = {**os.environ, FILE: str(rows)}
        if is_plain:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PLAIN), os.environ.get("PYTHONPATH"))))
        print(f"\n$ {' '.join(command[1:])}{'   (zlib alone)' if is_plain else ''}", flush=True)
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if code or not rows.exists():
            print(f"error: {script.name} ended with {code}, its rows are missing", file=sys.stderr)
            return []
        return [Row(**row) for row in json.loads(rows.read_text())]


def lines_of(script: Script, fast: list[Row] | None, plain: list[Row]) -> list[str]:
    """The lines of the table for a benchmark, with a column for zlib-ng and one for zlib alone."""
    beside = {row.claim: row for row in plain} if script.sums else {}
    when = f"{datetime.now(UTC):%Y-%m-%d}, load {os.getloadavg()[0]:.1f}"
    lines = []
    for row in plain if fast is None else fast:
        other = beside.get(row.claim)
        bound = row.bound if other in (None, row) or other.bound == row.bound else f"{row.bound}, {other.bound}"
        figures = ["" if fast is None else figure_of(row), figure_of(other) if other else ""]
        cells = (row.claim, bound, row.ours, row.peer, *figures, when, script.command)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def figure_of(row: Row) -> str:
    """A figure, and whether its bar is met."""
    return f"**{row.figure}** {'met' if row.is_met else 'missed'}"


def write(made: dict[str, list[str]]) -> None:
    """Put the lines of benchmarks, by their commands, between the marks in the page; lines of others stay."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    lines = []
    for script in SCRIPTS:
        kept = [line for line in old.splitlines() if line.endswith(f"| {script.command} |")]
        lines += made.get(script.command) or kept
    PAGE.write_text("\n".join([before + BEGIN, f"{machine_line()}.", "", *HEADING, *lines, END]) + after)
    print(f"\nwrote {PAGE.relative_to(ROOT)}")


def main() -> None:
    """Run, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", help=", ".join(dict.fromkeys(s.name for s in SCRIPTS)))
    parser.add_argument("--input_file", metavar="TEXT", help="for train_step, which is left out without it")
    parser.add_argument("--nanogpt", metavar="CLONE", help="a clone of karpathy/nanoGPT, for its own model.py")
    parser.add_argument("--folder", metavar="DIR", help="where files are made (default: the system's temporary folder)")
    parser.add_argument("--quick", action="store_true", help="one round with small models; nothing is written")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in {script.name for script in SCRIPTS}]:
        parser.error(f"no benchmark of the table: {', '.join(unknown)}")
    made: dict[str, list[str]] = {}
    for script in [replace(one, flags=one.quick) for one in SCRIPTS] if args.quick else SCRIPTS:
        if args.names and script.name not in args.names:
            continue
        if script.needs and not getattr(args, script.needs):
            print(f"\n{script.name}: left out, it needs --{script.needs}", flush=True)
            continue
        fast = run(script, args, False) if FAST or not script.sums else None
        plain = run(script, args, True) if script.sums else []
        made[script.command] = lines_of(script, fast, plain)
    print("", *HEADING, *(line for lines in made.values() for line in lines), sep="\n")
    if not args.quick:
        write(made)


if __name__ == "__main__":
    main()
