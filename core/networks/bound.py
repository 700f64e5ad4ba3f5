"""Methods whose code lives elsewhere: mathematics imports nothing that touches files."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def bound(module: str, name: str) -> Callable[..., Any]:
    """Make a method of a function whose module is imported at the first call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    call.__doc__ = f"See `{module}.{name}`."
    return call
