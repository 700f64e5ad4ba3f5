from __future__ import annotations

import os

import pytest

from core.errors import SaveFailed
from tests.faults import full_disk
from tests.makers.models import save_durably, started, train_and_save, update


@pytest.mark.skipif(bool(full_disk.why_not()), reason=str(full_disk.why_not()))
def test_a_disk_that_is_full_or_read_only_is_said_keeps_the_last_step_and_the_next_save_works(tmp_path, tell):
    tally = full_disk.run(tmp_path)
    tell(f"real disks: {tally}")
    assert tally.losses == []
    assert tally.counts["saves that did not fit"] >= 4 and tally.counts["saves that fitted"] >= 1
    assert tally.counts["writes refused"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said(tmp_path):
    made, model, optimizer = started(tmp_path)
    train_and_save(made, model, optimizer, 1)
    update(model, optimizer)
    (tmp_path / "dante").chmod(0o555)
    try:
        with pytest.raises(SaveFailed, match=r"save of step 2 failed: Permission denied .* Step 1 is intact\."):
            save_durably(made, model, optimizer, step=2)
    finally:
        (tmp_path / "dante").chmod(0o755)
