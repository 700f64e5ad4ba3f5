"""Kill real runs of train.py that save at every step, and compare where they end with a run never killed.

python -m tests.faults killed_runs
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

from tests.faults.tally import Tally
from tests.makers.models import TEXT
from tests.makers.runs import best, bits, losses, same
from tests.training.test_resume import start

NAME, KILLS, STEPS, SEED = "killed", 20, 500, 7
LINE = [
    "train.py", "--model_name", NAME, "--n_layer", "2", "--n_head", "2", "--n_embd", "32",
    "--block_size", "32", "--batch_size", "8", "--dropout", "0.2", "--eval_interval", "100", "--save_interval", "1",
    "--eval_iters", "2", "--device", "cpu",
]  # fmt: skip


def logged(root: Path) -> int:
    """Lines of the log, which grows at each save."""
    log = root / NAME / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_at_random(run: subprocess.Popen, root: Path, chance: random.Random, is_early: bool) -> None:
    """Kill a run early, wherever it is, or after a few saves, at any instant of the next one."""
    if is_early:
        time.sleep(chance.uniform(0.1, 2.5))
    else:
        wanted = logged(root) + chance.randint(2, 15)
        while run.poll() is None and logged(root) < wanted:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
    run.send_signal(signal.SIGKILL)


def run(folder: Path, kills: int = KILLS, steps: int = STEPS) -> Tally:
    """Kill a run over and over, let it end, and compare it bit for bit."""
    line = [*LINE, "--max_iters", str(steps)]
    text, tally, chance = folder / "text.txt", Tally(), random.Random(SEED)
    text.write_text("".join(random.Random(3).choices(TEXT, k=20_000)))
    whole, killed = folder / "whole", folder / "often"
    beside = start(whole, text, line)
    committed = 0
    for number in range(kills):
        process = start(killed, text, line)
        kill_at_random(process, killed, chance, number % 4 == 3)
        ended = process.wait()
        said = killed.with_suffix(".said").read_text()[-300:]
        tally.check(ended == -signal.SIGKILL, f"it ended with {ended} before kill {number}, and said {said!r}")
        state = killed / NAME / "training_state.json"
        step = json.loads(state.read_text())["step"] if state.exists() else 0
        tally.check(step >= committed, f"kill {number}: step {step} at the top, and step {committed} was before")
        tally.counts["kills"] += 1
        committed = step
    tally.counts["steps committed by killed runs"] += committed
    ends = start(killed, text, line).wait(), beside.wait()
    tally.check(ends == (0, 0), f"the last runs ended with {ends}")
    tally.check(same(bits(whole / NAME), bits(killed / NAME)), "the final bits differ from those of a run never killed")
    tally.check(losses(whole, NAME) == losses(killed, NAME), "the losses differ from those of a run never killed")
    logs = [root / NAME / "metrics.jsonl" for root in (whole, killed)]
    tally.check(logs[0].read_bytes() == logs[1].read_bytes(), "the logs differ")
    tally.check(best(whole) == best(killed), "another step is the best one")
    tally.check(len(losses(whole, NAME)) == steps, "steps are missing from the log")
    tally.counts["steps compared bit for bit"] += steps
    return tally
