"""The JSON documents of a step made from a single file: its config, its tokenizer and its training state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...bundle.bundle import OPTIMIZER, TOKENIZER, Bundle
from ...bundle.choice import seen_files
from ...bundle.commit import CONFIG, ModelFolder
from ...bundle.legacy import open_legacy
from ...bundle.training_state import STATE, TrainingState, time_of
from ...containers.json_files import dump_json
from ...errors import CheckpointError, CheckpointMismatch, InputError
from .plan import BUNDLE, Outcome, Steps, extras


def documents_of(source: Bundle, outcome: Outcome, steps: Steps, has_optimizer: bool) -> dict[str, dict[str, Any]]:
    """Make the JSON documents of a file, by name, including its step's relation to the others of the folder.

    Raises: CheckpointMismatch when the file has values that JSON lacks.
    """
    assert source.config is not None
    is_newest, best = outcome.action == BUNDLE, steps.state.best
    said = {**extras(source)[0], "step": source.step, "optimizer_file": OPTIMIZER if has_optimizer else None}
    state = TrainingState.from_dict(said).committed(
        ModelFolder(steps.folder).newest_id() if is_newest and steps.has_bundle else None,
        saved_at=time_of(outcome.mtime_ns / 1e9),
        best=best if is_newest and isinstance(best, dict) else None,
        legacy=_superseded(outcome, steps),
        migrated_from=outcome.fingerprint,
    )
    tokenizer = {TOKENIZER: source.tokenizer} if source.tokenizer is not None else {}
    documents = {CONFIG: source.config.to_dict(), **tokenizer, STATE: state.to_dict()}
    for name, values in documents.items():
        try:
            dump_json(values)
        except InputError as error:
            raise CheckpointMismatch(f"{source.path(name)}: {name} cannot hold it: {error}") from error
    return documents


def _superseded(outcome: Outcome, steps: Steps) -> list[dict[str, Any]]:
    """The files beside a step that it need not give way to: those seen before, and those that are not newer.

    A newer file that is not brought over (yet) must still be chosen.
    """
    known = steps.state.legacy or []
    this = {**outcome.fingerprint, "mtime_ns": outcome.mtime_ns}
    return [
        entry
        for entry in seen_files(steps.folder, [this, *known])
        if entry in known or _step_of(steps.folder / entry["name"]) <= (outcome.step or 0)
    ]


def _step_of(path: Path) -> float:
    try:
        with open_legacy(path) as source:
            return source.step
    except CheckpointError:
        return math.inf
