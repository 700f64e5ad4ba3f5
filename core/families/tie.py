"""Whether a model's head is its token table."""

from __future__ import annotations

from collections.abc import Callable


def is_tied(said: bool | None, *, shares: bool, same: Callable[[], bool | None]) -> bool | None:
    """Decide by the values of both tensors, and by what program and config say (None: nothing).

    A head that shares the table's bytes is the table, as is one that is not stored. A copy with the same values is it
    too, except where the config says that the head is a tensor of its own, which training would change. A head with
    other values is never the table: where `said` is True, that is a contradiction, which the caller reports. `same`
    compares the values; None means that they are out of reach.
    """
    if shares:
        return True
    return False if said is False else same()
