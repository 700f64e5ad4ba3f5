from __future__ import annotations

import pytest

from tests.faults import failing_calls


@pytest.mark.slow
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.full)])
def test_any_storage_call_that_fails_is_said_in_a_sentence_keeps_what_was_there_and_the_next_save_works(
    every, tmp_path, tell
):
    tally = failing_calls.run(tmp_path, every=every)
    tell(f"failing calls: {tally}")
    assert tally.losses == []
    assert tally.counts["injected errors"] >= 780 // every
