"""Make bundles of single-file checkpoints: staged, read back and compared with their source, then committed.

No source is changed or deleted. The protocol of core/bundle/commit.py makes it safe to kill at any instant.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...bundle.bundle import OPTIMIZER, Bundle, open_bundle
from ...bundle.commit import CONFIG, STANDARD, ModelFolder
from ...bundle.legacy import open_legacy
from ...bundle.training_state import STATE
from ...bundle.verify import verify
from ...bundle.write import Writer, write_bundle
from ...bundle.writing import writing
from ...config.gpt import same_architecture
from ...console.words import size_text
from ...containers.json_files import parse_json
from ...containers.tensors.reading import Gatherer
from ...errors import CheckpointError, SaveFailed
from ..plan import Progress, WeightFile
from ..writing import write_torch
from .comparison import check, compare
from .content import Content
from .documents import documents_of
from .plan import BUNDLE, COMPARED, KEPT, MIGRATED, Outcome, Steps, in_order, work


def migrate(folder: Path, paths: Iterable[Path], progress: Progress = lambda size: None) -> list[Outcome]:
    """Bring single-file checkpoints of one folder over, and say what became of each.

    A file that cannot be migrated reports why, and the others continue. `progress` receives the bytes that were read,
    written and compared.
    """
    outcomes: list[Outcome] = []
    paths, place = list(paths), ModelFolder(folder)
    try:
        with writing(place):
            outcomes = in_order(paths)
            for outcome in outcomes:
                if outcome.error is None:
                    _bring_over(place, outcome, progress)
    except CheckpointError as error:  # the lock, or what an interrupted save left
        outcomes = outcomes or in_order(paths)
        for outcome in outcomes:
            if outcome.error is None:
                outcome.fail(error)
    return outcomes


def _bring_over(place: ModelFolder, outcome: Outcome, progress: Progress) -> None:
    try:
        steps = Steps.read(place.path)
        steps.decide(outcome)
        with _whole(work(outcome), progress) as advance, open_legacy(outcome.path) as source:
            if outcome.action in (BUNDLE, KEPT):
                _make(place, steps, outcome, source, advance)
            elif outcome.action == COMPARED:
                compare(outcome, source, advance)
            elif outcome.action == MIGRATED:
                _look_again(outcome)
    except CheckpointError as error:
        outcome.fail(error)
    except OSError as error:
        outcome.fail(
            SaveFailed(
                f"{error.filename or outcome.path}: {error.strerror}. Nothing is lost; migrate "
                f"{outcome.path.name} again."
            )
        )


@contextlib.contextmanager
def _whole(total: int, progress: Progress) -> Iterator[Progress]:
    """Report exactly `total` bytes, whatever the block reports."""
    left = total

    def advance(size: int) -> None:
        nonlocal left
        progress(min(size, left))
        left -= min(size, left)

    try:
        yield advance
    finally:
        progress(left)


def _make(place: ModelFolder, steps: Steps, outcome: Outcome, source: Bundle, progress: Progress) -> None:
    """Write the step of a file, compare it with the file, and commit it."""
    verify(source)
    plan = Content.of(source).plan(place.path)
    files = {file.name: file for file in plan.files}
    documents = documents_of(source, outcome, steps, OPTIMIZER in files)
    progress(outcome.size)
    texts = {name: values for name, values in documents.items() if name != STATE}
    try:
        with place.staging() as stage, Gatherer() as gatherer:
            writers = {name: _writer(file, gatherer, progress) for name, file in files.items()}
            write_bundle(place, stage, documents[STATE], {**writers, **texts})
            check(source, plan, stage, documents, progress)
            if not outcome.is_unchanged():
                raise CheckpointError(f"{outcome.path}: changed while it was read. Wait until its writer is done.")
            outcome.size_after = sum(entry.stat().st_size for entry in stage.iterdir())
            if outcome.action == KEPT:
                place.keep(stage, source.step)
            else:
                if not steps.has_bundle:
                    _clear_the_top(place, documents[CONFIG], outcome)
                place.commit(stage)
    except OSError as error:
        raise _save_failed(outcome, error, plan.nbytes) from error
    if outcome.action == BUNDLE:
        place.roll_forward()
        if parse_json(place.read(CONFIG), str(place.path / CONFIG)) != documents[CONFIG]:
            outcome.notes.append(f"{place.path / CONFIG}: was here before and fits, so it stays as it is")
    outcome.may_be_deleted = not outcome.left


def _writer(file: WeightFile, gatherer: Gatherer, progress: Progress) -> Writer:
    return lambda output: write_torch(file, output, gatherer, progress)


def _clear_the_top(place: ModelFolder, config: dict[str, Any], outcome: Outcome) -> None:
    """Move what is left of a bundle aside, before another one takes its place; a config.json that fits may stay."""
    there = [name for name in STANDARD if place.storage.exists(place.path / name)]
    if there == [CONFIG] and same_architecture(parse_json(place.read(CONFIG), str(place.path / CONFIG)), config):
        return
    if there:
        (aside,) = place.clear_top(config_stays=True)
        outcome.notes.append(f"{place.path}: {', '.join(there)} without the rest of a bundle: now in {aside.name}")


def _look_again(outcome: Outcome) -> None:
    """Check that what was made of a file before is whole still."""
    assert outcome.target is not None
    with open_bundle(outcome.target) as made:
        replaced = verify(made)
        outcome.size_after = sum(made.sizes.values()) + (outcome.target / STATE).stat().st_size
    outcome.notes += replaced
    outcome.may_be_deleted = not replaced and not outcome.left


def _save_failed(outcome: Outcome, error: OSError, needed: int) -> SaveFailed:
    sizes = ""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(outcome.path.parent).free
        sizes = f" ({size_text(needed)} needed, {size_text(free)} free)"
    return SaveFailed(f"{outcome.path}: not migrated: {error.strerror}{sizes}. The file is untouched, nothing is lost.")
