"""The fixtures that conversions start from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def fixtures(shared) -> Path:
    """What the upstream programs wrote."""
    return shared / "fixtures"


@pytest.fixture
def nanogpt(fixtures) -> Path:
    """A checkpoint of nanoGPT, with its characters."""
    return fixtures / "nanogpt_char_biasFalse"


@pytest.fixture
def hf(fixtures) -> Path:
    """GPT-2 in a folder of transformers."""
    return fixtures / "hf_gpt2"
