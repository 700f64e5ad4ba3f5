from __future__ import annotations

import pytest

from tests.faults import readers


@pytest.mark.slow
def test_every_load_beside_200_saves_is_one_whole_step(tmp_path, tell):
    tally = readers.run(tmp_path)
    tell(f"readers: {tally}")
    assert tally.losses == []
    assert tally.counts["saves beside them"] == readers.SAVES
    assert tally.counts["loads"] >= 20
    assert tally.counts["different steps seen"] >= 10
