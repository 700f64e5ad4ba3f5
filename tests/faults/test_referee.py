from __future__ import annotations

import pytest

from tests.faults import referee


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "points"), [("train", 48), ("rank0", 8), ("rank1", 8), ("hf", 12), ("accelerate", 12), ("lightning", 12)]
)
def test_a_neutral_referee_finds_no_kill_that_costs_one_of_our_trainers_a_committed_step_or_a_bit(
    name, points, tmp_path, tell
):
    if missing := referee.why_not():
        pytest.skip(missing)
    found = referee.judge(name, tmp_path, points)
    tell(f"referee: {referee.TRAINERS[name].title}: {found.points} kills, {dict(found.verdicts)}, {dict(found.apart)}")
    assert found.failures == []
    assert found.points >= points // 2


@pytest.mark.full
@pytest.mark.slow
def test_the_referee_finds_files_that_were_not_made_durable(tmp_path):
    if missing := referee.why_not():
        pytest.skip(missing)
    found = referee.judge("mistaken", tmp_path, 6, modes=("unsynced",))
    assert found.verdicts["PASS"] < found.points == 6
