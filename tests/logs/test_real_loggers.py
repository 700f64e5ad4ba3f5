"""What TensorBoard and Weights & Biases read back of runs that were killed, resumed and taken back."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from core.checkpoint import CheckpointManager
from tests.conftest import ROOT
from tests.makers.models import TEXT
from tests.makers.runs import logged

RUN = [
    "train.py", "--model_name", "m", "--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size", "16",
    "--batch_size", "4", "--eval_interval", "20", "--save_interval", "4", "--eval_iters", "2", "--device", "cpu",
]  # fmt: skip
NAMES = ("loss", "learning_rate", "grad_norm", "val_loss")


def start(root, log, steps=200, *more):
    (root.parent / "text.txt").write_text("".join(random.Random(3).choices(TEXT, k=20_000)))
    (root.parent / "noting.py").write_text(
        "import json, os\n"
        "def note(step, **values):\n"
        "    with open('noted.jsonl', 'a') as file:\n"
        "        file.write(json.dumps({'step': step, **values}) + '\\n')\n"
    )
    command = [sys.executable, "-W", "ignore", ROOT / RUN[0], *RUN[1:], "--checkpoint_root", root, "--max_iters", steps]
    command += ["--input_file", root.parent / "text.txt", "--log", log, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root.parent)}
    return subprocess.Popen(
        [*map(str, command)], cwd=root.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def killed_and_resumed(root, log, kills):
    """Run a command to its end through kills at random moments; return the committed steps at each of them."""
    at, state, chance = [], root / "m/training_state.json", random.Random(7)
    for _ in range(kills):
        before = state.read_bytes() if state.exists() else b""
        run = start(root, log)
        while run.poll() is None and (not state.exists() or state.read_bytes() == before):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.4))
        run.send_signal(signal.SIGKILL)
        run.wait()
        at.append(json.loads(state.read_text())["step"])
    assert start(root, log).wait() == 0
    return at


def scalars(root):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(root / "m/tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


def as_recorded(root):
    """Each number of metrics.jsonl by step, as float32."""
    return {
        name: [(step, torch.tensor(value).item()) for step, value in logged(root / "m", name).items()] for name in NAMES
    }


@pytest.mark.slow
@pytest.mark.full  # it kills runs
def test_no_step_comes_twice_and_none_is_missing_through_kills(tmp_path, tell):
    root = tmp_path / "root"
    at = killed_and_resumed(root, "csv,tensorboard,noting:note", kills=6)
    with (root / "m/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 201))
    for name in NAMES:
        found = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert found == logged(root / "m", name)
    assert scalars(root) == as_recorded(root)
    noted = [json.loads(line) for line in (tmp_path / "noted.jsonl").read_text().splitlines()]
    recorded = [json.loads(line) for line in (root / "m/metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(json.dumps(line) for line in noted)) == [json.dumps(line) for line in recorded]
    tell(
        f"--log: killed at steps {at}; {len(noted) - len(recorded)} of {len(recorded)} events reached a function twice"
    )


@pytest.mark.full  # TensorBoard
def test_a_run_that_goes_back_has_one_curve_in_tensorboard(tmp_path):
    root = tmp_path / "root"
    for steps, more in ((20, ["--keep", "9"]), (16, ["--resume_from", "8", "--learning_rate", "0.01"])):
        assert start(root, "tensorboard", steps, *more).wait() == 0
    assert [step for step, _ in scalars(root)["loss"]] == list(range(1, 17)) and scalars(root) == as_recorded(root)


def records(path):
    """The records of a .wandb file: LevelDB's log of blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or the last piece of one
            yield Record.FromString(whole)
            whole = b""


def history(root):
    """What all files of each run hold: by run, name and step."""
    found = {}
    for path in sorted((root / "m/wandb").glob("offline-run-*/run-*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for name in NAMES:
                    if name in row:
                        here = found.setdefault(path.stem, {}).setdefault(name, {})
                        assert here.setdefault(row["_step"], row[name]) == row[name], "another value"
    return found


@pytest.mark.slow
@pytest.mark.full  # Weights & Biases
def test_wandb_has_every_step_offline_and_a_run_for_each_branch(tmp_path):
    root = tmp_path / "root"
    killed_and_resumed(root, "wandb", kills=2)
    (first,) = history(root).values()
    assert first == {name: logged(root / "m", name) for name in NAMES}
    assert start(root, "wandb", 190, "--resume_from", "180").wait() == 0
    state = json.loads((root / "m/training_state.json").read_text())
    found = history(root)
    assert found.keys() == {f"run-{state['run']}", f"run-{state['branch']['id']}"}
    assert found[f"run-{state['branch']['id']}"] == {name: logged(root / "m", name) for name in NAMES}
    assert found[f"run-{state['run']}"] == first


@pytest.mark.full  # TensorBoard
def test_a_loop_of_ones_own_reaches_tensorboard(tmp_path):
    for end in (3, 6):
        with CheckpointManager("m", tmp_path, log_to="tensorboard", say=lambda line: None) as made:
            for step in range(made.load(torch.nn.Linear(2, 1)) + 1, end + 1):
                made.log(step, loss=1 / step, note="a text", lr=None)
            made.save(torch.nn.Linear(2, 1), step=end)
    assert scalars(tmp_path) == {"loss": [(step, torch.tensor(1 / step).item()) for step in range(1, 7)]}
