"""JSON objects on disk: read with duplicate keys refused, written indented for people."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, BinaryIO

from ..console.files import LARGEST
from ..errors import CheckpointDamaged, InputError
from .blocks import read_whole
from .pickles.inert import DEPTH, SLACK
from .trees import map_leaves, map_paths

_SPLIT_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
"""Both halves of a surrogate pair as two characters: JSON would make one character of them."""

_BYTES_OF_LIST = 10
"""Bytes of JSON to each list or object; a pair of two characters, as in a tokenizer's merges, takes as many."""


def read_json(file: BinaryIO, where: str) -> dict[str, Any]:
    """Read a JSON object from a file of at most LARGEST bytes.

    Raises: CheckpointDamaged when it is larger, or as `parse_json`.
    """
    return parse_json(read_whole(file, LARGEST, where), where)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; a duplicate key is refused, because readers disagree on which one counts.

    Raises: CheckpointDamaged with the position where parsing failed, or when it is nested deeper than DEPTH, or made of
        more lists and objects than files that hold something.
    """
    inner, most = data.count(b"[") + data.count(b"{"), SLACK + len(data) // _BYTES_OF_LIST
    if inner > most:
        raise CheckpointDamaged(f"{where}: its JSON has over {most} lists and objects, too many for {len(data)} bytes.")
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where}: {len(data)} bytes that are not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointDamaged(f"{where}: found a JSON {type(values).__name__}, expected an object.")
    if inner > DEPTH and _too_deep(values):
        raise CheckpointDamaged(f"{where}: its JSON is nested deeper than {DEPTH} levels.")
    return values


def _too_deep(values: dict[str, Any]) -> bool:
    level: list[Any] = [values]
    for _ in range(DEPTH):
        inner = (value.values() if type(value) is dict else value for value in level)
        level = [child for held in inner for child in held if type(child) is dict or type(child) is list]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:80]!r} occurs {times} times")
    return values


def dump_json(values: dict[str, Any]) -> bytes:
    """Format a JSON object for people: indented, one entry a line; half of a surrogate pair is written as its escape.

    Raises: InputError naming the entry that JSON cannot hold.
    """
    try:
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{_unwritable(values) or error}. It is written as JSON.") from error
    try:
        return text.encode()
    except UnicodeEncodeError:
        if _SPLIT_PAIR.search(text):
            raise InputError(f"{_unwritable(values)}. It is written as JSON.") from None
        return text.encode(errors="backslashreplace")  # \udce9, which is its escape in JSON as well


def _unwritable(values: dict[str, Any]) -> str:
    """The first entry that JSON cannot hold, in a sentence; "" when a key is at fault."""
    found: list[str] = []

    def look(path: str, value: Any) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{path} is {value}, expected a finite number")
        elif isinstance(value, str) and _SPLIT_PAIR.search(value):
            found.append(f"{path} is {value!r}, which has the two halves of one character as two characters")
        elif value is not None and not isinstance(value, (str, int, float)):
            found.append(f"{path} is a {type(value).__name__}, which is not JSON serializable")

    try:
        map_paths(look, values)
    except RecursionError:
        return "it is nested too deeply"
    return found[0] if found else ""


NUMBER = "__number__"
"""The key of an object that stands for a number that JSON has not: nan, inf or -inf, as text."""


def without_infinities(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy values with objects in the place of numbers that JSON has not."""

    def said(value: Any) -> Any:
        is_float = isinstance(value, float) and not math.isfinite(value)  # NumPy's double is one too
        return {NUMBER: repr(float(value))} if is_float else value

    return map_leaves(said, values)


def with_infinities(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy values as they were before `without_infinities`."""

    def made(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {NUMBER} and value[NUMBER] in ("nan", "inf", "-inf"):
                return float(value[NUMBER])
            return {key: made(item) for key, item in value.items()}
        return [made(item) for item in value] if isinstance(value, list) else value

    return {key: made(value) for key, value in values.items()}
