from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .resumable_loader import resumable as resumable


def __getattr__(name: str) -> Any:
    if name != "resumable":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .resumable_loader import resumable  # not before it is asked for: it imports torch

    return resumable
