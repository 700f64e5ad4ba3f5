from __future__ import annotations

import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.containers import checksum


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combining_equals_the_crc_of_both_pieces_joined(a, b):
    assert checksum.combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@pytest.mark.parametrize("positioned", [True, False], ids=["pread", "seek and read"])
@pytest.mark.parametrize("size", [0, 1, 5_000_000, 40_000_001])
def test_a_file_is_summed_on_all_processors_to_the_same_value(tmp_path, monkeypatch, size, positioned):
    monkeypatch.setattr(checksum, "POSITIONED_READS", positioned)
    data = os.urandom(1 << 20) * (size // (1 << 20) + 1)
    path = tmp_path / "data"
    path.write_bytes(data[:size])
    with path.open("rb") as file:
        assert checksum.crc32_file(file.fileno(), size) == zlib.crc32(data[:size])
