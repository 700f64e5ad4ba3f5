"""What all tests of adapters share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def own_generator():
    """Leave torch's generator as it was."""
    with torch.random.fork_rng():
        yield
