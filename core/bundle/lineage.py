"""The origin of a step: its run, its place among the commits of its branch, and where the branch began."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .training_state import TrainingState, new_id


def descent(newest: TrainingState, kept: Iterable[TrainingState]) -> dict[str, Any]:
    """The fields by which the next commit records its descent, from the states at the top and of kept steps."""
    said: dict[str, Any] = {
        "run": newest.run or new_id(),
        "commit_number": 1 + max(state.order for state in (newest, *kept)),
    }
    if newest.went_back is not None:
        said["branch"] = {"id": new_id(), "step": newest.step, "commit_id": newest.commit_id}
    elif newest.branch is not None:
        said["branch"] = newest.branch
    return said
