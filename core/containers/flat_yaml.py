"""Read a YAML file that is a flat mapping, as litgpt writes its configs; anything else in YAML is refused.

A value is a scalar, a list of scalars, or a mapping of scalars, each in a line of its own.
"""

from __future__ import annotations

import re
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
