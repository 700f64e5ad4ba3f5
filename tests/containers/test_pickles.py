"""The inert pickle reader: equal values for plain pickles, and nothing executed, ever."""

from __future__ import annotations

import argparse
import collections
import datetime
import math
import pickle
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.containers.pickles.inert import DEPTH, Call, Global, as_text, children
from core.containers.pickles.reader import PickleCutOff, parse_pickle, read_pickle
from core.errors import CheckpointDamaged

PROTOCOLS = range(6)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text() | st.binary()
)
KEYS = st.none() | st.integers(1 - 2**60, 2**60 - 1) | st.text() | st.tuples(st.integers(0, 9), st.text())
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner), max_leaves=30
)


def unpickle(data):
    return read_pickle(data, "x.pkl")


def with_plain_keys(value):
    """The value with tuples for keys: those of the reader have hashes of their own."""
    if isinstance(value, dict):
        return {tuple(k) if isinstance(k, tuple) else k: with_plain_keys(v) for k, v in value.items()}
    return type(value)(map(with_plain_keys, value)) if isinstance(value, (list, tuple)) else value


@given(PLAIN, st.sampled_from(PROTOCOLS))
@settings(max_examples=300, deadline=None)
def test_plain_values_equal_those_of_pickle(value, protocol):
    data = pickle.dumps(value, protocol)
    assert with_plain_keys(unpickle(data)) == value
    assert repr(unpickle(data)) == repr(value)  # 1 and True and 1.0 are equal, and not the same


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sets_ordered_dicts_and_numpy_numbers_become_plain(protocol):
    value = {
        "set": {1, "a"},
        "frozen": frozenset({2}),
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "default": collections.defaultdict(list, {"k": [1]}),
        "f8": np.float64(1.5),
        "f4": np.float32(0.25),
        "i8": np.int64(-7),
        "u2": np.uint16(65535),
        "bool": np.bool_(True),
        "bytes": b"\x00\xff\n",
    }
    assert unpickle(pickle.dumps(value, protocol)) == {**value, "default": {"k": [1]}}


def test_frozenset_and_bytearray_of_new_protocols_are_read():
    assert unpickle(pickle.dumps([frozenset({1, 2}), bytearray(b"abc")], 5)) == [frozenset({1, 2}), b"abc"]


def test_text_of_python_2_is_text_where_it_can_be():
    assert unpickle(b"(lp0\nS'it\\'s \\x41\\n'\np1\naU\x02\xc3\xa9aU\x01\xffa.") == ["it's A\n", "é", b"\xff"]


def test_nanogpt_vocabulary_is_read_as_pickle_reads_it(shared):
    data = (shared / "fixtures" / "nanogpt_char_biasFalse" / "meta.pkl").read_bytes()
    assert unpickle(data) == pickle.loads(data)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unknown_classes_become_records_that_can_be_shown(protocol):
    value = [argparse.Namespace(lr=0.1), datetime.date(2024, 2, 3), math.sqrt]
    namespace, date, sqrt = unpickle(pickle.dumps(value, protocol))
    assert isinstance(namespace, Call) and namespace.state == {"lr": 0.1}
    assert "argparse.Namespace" in as_text(namespace)
    assert as_text(date).startswith("datetime.date(")
    assert as_text(sqrt) == "math.sqrt"


def test_import_of_a_missing_module_is_only_a_name():
    assert unpickle(b"cno_such_module\nThing\n.") == Global("no_such_module", "Thing")


def doubled(levels: int) -> bytes:
    """A list of two references to a list of two references to ..."""
    data = b"]q\x00"
    for i in range(levels):
        data += b"]q" + bytes([i + 1]) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e"
    return data + b"."


