"""A rebuilt `.metadata` is exact or refused: for any shapes, numbers of ranks, and orders of writing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.containers.dcp.folder import open_dcp
from core.containers.dcp.rebuilt import rebuild
from core.errors import CheckpointMismatch
from tests.makers.containers import assert_same
from tests.makers.dcp_folders import lost, write_ranks

SHAPES = st.lists(st.sampled_from([(1,), (2,), (3,), (5,), (1, 2), (2, 1), (2, 2), (4, 2), (8,), (6, 1)]), min_size=1)


def model(shapes: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, no two elements equal."""
    made, at = {}, 0
    for k, shape in enumerate(shapes):
        count = torch.Size(shape).numel()
        made[f"t{k}"] = torch.arange(at, at + count, dtype=torch.float32).reshape(shape)
        at += count
    return made


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 4), st.booleans())
def test_names_in_order_give_the_model_or_nothing(shapes, ranks, by_size):
    tensors = model(shapes)
    with tempfile.TemporaryDirectory() as place:
        folder = lost(write_ranks(Path(place) / "dcp", tensors, ranks, by_size))
        torch.save(tensors, Path(place) / "like.pt")
        try:
            metadata = rebuild(folder, Path(place) / "like.pt")
        except CheckpointMismatch as refusal:
            assert "does not account for every item" in str(refusal)
            return
        assert_same(open_dcp(folder, metadata), tensors)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(1, 4), st.booleans())
def test_a_folder_of_equal_layout_always_gives_the_model(shapes, ranks, by_size):
    tensors = model(shapes)
    with tempfile.TemporaryDirectory() as place:
        folder = lost(write_ranks(Path(place) / "dcp", tensors, ranks, by_size))
        like = write_ranks(Path(place) / "like", {name: -t for name, t in tensors.items()}, ranks, by_size)
        container = open_dcp(folder, rebuild(folder, like))
        assert_same(container, tensors)
        assert [note for note in container.notes if "belong to no item" in note] == []
