from __future__ import annotations

from tests.faults import damage


def test_of_500_flips_100_cuts_and_100_exchanged_files_none_is_used_in_silence(tmp_path, tell):
    tally = damage.run(tmp_path)
    tell(f"damage (seed {damage.SEED}): {tally}")
    assert tally.losses == []
    assert [tally.counts[kind] for kind in ("flips", "cuts", "exchanges")] == [500, 100, 100]