TRAPS = {
    "deep through shared parts": (
        b")q\x00" + b"\x85" * 150 + b"q\x01" + b"0h\x01" + b"\x85" * 150 + b"h\x01\x86.",
        f"deeper than {DEPTH} levels",
    ),
    "one terabyte of text": (b"\x8d" + struct.pack("<Q", 1 << 40) + b"abc.", "1099511627776 bytes are asked for, 4 "),
    "memo far away": (b"Nr\xff\xff\xff\xff0Np18446744073709551616\n0h\x07.", "never stored"),
    "copied list": (b"]q\x00(" + b"N" * 900 + b"e0(" + b"cbuiltins\nset\nh\x00\x85R" * 50 + b"l.", "calls copy more"),
    "shared text": (
        b"X\xe8\x03\x00\x00" + b"a" * 1000 + b"q\x00(" + b"h\x00" * 1000 + b"lq\x01(" + b"h\x01" * 99 + b"l.",
        "unfolds to over",
    ),
    "empty": (b"", "ends without STOP"),
    "empty stack": (b".", "takes more from its stack"),
    "call of text": (b"X\x01\x00\x00\x00a)R.", "a call of a str"),
    "list as key": (b"}]Ns.", "a list as a dictionary key"),
    "odd items": (b"}(Nu.", "a key without value"),
    "append to text": (b"NNa.", "items for a NoneType"),
    "items of a number": (b"K\x01(N\x90.", "items for a int"),
    "items of nothing": (b"(u.", "takes more from its stack"),
    "arguments of nothing": (b"ca\nb\nNR.", "arguments in a NoneType"),
    "no quotes": (b"Sx\n.", "a text without quotes"),
    "unknown opcode": (b"\xf0.", "unknown opcode 0xf0"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "persistent id": (b"NQ.", "persistent id"),
    "wrong arguments": (b"c_codecs\nencode\n(NNNtR.", "_codecs.encode with 3 arguments"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps_end_at_once_in_one_sentence(name):
    data, message = TRAPS[name]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointDamaged, match=message) as caught:
            unpickle(data)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert str(caught.value).startswith("x.pkl: ")
    assert peak < 1_000_000 + 500 * len(data)


def test_hash_of_nested_tuple_keys_is_never_computed():
    # 2**200 steps for Python's own hash, which is not cached
    data = b"}(" + b")" + b"2\x86" * 10 + b"Nu."
    (key,) = unpickle(data)
    assert as_text(key).startswith("pickle.key(")


MUTATED = [
    pickle.dumps({"a": [1, 2.5, "x", b"y", None], ("t", 1): {"n": {3}}, "o": argparse.Namespace(k=1)}, p)
    for p in PROTOCOLS
]


def test_pickles_one_after_the_other_are_read_from_where_the_last_one_ended():
    values = [7, {"a": [1, 2]}, "x" * 300, None]
    data = b"".join(pickle.dumps(value, protocol) for value, protocol in zip(values, (0, 2, 4, 5), strict=True))
    position, found = 0, []
    while position < len(data):
        parsed = parse_pickle(data, "x.pkl", position)
        position = parsed.end
        found.append(parsed.value)
    assert found == values


@pytest.mark.parametrize("data", MUTATED)
def test_a_pickle_that_goes_on_behind_the_data_says_so(data):
    for length in range(1, len(data)):
        with pytest.raises(PickleCutOff):
            parse_pickle(b"??" + data[:length], "x.pkl", 2)
    assert parse_pickle(b"??" + data + b"more", "x.pkl", 2).end == 2 + len(data)


def test_what_may_be_copied_grows_with_the_bytes_of_one_pickle_not_of_all():
    trap, message = TRAPS["copied list"]
    with pytest.raises(CheckpointDamaged, match=message):
        parse_pickle(bytes(100_000) + trap + bytes(100_000), "x.pkl", 100_000)


def test_calls_that_the_value_holds_are_not_called_unused():
    data = pickle.dumps([argparse.Namespace(a=datetime.date(2024, 2, 3)), {"k": {math.sqrt}}], 4)
    assert parse_pickle(data, "x.pkl").unused == []


def test_text_stays_on_one_printable_line():
    assert as_text("a\x1b[2J\n\ud800") == '"a\\u001b[2J\\n\\ud800"'
    assert as_text(["x" * 500], 20) == '["xxxxxxxxxxxxxxx...'


class Node:
    """An object of a program."""


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_any_graph_of_values_becomes_a_tree_that_loses_only_its_cycles(size, edges):
    nodes = [Node() for _ in range(size)]
    for number, node in enumerate(nodes):
        node.number, node.held = number, []
    for begin, end, kind in edges:
        target = nodes[end % size]
        held = [target, (target, (target,)), {"k": target}, {target}, [frozenset([target])]][kind]
        nodes[begin % size].held.append(held)
    found = read_pickle(pickle.dumps(nodes[0]), "x.pkl")

    def numbers(value: Any, above: tuple[int, ...] = ()) -> set[int]:
        assert id(value) not in above
        mine = {value.state["number"]} if isinstance(value, Call) and value.state else set()
        return mine.union(*(numbers(child, (*above, id(value))) for child in children(value) or () if child != ()))

    reached, pending = set(), [0]
    while pending:
        number = pending.pop()
        if number not in reached:
            reached.add(number)
            pending += [end % size for begin, end, _ in edges if begin % size == number]
    assert numbers(found) == reached
    assert len(as_text(found)) <= 200
