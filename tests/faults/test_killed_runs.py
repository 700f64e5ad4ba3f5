from __future__ import annotations

import pytest

from tests.faults import killed_runs


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(3, 60), pytest.param(20, 500, marks=pytest.mark.full)])
def test_a_run_that_saves_at_every_step_killed_often_ends_with_the_bits_of_one_never_killed(
    kills, steps, tmp_path, tell
):
    tally = killed_runs.run(tmp_path, kills, steps)
    tell(f"killed runs: {tally}")
    assert tally.losses == []
    assert tally.counts["kills"] == kills and tally.counts["steps committed by killed runs"] >= kills
