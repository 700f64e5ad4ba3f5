"""Progress in bytes, on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def byte_bar(what: str, total: int, show: bool = True) -> tqdm:
    """Begin a progress bar in bytes, which appears when the work takes longer than two seconds, and leaves no trace."""
    from tqdm import tqdm  # not needed by work that ends at once

    return tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=2.0, leave=False, disable=not show)
