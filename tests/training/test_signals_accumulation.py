"""A signal between two micro-steps of an accumulation: the step is finished and saved whole, never half of one."""

from __future__ import annotations

import signal

import pytest

from core.training.schedule import Schedule
from tests.makers.models import started, state_of
from tests.makers.runs import best, bits, fitted, loader, logged, losses, same

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
    curve = Schedule("cosine", 1e-2, 3, 12)
    how = {"eval_interval": 3, "eval_iters": 2, "gradient_accumulation_steps": WINDOW}
    return fitted(started(root, "killed"), end, data_loader=data, schedule=curve, **how)


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
    rates = [logged(tmp_path / run / "killed", "learning_rate") for run in ("whole", "cut")]
    assert rates[0] == rates[1] and len(set(rates[0].values())) == 9
