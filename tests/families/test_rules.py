"""Every rule against numpy, its inverse against itself, and every table as a bijection."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.containers.tensors.reading import Gatherer
from core.containers.tensors.views import concatenate, filled, merge_axes, permute, slice_axis, split_axis
from core.errors import CheckpointMismatch
from core.families.hf_gpt2 import HF_GPT2
from core.families.lecture import LECTURE
from core.families.nanogpt import NANOGPT
from core.families.rules import (
    RENAME,
    TRANSPOSE,
    Chain,
    Concat,
    Halves,
    Interleave,
    Inverse,
    Merge,
    Permute,
    Stack,
    apply,
)
from tests.makers.conversions import Scratch, read

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
side = st.integers(1, 5)


def numbers(rng, *shape):
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


@pytest.fixture
def scratch(tmp_path):
    return Scratch(tmp_path / "scratch")


@many
@given(st.tuples(side, side, side, side), st.permutations(range(4)), st.integers(0, 2**32))
def test_views_rearrange_as_numpy_does(scratch, shape, axes, seed):
    rng = np.random.default_rng(seed)
    array = numbers(rng, *shape)
    view = scratch.put("a", array)
    assert (read(permute(view, axes)) == array.transpose(axes)).all()
    moved, expected = permute(view, axes), array.transpose(axes)
    axis = int(rng.integers(4))
    low = int(rng.integers(expected.shape[axis]))
    high = int(rng.integers(low, expected.shape[axis])) + 1
    assert (read(slice_axis(moved, axis, low, high)) == expected.take(range(low, high), axis)).all()
    other = numbers(rng, *shape)
    both = concatenate([moved, permute(scratch.put("b", other), axes)], axis)
    assert (read(both) == np.concatenate([expected, other.transpose(axes)], axis)).all()
    for k in range(3):
        fused = np.concatenate([expected, other.transpose(axes)], axis)
        merged = merge_axes(both, k)
        assert (read(merged) == fused.reshape(merged.shape)).all()
        assert (read(split_axis(merged, k, both.shape[k + 1])) == fused).all()


def test_large_tensors_of_every_order_are_put_in_place(scratch, monkeypatch):
    rng = np.random.default_rng(0)
    for slab in (8 << 20, 40_000):  # read at once, and a slab at a time
        monkeypatch.setattr("core.containers.tensors.reading.SLAB", slab)
        for shape, axes in (((301, 257), (1, 0)), ((5, 300, 170), (2, 0, 1)), ((300, 3, 170), (2, 1, 0))):
            array = numbers(rng, *shape)
            view = permute(scratch.put("a", array), axes)
            assert (read(view) == array.transpose(axes)).all()
            part, expected = slice_axis(view, 1, 1, view.shape[1]), array.transpose(axes)[:, 1:]
            assert (read(part) == expected).all()
            assert (read(slice_axis(part, 0, 7, 8)) == expected[7:8]).all()


def test_pieces_are_as_large_as_asked_for_wherever_blocks_end(scratch):
    rng = np.random.default_rng(0)
    arrays = [numbers(rng, rows, 7) for rows in (3, 1, 5)]
    parts = [scratch.put(str(k), array) for k, array in enumerate(arrays)]
    whole = concatenate([*parts, filled("float32", (2, 7), 1.5)])
    expected = np.concatenate([*arrays, np.full((2, 7), 1.5, "f4").view("u4")]).tobytes()
    for view in (whole, permute(permute(whole, (1, 0)), (1, 0))):
        for size in (40, 280, 308, 1000):
            with Gatherer() as gatherer:
                pieces = [piece.tobytes() for piece in gatherer.pieces(view, size)]
            assert b"".join(pieces) == expected
            assert {len(piece) for piece in pieces[:-1]} <= {size} and len(pieces[-1]) <= size


def test_a_transposed_tensor_of_more_files_than_are_held_open(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr("core.containers.tensors.reading._LARGE", 0)
    arrays = [numbers(rng, 3, 5) for _ in range(7)]
    parts = [Scratch(tmp_path / f"s{k}").put("a", array) for k, array in enumerate(arrays)]
    expected = np.concatenate(arrays).T
    for most in (2, 7, 64):
        monkeypatch.setattr("core.containers.tensors.reading._MOST_OPEN", most)
        with Gatherer() as gatherer:
            for view in (*parts[:3], permute(concatenate(parts), (1, 0))):
                data = b"".join(piece.tobytes() for piece in gatherer.pieces(view))
            assert len(gatherer._files) <= most
        assert (np.frombuffer(data, "u4").reshape(expected.shape) == expected).all()


@many
@given(st.data())
def test_each_rule_and_its_inverse_give_the_same_bytes_back(scratch, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    count, groups, per, width, size = (data.draw(side) for _ in range(5))
    sizes = {"n_kv_head": groups, "q_size": groups * per * size, "kv_size": groups * size, "p": 2, "n_head": count}
    shapes = [(per * size * groups, width), (size * groups, width), (size * groups, width)]
    equal = [(size, width)] * count
    cases = [
        (RENAME, [(size, width)], 1),
        (TRANSPOSE, [(size, width)], 1),
        (Permute((2, 0, 1)), [(size, width, per)], 1),
        (Concat(0), equal, 1),
        (Concat(1), equal, 1),
        (Concat(0, ("q_size", "kv_size", "kv_size")), shapes, 1),
        (Stack(0), equal, 1),
        (Stack(2), equal, 1),
        (Interleave(), shapes, 1),
        (Chain((Permute((0, 2, 3, 1)), Merge(2, "c"), Merge(1, "pc"))), [(size, 3, per, 2)], 1),
        (Inverse(Concat(0)), [(size * count, width)], count),
    ]
    sizes |= {"c": 3, "pc": 6}
    for rule, given_shapes, made in cases:
        arrays = [numbers(rng, *shape) for shape in given_shapes]
        views = [scratch.put(f"t{k}", array) for k, array in enumerate(arrays)]
        there = rule.forward(views, sizes, made)
        assert len(there) == made, rule
        back = rule.inverse(there, sizes, len(arrays))
        assert [(read(view) == array).all() for view, array in zip(back, arrays, strict=True)] == [True] * len(arrays)
        assert str(rule)


def test_interleaving_puts_query_heads_before_the_key_and_value_they_share(scratch):
    q, k, v = (np.arange(n, dtype=np.uint32).reshape(-1, 1) + first for n, first in ((8, 0), (4, 100), (4, 200)))
    views = [scratch.put(name, array) for name, array in zip("qkv", (q, k, v), strict=True)]
    sizes = {"n_kv_head": 2, "q_size": 8, "kv_size": 4}
    (made,) = Interleave().forward(views, sizes, 1)
    assert read(made)[:, 0].tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


def test_fills_are_read_like_any_tensor(scratch):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    view = scratch.put("a", array)
    padded = concatenate([view, filled("float32", (3, 3))])
    assert (read(padded).view(np.float32) == np.concatenate([array, np.zeros((3, 3), np.float32)])).all()
    assert (read(permute(padded, (1, 0))).view(np.float32)[:, :2] == array.T).all()
    assert (read(filled("float32", (4,), 0.5)).view(np.float32) == 0.5).all() and filled("float32", (4,)).is_constant


TABLES = {"nanogpt": NANOGPT, "hf_gpt2": HF_GPT2, "lecture": LECTURE}


@many
@pytest.mark.parametrize("name", TABLES)
@given(st.data())
def test_every_table_is_a_bijection(scratch, name, data):
    """Sizes, biases, tying: what goes there and back is the same under the same names, bit for bit."""
    table = TABLES[name]
    layers, heads, size = (data.draw(st.integers(1, 3)) for _ in range(3))
    absent = data.draw(st.sets(st.sampled_from([row for row in table if "bias" in row[1] or "head" in row[1]])))
    spelling = data.draw(st.sampled_from([".ffwd.", ".fwd."]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    sizes = {"n_head": heads, "n_layer": layers}
    arrays = {}
    for row in table:
        theirs = row[0] if isinstance(row[0], tuple) else (row[0],)
        if row in absent or (name == "lecture" and "net" in theirs[0] and spelling not in theirs[0]):
            continue
        for i in range(layers) if "{i}" in theirs[0] else (0,):
            for one in theirs:
                for j in range(heads) if "{j}" in one else (0,):
                    shape = (size, 2) if "weight" in one and ".ln" not in one else (size,)
                    arrays[one.replace("{i}", str(i)).replace("{j}", str(j))] = numbers(rng, *shape)
    views = {key: scratch.put(key, array) for key, array in arrays.items()}
    there = apply(table, views, sizes)
    assert there.unused == []
    back = apply(there.rows.values(), there.tensors, sizes, back=True)
    assert back.unused == [] and back.tensors.keys() == arrays.keys()
    assert all((read(back.tensors[key]) == array).all() for key, array in arrays.items())
    again = apply(there.rows.values(), back.tensors, sizes)
    assert all((read(again.tensors[key]) == read(view)).all() for key, view in there.tensors.items())


def test_what_does_not_fit_is_said_with_names(scratch):
    def error(table, tensors, sizes=None, back=False):
        with pytest.raises(CheckpointMismatch) as caught:
            apply(table, tensors, sizes or {}, back)
        return str(caught.value)

    a, b = scratch.put("a", np.zeros((3, 2), np.uint32)), scratch.put("b", np.zeros((3, 2), np.uint16), "float16")
    assert error([(("a", "b"), "c", Concat())], {"a": a}) == "b is missing, c is made of it and a"
    assert error([(("a", "b"), "c", Concat())], {"a": a, "b": b}).startswith("b and a have different dtypes")
    assert error([("a", "c", RENAME), ("b", "c", RENAME)], {"a": a, "b": b}) == "c is made twice, the second time of b"
    assert "3 rows cannot be cut into 2 groups" in error([(("a",), "c", Interleave())], {"a": a}, {"n_kv_head": 2})
    assert "n_kv_head" in error([(("a",), "c", Interleave())], {"a": a})
    unfit = error([(("a", "b"), "c", Concat())], {"c": a}, back=True)
    assert "3 along axis 0 cannot be split into [1, 1]" in unfit


@pytest.mark.parametrize(
    ("row", "sizes", "back", "said"),
    [
        (
            (("q", "k", "v"), "qkv", Interleave("n_kv_head", ("q_size", "kv_size", "kv_size"))),
            {"n_kv_head": 2, "q_size": 4, "kv_size": 2},
            True,
            r"q cannot be made of qkv \(6, 3\) .*: 6 rows are not 2 groups of 2 \+ 1 \+ 1",
        ),
        (("a", ("b", "c"), Concat(0)), {}, False, "a gives 1 tensors, expected 2"),
    ],
)
def test_what_a_rule_cannot_make_is_named_with_its_shapes(scratch, row, sizes, back, said):
    name = row[1] if back else row[0]
    tensors = {name: scratch.put(name, np.zeros((6, 3), dtype=np.uint32))}
    with pytest.raises(CheckpointMismatch, match=said):
        apply((row,), tensors, sizes, back)


@many
@given(st.data())
def test_pairs_of_heads_become_halves_and_come_back(scratch, data):
    heads, half, width, bias = data.draw(side), data.draw(side), data.draw(side), data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    arrays = [numbers(rng, *((heads * 2 * half,) if bias else (heads * 2 * half, width))) for _ in range(3)]
    views, sizes, rule = [scratch.put("a", array) for array in arrays], {"head_size": 2 * half}, Halves(2)
    made = rule.forward(views, sizes, 3)
    for array, view in zip(arrays[:2], made, strict=False):
        pairs = array.reshape(heads, half, 2, -1)
        assert (read(view) == pairs.swapaxes(1, 2).reshape(array.shape)).all()
    assert (read(made[2]) == arrays[2]).all()
    assert all((read(view) == array).all() for view, array in zip(rule.inverse(made, sizes, 3), arrays, strict=True))
    with pytest.raises(CheckpointMismatch, match="cannot be cut into heads of pairs"):
        rule.forward(views, {"head_size": 2 * half + 1}, 3)
