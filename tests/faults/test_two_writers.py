"""Writers that take the lock lose nothing of each other, in whatever order they come and wherever they are killed."""

from __future__ import annotations

import pytest

from tests.faults import two_writers
from tests.faults.crash_model import MODES
from tests.faults.explorer import Fault
from tests.faults.two_writers import World


@pytest.mark.parametrize("mode", MODES)
def test_a_second_writer_that_begins_at_any_call_of_the_first_waits_and_both_steps_are_there(mode):
    assert two_writers.second_at_every_call(mode) >= 40


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
def test_two_writers_killed_at_any_pair_of_calls_leave_a_whole_step(mode):
    assert two_writers.both_killed_at_every_call(mode) >= 1600


@pytest.mark.parametrize("number", [200, pytest.param(5000, marks=pytest.mark.full)])
def test_three_writers_in_random_orders_killed_and_without_power_lose_nothing(number, tell):
    counts = two_writers.random_schedules(number, seed=20261130)
    tell(f"random schedules: {dict(counts)}")
    assert counts["schedules"] == number and counts["kills"] > number / 2 and counts["power losses"] > number / 5


def test_the_checker_finds_a_lock_that_lets_two_in(monkeypatch):
    monkeypatch.setattr(World, "runnable", lambda self: [writer for writer in self.writers if not writer.ended])
    with pytest.raises(Fault):
        two_writers.random_schedules(200, seed=1)
