"""Kill a save before every storage call it makes, and look what a reader and the next writer find.

    python -m tests.faults.kill_points FOLDER           every kill point of every scenario; prints a JSON summary
    python -m tests.faults.kill_points FOLDER --traced  one save of each scenario between two marks, for strace

A process that has imported torch forks a child for each point, which is killed with SIGKILL by its own hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from core.checkpoint import CheckpointManager
from core.errors import CheckpointError
from core.storage import DISK
from tests.helpers import copy, equal, started, train_and_save, update, weights

Scenario = Callable[[Path], tuple[CheckpointManager, Callable[[], None]]]


def first_save(root: Path):
    made, model, optimizer = started(root)
    update(model, optimizer)
    return made, lambda: made.save(model, optimizer, step=1)


def next_save(root: Path):
    made, model, optimizer = started(root)
    update(model, optimizer)
    return made, lambda: made.save(model, optimizer, step=model.step)


def save_that_prunes_two(root: Path):
    made, model, optimizer = started(root, keep=0)
    made.resumed = {}
    update(model, optimizer)
    return made, lambda: made.save(model, optimizer, step=model.step)


def save_without_optimizer(root: Path):
    made, model, optimizer = started(root)
    update(model, optimizer)
    return made, lambda: made.save(model, step=model.step)


def save_of_the_same_step_again(root: Path):
    made, model, _ = started(root)
    with torch.no_grad():
        model.ln_f.weight += 1
    return made, lambda: made.save(model, step=model.step)


def nothing(root: Path) -> None:
    pass


def three_saves(root: Path) -> None:
    made, model, optimizer = started(root, keep=9)
    train_and_save(made, model, optimizer, 3)
    made.close()


def single_file(root: Path) -> None:
    made, model, optimizer = started(root)
    for _ in range(3):
        update(model, optimizer)
    content = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "step": 3}
    content |= {"config": model.config.to_dict(), "tokenizer": model.tokenizer.state()}
    torch.save(content, root / "dante" / "latest.pt")
    made.close()


SCENARIOS: dict[str, tuple[Callable[[Path], None], bool, Scenario]] = {
    "first save": (nothing, True, first_save),
    "first save beside a single file": (single_file, True, next_save),
    "next save": (three_saves, True, next_save),
    "next save without hard links": (three_saves, False, next_save),
    "save that prunes two": (three_saves, True, save_that_prunes_two),
    "save without optimizer": (three_saves, True, save_without_optimizer),
    "another state of the same step": (three_saves, True, save_of_the_same_step_again),
}
"""Name: what is there before, whether the file system has hard links, and the save."""


class Killer:
    """Counts storage calls; kills the process before one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.count, self.at = 0, at

    def __call__(self, call, *args):
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        return call(*args)


def loaded(root: Path):
    """What a reader finds: step and weights, or None before the first commit."""
    try:
        model = CheckpointManager.load_for_inference("dante", root)
    except CheckpointError:
        return None
    return model.step, weights(model)


def same(a, b) -> bool:
    return a is b is None or (a is not None and b is not None and a[0] == b[0] and equal(a[1], b[1]))


def in_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def run(folder: Path) -> dict:
    """Try every kill point; raise AssertionError at the first that loses anything."""
    counts = {}
    for name, (before, links, scenario) in SCENARIOS.items():
        base = folder / name.replace(" ", "_")
        base.mkdir(parents=True)
        before(base)
        old = loaded(base)
        DISK.links = links
        calls = count_calls(copy(base, folder / "counted"), scenario)
        new = loaded(folder / "counted")
        shutil.rmtree(folder / "counted")
        assert not same(old, new)
        committed = 0
        for point in range(calls):
            trial = copy(base, folder / "trial")

            def killed(trial=trial, point=point, scenario=scenario) -> None:
                _, save = scenario(trial)
                DISK.change = Killer(point)
                save()

            status = in_child(killed)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (
                f"{name}: call {point} was not made"
            )
            found = loaded(trial)
            assert same(found, old) or same(found, new), f"{name}, killed before call {point}: neither old nor new"
            assert not committed or same(found, new), f"{name}, killed before call {point}: the commit was lost"
            committed += same(found, new)
            again, model, optimizer = started(trial)
            assert model.step == (found[0] if found else 0), f"{name}, killed before call {point}: another step resumed"
            with again:
                train_and_save(again, model, optimizer, 1)
            left = [
                p.name for p in (trial / "dante").iterdir() if p.name.startswith((".stage", ".trash", ".hist", ".com"))
            ]
            assert not left, f"{name}, killed before call {point}: {left} stayed"
            shutil.rmtree(trial)
        DISK.links = True
        counts[name] = {"kill_points": calls, "found_old": calls - committed, "found_new": committed}
    return counts


def count_calls(root: Path, scenario: Scenario) -> int:
    made, save = scenario(root)
    DISK.change = killer = Killer()
    save()
    del DISK.change
    made.close()
    return killer.count


def traced(folder: Path) -> dict:
    """Make one save of each scenario between two marks that strace sees; return how many calls we counted."""
    counts = {}
    for number, (name, (before, links, scenario)) in enumerate(SCENARIOS.items()):
        base = folder / f"traced{number}"
        base.mkdir(parents=True)
        before(base)
        DISK.links = links
        made, save = scenario(base)
        DISK.change = killer = Killer()
        (folder / f"begin{number}").mkdir()
        save()
        (folder / f"end{number}").mkdir()
        del DISK.change
        DISK.links = True
        made.close()
        counts[name] = killer.count
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--traced", action="store_true")
    args = parser.parse_args()
    sys.stderr.close()
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    torch.set_num_threads(1)
    print(json.dumps(traced(args.folder) if args.traced else run(args.folder)))
