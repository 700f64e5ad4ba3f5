"""Content of a checkpoint as values that JSON has."""

from __future__ import annotations

import math
from typing import Any

from core.containers.inert import DEPTH, Call, Global, as_text
from core.containers.spec import TensorSpec


def plain(value: Any, depth: int = 0) -> Any:
    """Turn content into what JSON can say; tensors, records and numbers that JSON lacks become text.

    So does what lies deeper than any checkpoint of a program: whoever reads the JSON has to follow it.
    """
    if depth > DEPTH:
        return as_text(value)
    if isinstance(value, dict):
        return {k if isinstance(k, str) else as_text(k): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v, depth + 1) for v in value]
    if isinstance(value, (Call, Global, TensorSpec, bytes)) or (isinstance(value, float) and not math.isfinite(value)):
        return as_text(value)
    return value
