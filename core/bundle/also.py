"""also.pt from its header: the names under which a caller saved states of other objects, and what each is of."""

from __future__ import annotations

from typing import Any

from ..containers.spec import TensorSpec
from .bundle import Bundle

MARK = "__kind__"
"""The key that makes a dict in also.pt stand for another value (docs/formats.md)."""


def also_kinds(bundle: Bundle) -> dict[str, str]:
    """What the states in also.pt are of, by name; empty where a step has none.

    Raises: CheckpointError when it cannot be read.
    """
    content = bundle.also.content if bundle.also is not None else {}
    return {str(name): _kind(state) for name, state in content.items()} if isinstance(content, dict) else {}


def _kind(state: Any) -> str:
    """A state in a word or two."""
    if isinstance(state, dict) and state.get(MARK) == "ranks" and isinstance(state.get("states"), list):
        states = state["states"]
        kind = _kind(states[0]) if states else "nothing"
        return kind if len(states) == 1 else f"{kind} of {len(states)} processes"
    if isinstance(state, dict) and MARK in state:
        return str(state["class"] if state[MARK] == "object" and "class" in state else state[MARK])
    return "tensor" if isinstance(state, TensorSpec) else type(state).__name__
