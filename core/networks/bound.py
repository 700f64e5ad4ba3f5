"""Methods whose code lives elsewhere, so that mathematics imports nothing that touches files."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


class bound:
    """A method made of a function whose module is imported when the method is first looked up.

    `module` is relative (`..kinds.model_methods`) to `package`, the `__package__` of the module that binds it. What is
    looked up is the function itself, with its signature and its docstring.
    """

    def __init__(self, module: str, name: str, package: str | None) -> None:
        self._module, self._name, self._package = module, name, package

    def function(self) -> Callable[..., Any]:
        """The function, where it lives."""
        found: Callable[..., Any] = getattr(importlib.import_module(self._module, self._package), self._name)
        return found

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        method: Callable[..., Any] = self.function().__get__(instance, owner)
        return method


class static_bound(bound):
    """The same for a static method."""

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        return self.function()
