"""Read and write a YAML file that is a flat mapping, as litgpt's configs are; anything else in YAML is refused.

A value is a scalar, a list of scalars, or a mapping of scalars, each in a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .pickles.inert import as_text

_ENTRY = re.compile(r"(  )?([A-Za-z_]\w*):(?: (.*))?")
_WORD = re.compile(r"[A-Za-z_/][\w.+/ ()-]*")
_INT, _FLOAT = re.compile(r"[-+]?(?:0|[1-9]\d{0,17})"), re.compile(r"[-+]?\d+\.\d*(?:[eE][-+]?\d+)?")
_OTHER_CONSTANTS = {"yes", "no", "on", "off", "y", "n", "true", "false", "null"}
"""Words, in any case, that YAML does not read as text."""

_CONSTANTS: dict[str, Any] = {"null": None, "~": None, "true": True, "false": False, "{}": {}, "[]": []}


def parse_flat_yaml(data: bytes, where: str) -> dict[str, Any]:
    """The entries of a flat mapping.

    Raises: CheckpointError naming the first line that is none of one.
    """
    found: dict[str, Any] = {}
    last = ""  # the entry above, whose value may follow in lines of its own
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        text = line.rstrip()
        if not text or text.startswith("#"):
            continue
        try:
            if text.startswith("- ") and last and isinstance(found[last], (list, type(None))):
                found[last] = [*(found[last] or []), _scalar(text[2:])]
                continue
            match = _ENTRY.fullmatch(text)
            if match is None or (match[1] and not (last and isinstance(found[last], (dict, type(None))))):
                raise ValueError
            value = None if match[3] is None else _scalar(match[3])
            if match[1]:
                found[last] = {**(found[last] or {}), match[2]: value}
            elif match[2] in found:
                raise ValueError
            else:
                found[match[2]], last = value, match[2] if match[3] is None else ""
        except ValueError:
            raise CheckpointError(
                f"{where}: line {number} is {as_text(line, 60)}; only a flat mapping, as litgpt writes, is read."
            ) from None
    return found


def _scalar(text: str) -> Any:
    """The value of a scalar.

    Raises: ValueError when it is none that is read.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1] and "\\" not in text:
        return text[1:-1]
    if not _WORD.fullmatch(text) or text.lower() in _OTHER_CONSTANTS:
        raise ValueError
    return text


def dump_flat_yaml(values: Mapping[str, Any]) -> bytes:
    """Write a flat mapping, sorted by name, as PyYAML does by default."""
    lines = []
    for name, value in sorted(values.items()):
        if isinstance(value, list) and value:
            lines += [f"{name}:", *(f"- {_text(one)}" for one in value)]
        elif isinstance(value, Mapping) and value:
            lines += [f"{name}:", *(f"  {key}: {_text(one)}" for key, one in sorted(value.items()))]
        else:
            lines.append(f"{name}: {_text(value)}")
    return "".join(f"{line}\n" for line in lines).encode()


def _text(value: Any) -> str:
    """A scalar, or an empty list or mapping; a float has a point, without which YAML takes 1e-05 for text."""
    if isinstance(value, float):
        number = repr(value)
        return number if "." in number else number.replace("e", ".0e")
    constant = next((word for word, one in _CONSTANTS.items() if type(one) is type(value) and one == value), None)
    if constant is not None or not isinstance(value, str):
        return constant or str(value)
    is_plain = _WORD.fullmatch(value) and value.lower() not in _OTHER_CONSTANTS
    return value if is_plain else f"'{value}'"
