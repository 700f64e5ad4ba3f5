"""A file read into memory and summed on the way: its bytes, its sums, and where that cannot be."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import core.containers.filled
from core.containers.filled import fill


def filled(path: Path, spans, size=None):
    with path.open("rb") as file:
        return fill(file.fileno(), path.stat().st_size if size is None else size, spans)


@given(st.data())
def test_bytes_and_sums_are_those_of_the_file(tmp_path_factory, data):
    share = data.draw(st.integers(1, 40), label="share")
    content = data.draw(st.binary(min_size=1, max_size=300), label="content")
    edges = sorted(data.draw(st.sets(st.integers(0, len(content)), max_size=8), label="edges"))
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    path = tmp_path_factory.mktemp("filled") / "file"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.containers.filled, "_SHARE", share)
        patch.setattr(core.containers.filled, "CHUNK", data.draw(st.integers(1, 20), label="chunk"))
        found = filled(path, spans)
    assert bytes(found.memory) == content and found.crc32 == zlib.crc32(content)
    assert {span: found.sums[span] for span in spans} == {(a, b): zlib.crc32(content[a:b]) for a, b in spans}


def test_nothing_is_filled_without_positioned_reads_memory_or_the_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert filled(path, [], size=101) is None, "it was cut meanwhile"
    assert filled(path, [], size=1 << 60) is None, "more than there is of addresses"
    assert bytes(filled(path, []).memory) == b"x" * 100
    for free, fits in ((199, False), (200, True), (0, False)):
        monkeypatch.setattr(core.containers.filled, "free_memory", lambda free=free: free)
        assert (filled(path, []) is not None) is fits
    monkeypatch.setattr(core.containers.filled, "POSITIONED_READS", False)
    assert filled(path, []) is None
