"""Compare a step with a single-file checkpoint: a step that was just made from it, or one from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...bundle.bundle import TOKENIZER, Bundle, open_bundle
from ...bundle.commit import CONFIG
from ...bundle.contradictions import check_fit
from ...bundle.legacy import TOKENIZER_KEY
from ...bundle.training_state import STATE
from ...bundle.verify import verify
from ...console.words import listed
from ...containers.spec import TensorSpec
from ...containers.trees import map_paths
from ...errors import CheckpointError, CheckpointMismatch
from ..plan import Plan, Progress, Ref
from ..proof import prove
from .content import Content, same
from .plan import Outcome, extras


def check(source: Bundle, plan: Plan, stage: Path, documents: dict[str, Any], progress: Progress) -> None:
    """Open what was written again, from the disk, and compare it with the plan and the source.

    Raises: CheckpointError when anything differs.
    """
    try:
        with open_bundle(stage) as made:
            faults = verify(made)
            check_fit(made)
            state = {name: value for name, value in made.state.items() if name != "integrity"}
            found = {CONFIG: made.config_values, TOKENIZER: made.tokenizer, STATE: state}
            faults += [f"{name} differs" for name in found if found[name] != documents.get(name)]
            given = {name: value for name, value in source.config_values.items() if name != "format_version"}
            faults += [f"{CONFIG} has another {name}" for name in given if made.config_values.get(name) != given[name]]
            parts = [made.weights, *([made.optimizer] if made.optimizer is not None else [])]
            contents = {part.source.path.name: map_paths(_ref, part.content) for part in parts}
            planned = {file.name: file.content for file in plan.files}
            faults += [f"{name} has another structure" for name in planned if not same(planned[name], contents[name])]
    except CheckpointError as error:
        faults = [str(error).removesuffix(".")]
    if faults:
        raise CheckpointError(
            f"{source.path(CONFIG)}: what was written is not what was read: {listed(faults)}. It was removed again, "
            "and nothing was committed."
        )
    prove(plan, stage, progress)


def _ref(path: str, value: Any) -> Any:
    return Ref(path) if isinstance(value, TensorSpec) else value


def compare(outcome: Outcome, source: Bundle, progress: Progress) -> None:
    """Say whether the step that is there from elsewhere is that of the file."""
    assert outcome.target is not None
    with open_bundle(outcome.target) as there:
        verify(source)
        replaced = verify(there)
        progress(outcome.size)
        mine, theirs = Content.of(source), Content.of(there)
        if not same(mine.weights, theirs.weights, progress):
            outcome.result = "different weights than"
            return
        others = [] if _architecture(source) == _architecture(there) else ["config"]
        texts = {TOKENIZER_KEY: source.tokenizer, **extras(source)[0]}
        found = {TOKENIZER_KEY: there.tokenizer, **there.state}
        others += [name for name, value in texts.items() if value is not None and found.get(name) != value]
        if source.optimizer is not None and not _same_optimizer(mine, theirs, progress):
            others.append("optimizer state")
    outcome.result = f"same weights, another {', '.join(others)} than" if others else "same weights as"
    outcome.may_be_deleted = not others and not replaced and not outcome.left


def _architecture(bundle: Bundle) -> dict[str, Any] | None:
    return bundle.config.architecture() if bundle.config is not None else None


def _same_optimizer(a: Content, b: Content, progress: Progress) -> bool:
    try:
        return same(a.optimizer, b.optimizer, progress)
    except CheckpointMismatch:
        return False
