"""A signal between two micro-steps of an accumulation: the step is finished and saved whole, never half of one."""

from __future__ import annotations

import json
import signal

import pytest

from core.training.fit import fit
from core.training.schedule import Schedule
from tests.makers.models import started, state_of
from tests.training.test_resume import best, bits, loader, losses, same

WINDOW = 4


class Interrupting:
    """A loader that gets its own process a signal while it gives one micro-step of one step."""

    def __init__(self, step, micro, number):
        self.loader, self.at, self.number = loader(), (step, micro), number
        self.given = []

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def batch(self, step, micro=0, *rows):
        self.given.append((step, micro))
        if self.at == (step, micro) and self.given.count(self.at) == 1:
            signal.raise_signal(self.number)
        return self.loader.batch(step, micro, *rows)


def go_on(root, end, data):
    made, model, optimizer = started(root, "killed")
    with made:
        return fit(
            model, data_loader=data, optimizer=optimizer, max_iters=end, manager=made, progress=False,
            schedule=Schedule("cosine", 1e-2, 3, 12), eval_interval=3, eval_iters=2, gradient_accumulation_steps=WINDOW,
        )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("micro", [0, 2, WINDOW - 1])
def test_a_signal_in_mid_window_finishes_the_step_and_the_run_goes_on_to_the_same_bits(
    tmp_path, one_thread, capsys, number, micro
):
    go_on(tmp_path / "whole", 9, loader())
    data = Interrupting(4, micro, number)
    stopped = go_on(tmp_path / "cut", 9, data)
    assert (stopped.step, stopped.stopped_by) == (5, number.name)
    assert state_of(tmp_path / "cut/killed")["step"] == 5, "saved where the window ends, not in its middle"
    assert [m for s, m in data.given if s == 4] == list(range(WINDOW))
    assert state_of(tmp_path / "cut/killed")["tokens_seen"] == 5 * WINDOW * 4 * 16
    capsys.readouterr()
    assert go_on(tmp_path / "cut", 9, loader()).stopped_by is None
    assert capsys.readouterr().err.startswith("resume is exact\n")
    assert same(bits(tmp_path / "whole/killed"), bits(tmp_path / "cut/killed"))
    assert losses(tmp_path / "whole", "killed") == losses(tmp_path / "cut", "killed")
    assert best(tmp_path / "whole") == best(tmp_path / "cut")
    rates = [
        {
            line["step"]: line["learning_rate"]
            for line in map(json.loads, log.read_text().splitlines())
            if "loss" in line
        }
        for log in (tmp_path / "whole/killed/metrics.jsonl", tmp_path / "cut/killed/metrics.jsonl")
    ]
    assert rates[0] == rates[1] and len(set(rates[0].values())) == 9
