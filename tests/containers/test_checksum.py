from __future__ import annotations

import os
import random
import sys
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.containers import checksum
from core.containers.checksum import LARGE, _fastest, crc32


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


@pytest.fixture
def chosen():
    """Forget which library was found, before and after."""
    _fastest.cache_clear()
    yield _fastest
    _fastest.cache_clear()


def test_without_the_faster_library_zlib_sums(monkeypatch, chosen):
    monkeypatch.setitem(sys.modules, "zlib_ng", None)
    assert chosen() is zlib.crc32
    data = os.urandom(2 * LARGE)
    assert crc32(data[LARGE:], crc32(data[:LARGE])) == zlib.crc32(data)


def test_a_small_piece_imports_nothing(chosen):
    assert crc32(b"123456789") == 0xCBF43926 and chosen.cache_info().currsize == 0


@pytest.mark.full
@settings(max_examples=300, deadline=None)
@given(length=st.integers(0, 3 * LARGE), start=st.integers(0, 64), before=st.integers(0, 2**32 - 1))
def test_the_faster_library_gives_the_values_of_zlib_for_every_length_and_alignment(length, start, before):
    pytest.importorskip("zlib_ng")
    _fastest.cache_clear()
    assert _fastest() is not zlib.crc32
    data = memoryview(NOISE)[start : start + length]
    assert crc32(data, before) == _fastest()(data, before) == zlib.crc32(data, before)


NOISE = random.Random(5).randbytes(3 * LARGE + 64)
