"""What a model is: the fields of each kind, their checks and defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gpt import GPTConfig

__all__ = ["GPTConfig"]


def __getattr__(name: str) -> Any:
    """Import the class when it is asked for: who looks into another program's file needs only its neighbours here."""
    if name != "GPTConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .gpt import GPTConfig

    return GPTConfig
