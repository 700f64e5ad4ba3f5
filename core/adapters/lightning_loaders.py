"""Which of the loaders of Lightning's Trainer go on where they stopped."""

from __future__ import annotations

from typing import Any

from ..console.words import listed
from ..data.resumable_loader import ResumableLoader


def difference(loop: Any) -> str | None:
    """What a resume does not give back; None where it is exact."""
    loaders = loop._combined_loader.flattened
    otherwise = (
        "a resume within an epoch is exact in all else, one at its end in everything. "
        "core.data.resumable and torchdata's StatefulDataLoader of a dataset with a length are exact."
    )
    if without := [type(one).__name__ for one in loaders if not hasattr(one, "load_state_dict")]:
        return f"{listed(sorted(set(without)))} keeps no position, so the batches begin anew: {otherwise}"
    if loop._data_fetcher.length is None:
        return f"the loader has no length, so Lightning fetches a batch ahead, which is left out: {otherwise}"
    limit = loop.max_batches
    for length in (len(one) for one in loaders if isinstance(one, ResumableLoader)):
        if limit < length and length % limit:  # the rest of the loader's epoch is a short one of Lightning's
            return (
                f"limit_train_batches takes {limit} of {length} batches, and a later epoch has the {length % limit} "
                f"that are left: a resume at the end of that one has other batches. It is exact with a limit that "
                f"divides {length}, and with torchdata's StatefulDataLoader."
            )
    return None
