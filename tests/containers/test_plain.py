"""Content as JSON: written as `json.dumps` writes it with an indent, and cut where it would be endless."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from core.containers.plain import ROOM, Room, plain, write_plain

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(), inner, max_size=12),
    max_leaves=60,
)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_json_is_written_as_with_an_indent(value):
    parts: list[str] = []
    write_plain(value, parts.append)
    assert "".join(parts) == json.dumps(value, indent=2, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_json_values_stay_as_they_are(value):
    assert plain({"a": value}) == {"a": value}


def test_numbers_that_json_lacks_are_texts_in_lists_of_any_length():
    for count in (1, 100):
        assert plain({"a": [float("inf")] * count}) == {"a": ["inf"] * count}


def test_a_list_beyond_the_room_is_cut_and_says_how_much_is_missing():
    found = plain({"a": [1] * (ROOM // 2)}, room=Room(0))["a"]
    shown = len(found) - 1
    assert found[-1] == f"{ROOM // 2 - shown} more, left out: they would take more room than the files"
    assert len(json.dumps({"a": found}, indent=2)) < 1.01 * ROOM
