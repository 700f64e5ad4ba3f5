"""That loggers get every committed value, once, and none that is not committed."""

from __future__ import annotations

import csv
import json
import math
import sys
import threading

import numpy as np
import pytest
import torch

from core.checkpoint import CheckpointManager
from core.errors import InputError
from core.logs import hand_over
from core.training.flags import parse
from tests.makers.models import started
from tests.makers.runs import fitted, logged


class Noted:
    """A logger that notes what it gets."""

    def __init__(self):
        self.got = []

    def __call__(self, step, **values):
        self.got.append((step, values))

    def steps(self):
        return [step for step, _ in self.got]


def manager(root, log_to=(), said=None):
    return CheckpointManager("m", root, log_to=log_to, say=(said if said is not None else []).append)


def train(made, first, last, save_at=()):
    """Log each step, and save some."""
    model = torch.nn.Linear(2, 1)
    for step in range(first, last + 1):
        made.log(step, loss=1 / step)
        if step in save_at:
            made.save(model, step=step)


def rows(root):
    with (root / "m/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def lines(root):
    return [json.loads(line) for line in (root / "m/metrics.jsonl").read_text().splitlines()]


def test_values_go_out_when_a_step_as_high_is_committed(tmp_path):
    noted = Noted()
    with manager(tmp_path, [noted]) as made:
        train(made, 1, 5, save_at=[3])
        made.wait()
        assert noted.got == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3})]
        made.log(3, val_loss=7)  # of a step that is committed
        made.wait()
        assert noted.got[3:] == [(3, {"val_loss": 7})]
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 3]
    assert noted.steps() == [1, 2, 3, 3]


def test_a_run_that_was_killed_hands_over_the_rest_when_it_starts_again(tmp_path):
    killed = manager(tmp_path)
    train(killed, 1, 6, save_at=[2, 4])
    killed.wait()  # committed, and handed over to nobody; steps 5 and 6 are lost
    killed.logs.flush(6)  # and no commit
    assert lines(tmp_path)[-1] == {"step": 6, "loss": 1 / 6}
    noted = Noted()
    with manager(tmp_path, [noted, "csv"]) as made:
        pass
    assert noted.steps() == [1, 2, 3, 4]
    with manager(tmp_path, [noted, "csv"]) as made:
        assert made.load(torch.nn.Linear(2, 1)) == 4
        train(made, 5, 8, save_at=[6, 8])
    assert noted.steps() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path)] == [(s, 1 / s) for s in range(1, 9)]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_without_its_record_a_logger_gets_everything_again(tmp_path):
    noted = Noted()
    for text in (None, "{", '{"noted": 3}'):
        if text is not None:
            (tmp_path / "m/.logs.json").write_text(text)
        with manager(tmp_path, [noted, "csv"]) as made:
            made.load(torch.nn.Linear(2, 1))
            train(made, (made.saved_step() or 0) + 1, 3, save_at=[3])
        assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]
    assert noted.steps() == [1, 2, 3] * 3
    (tmp_path / "m/metrics.csv").unlink()
    with manager(tmp_path, [noted, "csv"]):
        pass
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"] and len(noted.got) == 9


def test_after_going_back_later_steps_come_anew(tmp_path):
    noted = Noted()
    with manager(tmp_path, [noted, "csv"]) as made:
        train(made, 1, 8, save_at=[4, 8])
    with manager(tmp_path, [noted, "csv"]) as made:
        made.go_back(4)
        made.load(torch.nn.Linear(2, 1))
        made.log(5, loss=50.0)
    assert [int(row["step"]) for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8], "until a step is committed"
    with manager(tmp_path, [noted, "csv"]) as made:
        made.load(torch.nn.Linear(2, 1))
        made.log(5, loss=50.0)
        made.save(torch.nn.Linear(2, 1), step=5)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)][3:] == [("4", "0.25"), ("5", "50.0")]
    assert noted.got[8:] == [(5, {"loss": 50.0})]


def test_a_loop_that_loads_again_drops_what_it_logged_since(tmp_path):
    noted, model = Noted(), torch.nn.Linear(2, 1)
    with manager(tmp_path, [noted]) as made:
        train(made, 1, 5, save_at=[3])
        assert made.load(model) == 3
        made.log(4, loss=40)
        made.log(np.int64(5), loss=torch.tensor(50.0))
        made.save(model, step=5)
    assert noted.got[3:] == [(4, {"loss": 40}), (5, {"loss": 50.0})]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_csv_has_a_row_a_step_and_a_column_a_value(tmp_path):
    with manager(tmp_path, "csv") as made:
        made.log(1, loss=0.1, note='a "b", c')
        made.save(torch.nn.Linear(2, 1), step=1)
        made.wait()
        made.log(2, loss=math.nan, done=True)
        made.log(1, val_loss=np.float32(2.5))
        made.log(2, rate=None)
        made.save(torch.nn.Linear(2, 1), step=2)
    assert (tmp_path / "m/metrics.csv").read_text() == (
        'step,loss,note,val_loss,done\n1,0.1,"a ""b"", c",2.5,\n2,nan,,,True\n'
    )


def test_csv_drops_half_a_line_of_a_process_that_was_killed(tmp_path):
    with manager(tmp_path, "csv") as made:
        train(made, 1, 3, save_at=[3])
    with (tmp_path / "m/metrics.csv").open("a") as file:
        file.write("4,0.2")
    with manager(tmp_path, "csv") as made:
        made.load(torch.nn.Linear(2, 1))
        train(made, 4, 4, save_at=[4])
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)][2:] == [("3", str(1 / 3)), ("4", "0.25")]


