"""On mounts that refuse what a plain disk allows, nothing is lost either."""

from __future__ import annotations

import pytest

from tests.faults import mounts


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("kind", mounts.KINDS)
def test_killed_on_a_mount_a_reader_finds_old_or_new_and_the_next_run_finishes_the_job(kind, tmp_path, tell):
    if why := mounts.lacking(kind):
        pytest.skip(why)
    tally = mounts.killed_on(kind, tmp_path, 4)
    tell(f"{kind}: {tally}")
    assert tally.losses == []
    assert tally.counts["kill points"] >= 40
