"""Methods whose code lives elsewhere, so that mathematics imports nothing that touches files."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def bound(module: str, name: str, package: str | None) -> Callable[..., Any]:
    """Make a method from a function whose module is imported at the first call.

    `module` is relative (`..kinds.model_methods`) to `package`, the `__package__` of the module that binds it.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module, package), name)(*args, **kwargs)

    call.__doc__ = f"See `{name}` in `{module.lstrip('.')}`."
    return call
