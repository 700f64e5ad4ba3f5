"""Have ckpt-chaos, which is not ours, kill trainers at every change of a file, resume them, and compare the end.

    python -m tests.faults referee                                   some points of every trainer
    python -m tests.faults.referee [NAME ...] [--points N] [--write]   all points, or N

Our trainers are judged; what transformers and Lightning save by themselves is counted beside, by the same tool and run.
`--write` puts the rows into the table of docs/guarantees.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from tests.faults.tally import Tally

MODES = ("before", "torn", "term", "unsynced")
JUDGED = Path("tests/faults/judged")
DOCS = ROOT / "docs/guarantees.md"
TRAIN = (
    "--model_name toy --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --dropout 0.2 "
    "--eval_interval 100 --eval_iters 1 --save_interval 2 --max_iters 6 --device cpu "
    "--input_file {text} --checkpoint_root {out}"
)
OURS = (
    "torch._dynamo", "torch.distributed.tensor", "core.checkpoint", "core.training.flags", "core.training.fit",
    "core.training.ranks", "core.training.report", "core.kinds.gpt", "core.kinds.origin", "core.data.corpus",
    "core.data.source", "core.training.pruning",
)  # fmt: skip
HF = ("torch._dynamo", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2", "accelerate")


@dataclass(frozen=True)
class Trainer:
    """A command that trains six steps, saving every second, and goes on when it is started again."""

    title: str
    command: str
    imports: tuple[str, ...] = OURS
    checkpoints: str = "toy/step_*"
    """What the referee looks for to tell lost work; the step is the last number in a name."""
    ours: bool = True
    ranks: int = 1
    crash_rank: int = 0


TRAINERS = {
    "train": Trainer("`train.py`", f"train.py {TRAIN}"),
    "rank0": Trainer("`train.py`, two ranks (fsdp), rank 0 killed", f"train.py --parallel fsdp {TRAIN}", ranks=2),
    "rank1": Trainer("the same, rank 1 killed", f"train.py --parallel fsdp {TRAIN}", ranks=2, crash_rank=1),
    "hf": Trainer(
        "transformers' Trainer, our adapter",
        "tests/adapters/hf_trainer_run.py {out} max_steps=6 keep=9",
        (*HF, "core.adapters.huggingface", "core.checkpoint", "core.training.ranks"),
        "checkpoints/tiny/step_*",
    ),
    "accelerate": Trainer(
        "accelerate, our adapter",
        f"{JUDGED}/accelerate_run.py {{out}} epochs=1 keep=9",
        ("torch._dynamo", "accelerate", "core.adapters.accelerate", "core.checkpoint", "core.training.ranks"),
        "checkpoints/small/step_*",
    ),
    "lightning": Trainer(
        "Lightning's Trainer, our adapter",
        f"{JUDGED}/lightning_ours.py {{out}}",
        ("torch._dynamo", "lightning.pytorch", "core.adapters.lightning", "core.checkpoint", "core.training.ranks"),
    ),
    "fabric": Trainer(
        "a loop with Lightning's Fabric and the manager",
        "tests/adapters/fabric_run.py {out} steps=6 keep=9",
        ("torch._dynamo", "lightning.fabric", "core.checkpoint", "core.data", "core.training.ranks"),
        "checkpoints/small/step_*",
    ),
    "hf_own": Trainer(
        "transformers' Trainer, its own saving",
        f"{JUDGED}/hf_trainer.py {{out}}",
        HF,
        "checkpoint-*",
        ours=False,
    ),
    "lightning_own": Trainer(
        "Lightning's Trainer, its own saving",
        f"{JUDGED}/lightning_trainer.py {{out}}",
        ("torch._dynamo", "lightning.pytorch"),
        "step=*.ckpt",
        ours=False,
    ),
}
MISTAKEN = Trainer("train.py without fsync", f"{JUDGED}/mistaken.py {TRAIN}")
VERDICTS = ("PASS", "HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK")


@dataclass
class Judged:
    """What the referee found of one trainer."""

    events: int
    verdicts: Counter[str]
    apart: Counter[str]
    """Points, judged like all, of which the tool says that the command ended by itself, or did other things."""
    failures: list[str]
    seconds: float

    @property
    def points(self) -> int:
        """How often the trainer was killed, or was to be."""
        return self.verdicts.total()


def why_not() -> str | None:
    """Why this cannot run here; None when it can."""
    missing = [name for name in ("ckpt_chaos", "transformers", "lightning") if not importlib.util.find_spec(name)]
    return f"needs {', '.join(missing)} (requirements-full.txt)" if missing else None


@contextlib.contextmanager
def warm(folder: Path, imports: tuple[str, ...]) -> Iterator[list[str]]:
    """Lend the beginning of a command line that starts a script in a process that has imported this already."""
    address = folder / "socket"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "tests.faults.judged.warm", str(address), *imports]
    said = (folder / "warm.log").open("w")
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
    ) as server:
        assert server.stdin and server.stdout
        try:
            assert server.stdout.readline() == b"ready\n", (folder / "warm.log").read_text()
            yield [sys.executable, "-S", "-E", str(JUDGED / "ask.py"), str(address)]
        finally:
            server.stdin.close()
            said.close()


def judge(name: str, folder: Path, points: int = 10_000, jobs: int = 1, modes: tuple[str, ...] = MODES) -> Judged:
    """Have one trainer killed at all points, or at so many of them, evenly spread over the modes."""
    trainer = MISTAKEN if name == "mistaken" else TRAINERS[name]
    work, began = folder / name, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("".join(random.Random(3).choices("abcdefgh \n", k=5000)))
    with tempfile.TemporaryDirectory(prefix="warm-") as place, warm(Path(place), trainer.imports) as ask:
        line = [
            sys.executable, "-m", "ckpt_chaos", "run", "--work", str(work), "--jobs", str(jobs), "--timeout", "120",
            "--modes", ",".join(modes), "--max-points", str(points), "--ckpt-ignore-size",
            "--ranks", str(trainer.ranks), "--crash-rank", str(trainer.crash_rank),
            "--checkpoint-glob", f"{{out}}/{trainer.checkpoints}",
            "--step-regex", r"(?:resum(?:ed|ing) at step |go(?:es|ing) on from step |toy: step )(\d+)",
            "--result-cmd", shlex.join([*ask, str(JUDGED / "digest.py"), "{out}"]),
            "--", *ask, *trainer.command.format(text=text, out="{out}").split(),
        ]  # fmt: skip
        # Without this, ckpt-chaos 0.1.8 kills no rank but the first, whatever --crash-rank says.
        environment = {**os.environ, "CKPT_CHAOS_CRASH_RANK": str(trainer.crash_rank)}
        said = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (work / "pt_control/result.json").exists(), said.stdout + said.stderr
    return _read(work, trainer, time.perf_counter() - began)


def _read(work: Path, trainer: Trainer, seconds: float) -> Judged:
    """Count what the tool has written."""
    from ckpt_chaos.runner import rejudge

    records = sorted((json.loads(path.read_text()) for path in work.glob("pt_*/result.json")), key=lambda r: r["order"])
    found = Judged(_events(work / "reference", trainer), Counter(), Counter(), [], seconds)
    for judged, record in zip(rejudge(work), records, strict=True):  # both in the order of the points
        if "point" not in record:
            if judged.verdict != "PASS":
                found.failures.append(f"{trainer.title}, not killed: {judged.verdict}")
            continue
        found.verdicts[judged.verdict] += 1
        found.apart["ended"] += not judged.crashed
        found.apart["drift"] += judged.drift
        if judged.verdict != "PASS":
            found.failures.append(f"{trainer.title}, {judged.label}: {judged.verdict} {record['resume_tail'][-300:]!r}")
    return found


def _events(run: Path, trainer: Trainer) -> int:
    return (run / f"events.log.rank{trainer.crash_rank}").read_text().count("\n")


def run(folder: Path, names: tuple[str, ...] = tuple(TRAINERS), points: int = 48) -> Tally:
    """Judge trainers; a failure of ours is a loss, those of others are counted."""
    tally = Tally()
    for name in names:
        found = judge(name, folder, points)
        whose = "of ours" if TRAINERS[name].ours else "of others"
        tally.counts[f"kills {whose}"] += found.points
        tally.counts[f"failures {whose}"] += len(found.failures)
        if TRAINERS[name].ours:
            tally.losses += found.failures
    return tally


def row(name: str, judged: Judged) -> str:
    """What was found of one trainer, for the docs."""
    numbers = [judged.events, judged.points, *(judged.verdicts[verdict] for verdict in VERDICTS)]
    numbers += [judged.apart["ended"], judged.apart["drift"]]
    return (
        f"| {TRAINERS[name].title} | {' | '.join(f'{number:,}' for number in numbers)} | {time.strftime('%Y-%m-%d')} |"
    )


def write(found: dict[str, Judged]) -> None:
    """Put rows into the table of the docs, in place of those of the same trainers."""
    lines = DOCS.read_text().splitlines()
    for name, judged in found.items():
        at = [number for number, line in enumerate(lines) if line.startswith(f"| {TRAINERS[name].title} |")]
        assert len(at) == 1, f"{DOCS} has {len(at)} rows that begin with {TRAINERS[name].title}"
        lines[at[0]] = row(name, judged)
    DOCS.write_text("\n".join(lines) + "\n")


def main(argv: list[str]) -> int:
    """Judge, print the table, and write it where that is wished."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.referee", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(TRAINERS), metavar="NAME", help=", ".join(TRAINERS))
    parser.add_argument("--points", type=int, default=10_000, help="how many points of each trainer (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at once")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/guarantees.md")
    parser.add_argument("--keep", type=Path, help="a new folder for all that the tool writes")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="referee-") as place:
        found = {}
        for name in args.names:
            found[name] = judge(name, args.keep or Path(place), args.points, args.jobs)
            print(
                row(name, found[name]), f"{found[name].seconds:.0f} s", *found[name].failures[:20], sep="\n", flush=True
            )
    if args.write:
        write(found)
    return 1 if any(judged.failures for name, judged in found.items() if TRAINERS[name].ours) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
