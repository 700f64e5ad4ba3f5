"""Objects of classes whose modules exist only while they are pickled, as those of somebody else's program."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def vanishing(source: str, module: str = "vanished_program") -> Iterator[types.ModuleType]:
    """A module of this source, and the packages above it, which are gone after the block."""
    parts = module.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    try:
        exec(source, sys.modules[module].__dict__)
        yield sys.modules[module]
    finally:
        for name, held in before.items():
            if held is None:
                del sys.modules[name]
            else:
                sys.modules[name] = held
