from __future__ import annotations

import pytest

from tests.faults import killed_runs


@pytest.mark.slow
def test_a_run_that_saves_at_every_step_killed_twenty_times_ends_with_the_bits_of_one_never_killed(tmp_path, tell):
    tally = killed_runs.run(tmp_path)
    tell(f"killed runs: {tally}")
    assert tally.losses == []
    assert tally.counts["kills"] == 20 and tally.counts["steps committed by killed runs"] >= 30
