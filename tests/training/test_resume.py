from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from core.errors import InputError, SaveFailed, TrainingDiverged
from core.logs.metrics import Metrics
from core.training.fit import fit
from core.training.schedule import Schedule
from tests.conftest import ROOT
from tests.makers.limits import wait_until
from tests.makers.models import SMALL, TEXT, equal, started
from tests.makers.runs import best, bits, fitted, loader, losses, same


def train(root, *ends, name="dante", schedule=None, accumulation=1, compile=False, dropout=0.2):
    """Train to each end in turn, each in a manager of its own as a new process would."""
    how = {"schedule": schedule or Schedule("constant", 1e-2, 3), "eval_interval": 5, "eval_iters": 2}
    how |= {"gradient_accumulation_steps": accumulation, "compile": compile}
    for end in ends:
        fitted(started(root, name, {**SMALL, "dropout": dropout}), end, **how)
    return bits(root / name)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("cut", [1, 7, 10])
def test_n_steps_and_then_m_equal_n_plus_m_at_once(tmp_path, cut, accumulation):
    cosine = Schedule("cosine", 1e-2, 3, 15)
    once = train(tmp_path / "once", 12, schedule=cosine, accumulation=accumulation)
    twice = train(tmp_path / "twice", cut, 12, schedule=cosine, accumulation=accumulation)
    assert same(once, twice)
    assert losses(tmp_path / "once") == losses(tmp_path / "twice")


@pytest.mark.slow
@pytest.mark.full  # compilers take a minute; needs no extra
def test_compiled_training_resumes_to_the_same_bits(tmp_path):
    assert same(train(tmp_path / "once", 8, compile=True), train(tmp_path / "twice", 3, 8, compile=True))


def test_dropout_differs_between_steps_and_seeds_but_not_between_runs(tmp_path):
    a, b = train(tmp_path / "a", 3), train(tmp_path / "b", 3)
    assert same(a, b)
    assert not same(a, train(tmp_path / "c", 3, dropout=0.0))


def test_the_training_state_says_what_exactness_depends_on(tmp_path):
    train(tmp_path, 5)
    state = json.loads((tmp_path / "dante/training_state.json").read_text())
    assert state["seed"] == 1 and state["tokens_seen"] == 5 * 4 * 16 and state["elapsed_seconds"] > 0
    assert state["schedule"]["kind"] == "constant" and state["schedule"]["warmup_iters"] == 3
    assert state["environment"]["torch"] == torch.__version__
    assert {"device", "threads", "dtype", "compile", "fused"} <= set(state["environment"])
    assert state["best"]["step"] == 5
    assert state["val_loss"] == state["best"]["val_loss"]
    train(tmp_path, 8)
    assert json.loads((tmp_path / "dante/training_state.json").read_text())["tokens_seen"] == 8 * 4 * 16