def test_a_run_writes_its_recorded_losses(tmp_path):
    made, model, optimizer = started(tmp_path, log_to="csv")
    fitted((made, model, optimizer), 25, eval_interval=10, save_interval=10)
    made, model, optimizer = started(tmp_path, log_to="csv")
    fitted((made, model, optimizer), 32, eval_interval=10, save_interval=10)
    with (tmp_path / "dante/metrics.csv").open() as file:
        found = {int(row["step"]): row for row in csv.DictReader(file)}
    assert list(found) == list(range(1, 33))
    for name in ("loss", "learning_rate", "grad_norm", "val_loss"):
        assert {step: float(row[name]) for step, row in found.items() if row[name]} == logged(tmp_path / "dante", name)
    assert list(logged(tmp_path / "dante", "val_loss")) == [10, 20, 25, 30, 32]


def test_a_logger_that_raises_is_reported_once_and_gets_the_rest_later(tmp_path):
    noted, said, broken = Noted(), [], True

    def moody(step, **values):
        if broken and step > 1:
            raise SystemExit("no connection")
        noted(step, **values)

    with manager(tmp_path, [moody, "csv"], said) as made:
        train(made, 1, 6, save_at=[2, 4, 6])
        made.wait()
        assert noted.steps() == [1] and made.saved_step() == 6 and len(rows(tmp_path)) == 6
        broken = False
    assert noted.steps() == [1, 2, 3, 4, 5, 6]
    warned = [line for line in said if line.startswith("WARNING")]
    assert len(warned) == 1 and warned[0].endswith(
        "moody: SystemExit: no connection. Training continues; metrics.jsonl has every value, and what this logger "
        "lacks is handed over again after the next save."
    )


def test_a_logger_that_hangs_stops_neither_a_save_nor_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(hand_over, "LIMIT", 0.2)
    go, said, noted = threading.Event(), [], Noted()
    with manager(tmp_path, [lambda step, **_: go.wait(60)], said) as made:
        train(made, 1, 6, save_at=[2, 4, 6])
        made.wait_written()
        assert made.saved_step() == 6
    assert [line for line in said if line.startswith("WARNING")] == [
        f"WARNING: --log {__name__}:{test_a_logger_that_hangs_stops_neither_a_save_nor_the_end.__name__}.<locals>."
        "<lambda>: still at work after 0.2 s. metrics.jsonl has every value, and what a logger lacks is handed over "
        "when the run starts again."
    ]
    go.set()
    with manager(tmp_path, [noted]):
        pass
    assert noted.steps() == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_that_is_repeated_after_a_kill_is_not_logged_twice(tmp_path):
    model = torch.nn.Linear(2, 1)
    for _ in range(2):
        with manager(tmp_path, "csv") as made:
            if not made.load(model):
                train(made, 1, 2, save_at=[2])
            made.log(2, val_loss=3.0)
            made.add_metrics(2, {"val_loss": 3.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 2, "val_loss": 3.0}]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("csv,csv", "csv is given twice, expected each logger once."),
        (["csv", "csv"], "csv is given twice, expected each logger once."),
        (
            "tensorbord",
            "found 'tensorbord', expected csv, tensorboard, wandb or a function as module:function.",
        ),
        ("nowhere:f", "log: nowhere:f: No module named 'nowhere'. Expected module:function, with the module here or "),
        ("math:nothing", "log: math:nothing: module 'math' has no attribute 'nothing'. Expected module:function"),
        ("math:pi", "log: math:pi is of type float, expected a function (step, **values)."),
        ("wandb", "log: wandb is not installed: pip install wandb"),
        ("tensorboard", "log: tensorboard is not installed: pip install tensorboard"),
    ],
)
def test_what_cannot_be_a_logger_is_refused_before_anything_begins(tmp_path, wanted, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        manager(tmp_path, wanted)
    assert str(caught.value).startswith(message) and not (tmp_path / "m").exists()


def test_a_function_is_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "notes_here.py").write_text(
        "got = []\nclass Log:\n    @staticmethod\n    def to(step, **v): got.append(step)"
    )
    monkeypatch.chdir(tmp_path)
    with manager(tmp_path, "notes_here:Log.to") as made:
        train(made, 1, 2, save_at=[2])
    assert sys.modules["notes_here"].got == [1, 2] and str(tmp_path) not in sys.path


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, torch.zeros(2), object()])
def test_only_numbers_and_texts_are_logged(tmp_path, value):
    made = manager(tmp_path)
    with pytest.raises(InputError, match=r"log: loss (is of type|has more than one)"):
        made.log(1, loss=value)
    with pytest.raises(InputError, match="step is -1, expected a whole number"):
        made.log(-1, loss=1.0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--log", "csv"], ("csv",)),
        (["--log", "csv", "--log", "a.b:c,wandb"], ("csv", "a.b:c", "wandb")),
        ([], ()),
    ],
)
def test_the_flag_may_be_repeated(words, expected):
    assert parse(words).log == expected


def test_a_logger_given_twice_on_the_command_line_is_wrong_use(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--log", "csv", "--log", "csv"])
    assert ended.value.code == 2 and "--log: csv is given twice, expected each logger once." in capsys.readouterr().err
