"""Fabric's loop saves through CheckpointManager as it is: killed and started again it ends with the same bits."""

from __future__ import annotations

import pytest

from tests.makers.adapter_runs import differences, killed, whole

pytest.importorskip("lightning.fabric")
pytestmark = [pytest.mark.full, pytest.mark.slow]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_killed_several_times_ends_with_the_bits_of_one_that_was_not(tmp_path, ranks):
    expected = whole("fabric_run", tmp_path / "whole", "steps=120", ranks=ranks)
    found, _ = killed("fabric_run", tmp_path / "killed", "steps=120", ranks=ranks)
    assert differences(expected, found) == []