def test_log_lines_that_a_full_disk_refused_are_written_once_and_whole_later(tmp_path, monkeypatch):
    log = Metrics(tmp_path / "metrics.jsonl")
    log.add(step=1)
    log.flush()
    log.add(step=2)

    def full(fd):
        os.write(fd, b'{"ste')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SaveFailed, match=r"metrics.jsonl: No space left on device"):
            log.flush()
    assert log.path.read_text() == '{"step": 1}\n'
    log.add(step=3)
    log.flush()
    log.cut(3)
    assert log.path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_metrics_are_cut_back_to_the_committed_step_when_killed_between_line_and_commit(tmp_path):
    train(tmp_path, 10)
    path = tmp_path / "dante/metrics.jsonl"
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 11, "loss": 1.0}\n{"step": 12, "lo')
    metrics = Metrics(path)
    metrics.cut(10)
    assert path.read_bytes() == whole
    metrics.add(step=11, loss=2.0)
    assert path.read_bytes() == whole, "lines wait for the flush before a commit"
    metrics.flush()
    assert path.read_bytes() == whole + b'{"step": 11, "loss": 2.0}\n'


LINES = [b'{"step": %d, "loss": 1.5}' % step for step in range(1, 11)]


@pytest.mark.parametrize(
    ("changed", "left", "aside"),
    [
        ([*LINES[:2], b"# changed the rate here", *LINES[2:]], LINES[:8], [b"# changed the rate here"]),
        (
            [LINES[0], b'{"st\xe5p": 2, "loss": 1.5}', *LINES[2:]],
            [LINES[0], *LINES[2:8]],
            [b'{"st\xe5p": 2, "loss": 1.5}'],
        ),
        ([*LINES[:2], b"", *LINES[2:]], LINES[:8], []),
        ([b"\0" * 64 + LINES[0], *LINES[1:]], LINES[1:8], [b"\0" * 64 + LINES[0]]),
        (LINES[::-1], LINES[7::-1], []),
        ([b'{"note": "another rate"}', *LINES], [b'{"note": "another rate"}', *LINES[:8]], []),
        ([b"[1, 2]", b"3", *LINES], LINES[:8], [b"[1, 2]", b"3"]),
    ],
    ids=["comment", "flipped bit", "blank line", "zeros", "other order", "note", "other JSON"],
)
def test_a_log_keeps_every_line_that_can_be_read_and_sets_the_others_aside(tmp_path, changed, left, aside):
    path, beside = tmp_path / "metrics.jsonl", tmp_path / "metrics_unreadable.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in changed) + b'{"step": 11, "lo')
    said = Metrics(path).cut(8)
    assert path.read_bytes().splitlines() == left
    assert (beside.read_bytes().splitlines() if beside.exists() else []) == aside
    one = "1 line that is" if len(aside) == 1 else f"{len(aside)} lines that are"
    wanted = f"{path}: {one} not valid JSON went to metrics_unreadable.jsonl; the other {len(left)} stay."
    assert said == (wanted if aside else None)
    assert Metrics(path).cut(8) is None and path.read_bytes().splitlines() == left
    assert sorted(tmp_path.iterdir()) == sorted([path, *([beside] if aside else [])])


def test_a_run_goes_on_with_a_log_that_somebody_wrote_into(tmp_path, capsys):
    train(tmp_path, 10)
    path = tmp_path / "dante/metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"half a li\n", *lines[3:]]))
    train(tmp_path, 12)
    assert path.read_bytes().splitlines(keepends=True)[: len(lines)] == lines
    assert "WARNING: " in (err := capsys.readouterr().err) and "1 line that is not valid JSON went to" in err


def test_a_loss_that_is_no_number_stops_with_its_step_and_keeps_the_last_good_checkpoint(tmp_path):
    train(tmp_path, 5)
    before = bits(tmp_path / "dante")
    made, model, optimizer = started(tmp_path)
    with torch.no_grad():
        model.ln_f.weight[3] = float("nan")
    with pytest.raises(
        TrainingDiverged, match=r"step 6: loss is nan\. The last saved step is 5, in .*dante\. Try a lower"
    ):
        fit(model, data_loader=loader(), optimizer=optimizer, max_iters=30, manager=made, progress=False)
    assert same(before, bits(tmp_path / "dante"))


@pytest.mark.parametrize(
    "name", ["eval_interval", "eval_iters", "max_iters", "gradient_accumulation_steps", "save_interval"]
)
def test_impossible_counts_are_refused_by_name(name):
    with pytest.raises(InputError, match=f"{name} is -1, expected at least 1"):
        fit(None, data_loader=None, optimizer=None, **{"max_iters": 1, name: -1})


def start(root, text, line):
    """Start a run; what it says is appended to a file beside its root."""
    command = [sys.executable, "-W", "ignore", *line, "--checkpoint_root", root, "--input_file", text]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with root.with_suffix(".said").open("ab") as said:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said)


EVERYTHING = [
    "train.py", "--model_name", "killed", "--max_iters", "120", "--n_layer", "1", "--n_head", "2", "--n_embd", "16",
    "--block_size", "16", "--batch_size", "4", "--dropout", "0.2", "--eval_interval", "20", "--save_interval", "5",
    "--eval_iters", "2", "--device", "cpu", "--dtype", "fp16", "--ema", "0.9", "--gradient_accumulation_steps", "3",
    "--lr_schedule", "cosine", "--lr_decay_iters", "100", "--warmup_iters", "0.1", "--keep", "3", "--strict_resume",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.full  # half a minute; each of them has a resume of its own
def test_fp16_average_accumulation_and_cosine_go_on_to_the_same_bits_through_kills(tmp_path, tell):
    """Killed after each of several saves; `--strict_resume` has every start prove that it goes on exactly."""
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(3).choices(TEXT, k=20_000)))
    assert start(tmp_path / "whole", text, EVERYTHING).wait() == 0
    state = tmp_path / "killed/killed/training_state.json"
    resumed_at = []
    for _ in range(6):
        before = state.read_bytes() if state.exists() else b""
        run = start(tmp_path / "killed", text, EVERYTHING)
        wait_until(lambda before=before: state.exists() and state.read_bytes() != before, run)
        run.send_signal(signal.SIGKILL)
        run.wait()
        resumed_at.append(json.loads(state.read_text())["step"])
    assert resumed_at[-1] < 120 and start(tmp_path / "killed", text, EVERYTHING).wait() == 0
    whole, killed = tmp_path / "whole/killed", tmp_path / "killed/killed"
    assert same(bits(whole), bits(killed))
    assert equal(*(torch.load(folder / "ema.pt", weights_only=True) for folder in (whole, killed)))
    assert (whole / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()
    assert best(tmp_path / "whole") == best(tmp_path / "killed")
    scalers = [json.loads((folder / "training_state.json").read_text())["scaler"] for folder in (whole, killed)]
    assert scalers[0] == scalers[1]
    tell(
        f"fp16, EMA, accumulation, cosine: killed at steps {resumed_at}, the final bits are those of a run never killed"
    )
