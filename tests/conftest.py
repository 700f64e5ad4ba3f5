"""What every test may use: the fixtures folder beside the repository, and one torch thread for steady bits."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shared() -> Path:
    """The folder of upstream fixtures and real text, which the repository does not carry."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared with fixtures made by the upstream programs is not here")
    return folder
