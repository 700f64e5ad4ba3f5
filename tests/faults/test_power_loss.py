from __future__ import annotations

import sys

import pytest

from tests.faults import power_loss


@pytest.mark.slow
@pytest.mark.parametrize("times", [5, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="which folder is fsynced is asked of /proc")
def test_whatever_a_power_loss_leaves_is_read_as_old_or_new_and_the_next_run_finishes_the_job(times, tmp_path, tell):
    tally = power_loss.run(tmp_path, share=power_loss.SHARE * times)
    tell(f"power losses of real folders: {tally}")
    assert tally.losses == []
    assert tally.counts["disk states built and opened"] >= 500 // times
