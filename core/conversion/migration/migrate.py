"""Make bundles of single-file checkpoints: staged, read back and compared with their source, then committed.

No source is changed or deleted. The protocol of core/bundle/commit.py makes it safe to kill at any instant.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...bundle.bundle import OPTIMIZER, TOKENIZER, Bundle, open_bundle
from ...bundle.choice import seen_files
from ...bundle.commit import CONFIG, MODEL, STANDARD, ModelFolder, new_id
from ...bundle.contradictions import check_fit
from ...bundle.legacy import TOKENIZER_KEY, open_legacy
from ...bundle.storage import Output
from ...bundle.training_state import STATE
from ...bundle.verify import verify
from ...bundle.write import Content, Writer, write_bundle
from ...checkpoint import CheckpointManager
from ...config.gpt import FORMAT_VERSION, same_architecture
from ...console.words import listed, size_text
from ...containers.json_files import dump_json, parse_json
from ...errors import CheckpointError, CheckpointMismatch, SaveFailed
from ...loading.tensors import load_optimizer, load_weights
from ...networks.state_dict import compact
from ...saving.torch_file import file_size, write_torch_zip
from .equality import Progress, unequal_optimizers, unequal_weights
from .plan import BUNDLE, COMPARED, KEPT, MIGRATED, Outcome, Steps, extras, in_order, work


def migrate(folder: Path, paths: Iterable[Path], progress: Progress = lambda size: None) -> list[Outcome]:
    """Bring single-file checkpoints of one folder over, and say what became of each.

    A file that cannot be brought over says why, and the others are done. `progress` is told the bytes that were read,
    written and compared.
    """
    outcomes: list[Outcome] = []
    paths = list(paths)
    manager = CheckpointManager.of_folder(folder)
    try:
        with manager.writing():
            outcomes = in_order(paths)
            for outcome in outcomes:
                if outcome.error is None:
                    _bring_over(ModelFolder(folder), outcome, progress)
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
                _compare(outcome, source, advance)
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
    fingerprint = outcome.fingerprint
    progress(outcome.size)
    files, needed = _tensor_files(source, progress)
    assert source.config is not None
    config = source.config.to_dict()
    texts = {CONFIG: config} | ({TOKENIZER: source.tokenizer} if source.tokenizer is not None else {})
    best = steps.state.get("best")
    state = {
        **extras(source)[0],
        "step": source.step,
        "optimizer_file": OPTIMIZER if OPTIMIZER in files else None,
        "format_version": FORMAT_VERSION,
        "commit_id": new_id(),
        "parent": place.newest_id() if outcome.action == BUNDLE and steps.has_bundle else None,
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(outcome.mtime_ns / 1e9)),
        "best": best if outcome.action == BUNDLE and isinstance(best, dict) else None,
        "legacy": _superseded(outcome, steps, {**fingerprint, "mtime_ns": outcome.mtime_ns}),
        "migrated_from": fingerprint,
    }
    _refuse_no_json(source, {**texts, STATE: state})
    try:
        with place.discarded_on_failure(stage := place.stage()):
            write_bundle(place, stage, state, {**files, **texts})
            _check(source, stage, {**texts, STATE: state}, progress)
            if not outcome.is_unchanged():
                raise CheckpointError(f"{outcome.path}: changed while it was read. Wait until its writer is done.")
            outcome.size_after = sum(entry.stat().st_size for entry in stage.iterdir())
            if outcome.action == KEPT:
                place.keep(stage, source.step)
            else:
                if not steps.has_bundle:
                    _clear_the_top(place, config, outcome)
                place.commit(stage)
    except OSError as error:
        raise _save_failed(outcome, error, needed) from error
    if outcome.action == BUNDLE:
        place.roll_forward()
        if parse_json(place.read(CONFIG), str(place.path / CONFIG)) != config:
            outcome.notes.append(f"{place.path / CONFIG}: was here before and fits, so it stays as it is")
    outcome.may_be_deleted = not outcome.left


def _refuse_no_json(source: Bundle, texts: dict[str, Any]) -> None:
    for name, values in texts.items():
        try:
            dump_json(values)
        except (TypeError, ValueError) as error:
            raise CheckpointMismatch(f"{source.path(name)}: what {name} is to hold is no JSON ({error}).") from error


def _tensor_files(source: Bundle, progress: Progress) -> tuple[dict[str, Content], int]:
    """The files of a bundle that hold tensors, and the bytes they need."""
    seen: dict[tuple[Any, ...], torch.Tensor] = {}
    weights = {name: compact(tensor, seen) for name, tensor in load_weights(source).items()}
    moments = _compacted(load_optimizer(source))
    files: dict[str, Content] = {MODEL: _writer(weights, progress)}
    if moments is not None:
        files[OPTIMIZER] = _writer(moments, progress)
    return files, file_size(weights) + (file_size(moments) if moments is not None else 0)


def _compacted(moments: dict[str, Any] | None) -> dict[str, Any] | None:
    if moments is None:
        return None
    seen: dict[tuple[Any, ...], torch.Tensor] = {}
    state = {
        number: {key: compact(v, seen) if isinstance(v, torch.Tensor) else v for key, v in entry.items()}
        for number, entry in moments["state"].items()
    }
    return {**moments, "state": state}


class _Counted:
    """An output that says how many bytes went by."""

    def __init__(self, output: Output, progress: Progress) -> None:
        self._output, self._progress = output, progress
        self.size = output.size

    def write(self, data: bytes | memoryview) -> int:
        crc = self._output.write(data)
        self.size = self._output.size
        self._progress(len(data))
        return crc


def _writer(content: Any, progress: Progress) -> Writer:
    return lambda output: write_torch_zip(_Counted(output, progress), content)


def _superseded(outcome: Outcome, steps: Steps, fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
    """The files beside a step that it need not give way to: those seen before, and those that are not newer.

    A newer file that is not brought over (yet) must still be chosen.
    """
    known = steps.state.get("legacy", [])
    return [
        entry
        for entry in seen_files(steps.folder, [fingerprint, *known])
        if entry in known or _step_of(steps.folder / entry["name"]) <= (outcome.step or 0)
    ]


def _step_of(path: Path) -> float:
    try:
        with open_legacy(path) as source:
            return source.step
    except CheckpointError:
        return math.inf


def _check(source: Bundle, stage: Path, texts: dict[str, Any], progress: Progress) -> None:
    """Open what was written again, from the disk, and compare it with its source.

    Raises: CheckpointError when anything differs.
    """
    try:
        with open_bundle(stage) as made:
            faults = verify(made)
            check_fit(made)
            faults += unequal_weights(source, made, progress)
            faults += unequal_optimizers(source, made, progress)
            state = {name: value for name, value in made.state.items() if name != "integrity"}
            found = {CONFIG: made.config_values, TOKENIZER: made.tokenizer, STATE: state}
            faults += [f"{name} differs" for name in found if found[name] != texts.get(name)]
            given = {name: value for name, value in source.config_values.items() if name != "format_version"}
            faults += [f"{CONFIG} has another {name}" for name in given if made.config_values.get(name) != given[name]]
    except CheckpointError as error:
        faults = [str(error).removesuffix(".")]
    if faults:
        raise CheckpointError(
            f"{source.path(CONFIG)}: what was written is not what was read: {listed(faults)}. It was removed again, "
            "and nothing was committed."
        )


def _clear_the_top(place: ModelFolder, config: dict[str, Any], outcome: Outcome) -> None:
    """Move what is left of a bundle aside, before another one takes its place; a config.json that fits may stay."""
    there = [name for name in STANDARD if place.storage.exists(place.path / name)]
    if there == [CONFIG] and same_architecture(parse_json(place.read(CONFIG), str(place.path / CONFIG)), config):
        return
    if there:
        (aside,) = place.clear_top(config_stays=True)
        outcome.notes.append(f"{place.path}: {', '.join(there)} without the rest of a bundle: now in {aside.name}")


def _compare(outcome: Outcome, source: Bundle, progress: Progress) -> None:
    """Say whether the step that is there from elsewhere is that of the file."""
    assert outcome.target is not None
    with open_bundle(outcome.target) as there:
        verify(source)
        replaced = verify(there)
        progress(outcome.size)
        if unequal_weights(source, there, progress):
            outcome.result = "different weights than"
            return
        others = [] if _architecture(source) == _architecture(there) else ["config"]
        texts = {TOKENIZER_KEY: source.tokenizer, **extras(source)[0]}
        found = {TOKENIZER_KEY: there.tokenizer, **there.state}
        others += [name for name, value in texts.items() if value is not None and found.get(name) != value]
        if source.optimizer is not None and (there.optimizer is None or _other_optimizer(source, there, progress)):
            others.append("optimizer state")
    outcome.result = f"same weights, another {', '.join(others)} than" if others else "same weights as"
    outcome.may_be_deleted = not others and not replaced and not outcome.left


def _architecture(bundle: Bundle) -> dict[str, Any] | None:
    return bundle.config.architecture() if bundle.config is not None else None


def _other_optimizer(a: Bundle, b: Bundle, progress: Progress) -> bool:
    try:
        return bool(unequal_optimizers(a, b, progress))
    except CheckpointMismatch:
        return True


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
