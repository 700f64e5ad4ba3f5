from __future__ import annotations

import pytest

from tests.faults import random_lives


@pytest.mark.slow
def test_after_every_step_of_a_random_life_the_promises_hold(tmp_path, tell):
    tally = random_lives.run(tmp_path)
    tell(f"random lives: {tally}")
    assert tally.losses == []
    assert min(tally.counts[what] for what in ("saves", "kills", "corruptions", "edits", "goings back", "prunes")) > 0
