from __future__ import annotations

import pytest

from tests.faults import readers


@pytest.mark.slow
@pytest.mark.parametrize("saves", [60, pytest.param(readers.SAVES, marks=pytest.mark.full)])
def test_every_load_beside_many_saves_is_one_whole_step(tmp_path, tell, saves):
    tally = readers.run(tmp_path, saves)
    tell(f"readers: {tally}")
    assert tally.losses == []
    assert tally.counts["saves beside them"] == saves
    assert tally.counts["loads"] >= saves // 10
    assert tally.counts["different steps seen"] >= saves // 20
