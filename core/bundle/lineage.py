"""Where a step comes from: the run it belongs to, its place among the commits of its branch, where the branch left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .commit import new_id
from .folder import WENT_BACK


def order(state: Mapping[str, Any]) -> int:
    """The place of a step among those of its branch: what was committed last is newest, not what has the highest step.

    Steps from before commits were counted have their step for a place.
    """
    return int(state.get("commit_number", state.get("step", 0)))


def descent(newest: Mapping[str, Any], kept: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the training state of the next commit says of its descent, from the states at the top and of kept steps."""
    said = {
        "run": newest.get("run") or new_id(),
        "commit_number": 1 + max(order(state) for state in (newest, *kept)),
    }
    if WENT_BACK in newest:
        said["branch"] = {"id": new_id(), "step": newest["step"], "commit_id": newest["commit_id"]}
    elif "branch" in newest:
        said["branch"] = newest["branch"]
    return said
