"""Progress in bytes or tokens, on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .streams import unguarded

if TYPE_CHECKING:
    from tqdm import tqdm


def token_bar(what: str, total: int) -> tqdm:
    """Begin a bar like `byte_bar` that counts tokens."""
    return byte_bar(what, total, unit=" tokens")


def byte_bar(what: str, total: int, show: bool = True, unit: str = "B") -> tqdm:
    """Begin a progress bar in bytes, which appears when the work takes longer than two seconds, and leaves no trace."""
    from tqdm import tqdm  # not needed by work that ends at once

    file = unguarded(sys.stderr)
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, delay=2.0, leave=False, disable=not show, file=file)
