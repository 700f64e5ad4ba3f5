"""A small vocabulary of tiktoken: the first ranks of GPT-2's, with a pattern and special tokens as Llama 3 has them."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest

from core.bundle.vocabularies import LLAMA3, VOCABULARIES
from core.data.gpt2_ranks import read_ranks

SMALL = replace(LLAMA3, name="small", whose="Small", count=600, special=("<|begin_of_text|>", "<|end_of_text|>"))


def known(monkeypatch: pytest.MonkeyPatch, shared: Path) -> dict[bytes, int]:
    """Make the small vocabulary a known one; returns its ranks."""
    monkeypatch.setitem(VOCABULARIES, "small", SMALL)
    found = read_ranks(shared / "data/gpt2.tiktoken")
    return {token: rank for token, rank in found.items() if rank < SMALL.count}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """Write ranks as tiktoken does."""
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))
