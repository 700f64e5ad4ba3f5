"""Single-file checkpoints of earlier versions: weights, config, tokenizer, step and optimizer state in one `.pt`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..console.commands import typed
from ..containers.pickles.foreign import attributes
from ..containers.pickles.inert import as_text
from ..containers.plain import plain
from ..containers.spec import TensorSpec
from ..containers.steps import step_of
from ..containers.torch_files.container import container_of
from ..errors import CheckpointMismatch, CheckpointNotFound
from .bundle import Bundle
from .parts import Part, TorchFile
from .storage import DISK
from .training_state import FIELDS, TrainingState

WEIGHTS, OPTIMIZER_STATE, CONFIG_KEY, TOKENIZER_KEY = "model_state_dict", "optimizer_state_dict", "config", "tokenizer"
PARTS = (WEIGHTS, OPTIMIZER_STATE, CONFIG_KEY, TOKENIZER_KEY)


def open_legacy(path: Path) -> Bundle:
    """Open a single-file checkpoint as a bundle; its header is read, its tensors are not.

    Raises: CheckpointNotFound, CheckpointDamaged, CheckpointMismatch when it is a checkpoint of another kind.
    """
    try:
        file = DISK.open(path)
    except OSError as error:
        raise CheckpointNotFound(
            f"{path}: cannot be opened ({error.strerror}). Expected a single-file checkpoint."
        ) from error
    try:
        return _bundle(TorchFile(file, path))
    except BaseException:
        file.close()
        raise


def _bundle(source: TorchFile) -> Bundle:
    path, content = source.path, source.header.content
    if not isinstance(content, dict) or not {WEIGHTS, CONFIG_KEY} <= content.keys():
        raise CheckpointMismatch(
            f"{path}: found {entries(content)}, expected the entries {WEIGHTS} and {CONFIG_KEY} of a single-file "
            f"checkpoint. {typed('inspect_model.py')} shows its contents, and {typed('convert_checkpoints.py')} {path} "
            "DST --to bundle takes a model of another program over."
        )
    for name, optional in ((WEIGHTS, False), (OPTIMIZER_STATE, True), (TOKENIZER_KEY, True)):
        value = content.get(name)
        if not isinstance(value, dict) and not (optional and value is None):
            raise CheckpointMismatch(f"{path}: its {name} is {as_text(value, 80)}, expected a dict.")
    config = attributes(content[CONFIG_KEY])
    if config is None:
        raise CheckpointMismatch(
            f"{path}: its config is {as_text(content[CONFIG_KEY], 80)}, expected fields by name (a dict, or an object "
            "with attributes)."
        )
    strange = [name for name in config if not isinstance(name, str)]
    if strange:
        raise CheckpointMismatch(f"{path}: its config has a field {as_text(strange[0], 80)}, expected names.")
    tokenizer = content.get(TOKENIZER_KEY)
    step = _step_of(source)
    moments = Part(source, (OPTIMIZER_STATE,)) if content.get(OPTIMIZER_STATE) is not None else None
    others = {name: value for name, value in content.items() if name not in PARTS and name not in FIELDS}
    return Bundle(
        folder=path.parent,
        state=TrainingState.from_dict({**plain(others), "step": step}),
        config_values={name: plain(value) for name, value in config.items() if not name.startswith("_")},
        tokenizer=plain(tokenizer) if tokenizer is not None else None,
        files={path.name: source.file},
        weights=Part(source, (WEIGHTS,)),
        optimizer=moments,
        single=path.name,
    )


def _step_of(source: TorchFile) -> int:
    """The step by any of its names, 0 where none is recorded.

    Raises: CheckpointMismatch for a `step` that is no count, CheckpointDamaged for one whose bytes were changed.
    """
    path, content = source.path, source.header.content
    found, _ = step_of(container_of(source.header, path, os.fstat(source.file.fileno()).st_size), source.file)
    said = content.get("step", 0)
    is_count = said.numel == 1 if isinstance(said, TensorSpec) else type(said) is int and said >= 0
    if not is_count or (found is None and "step" in content):
        raise CheckpointMismatch(f"{path}: its step is {as_text(said, 40)}, expected a whole number of at least 0.")
    return found or 0


def entries(content: Any) -> str:
    """Name what a file holds, for a message."""
    if not isinstance(content, Mapping):
        return as_text(content, 80)
    names = [as_text(name)[1:-1] for name in list(content)[:6]]
    return f"the entries {', '.join(names)}{', ...' if len(content) > 6 else ''}" if names else "an empty dict"


def is_legacy(content: Any) -> bool:
    """Whether the content of a file is that of a single-file checkpoint of this project."""
    return isinstance(content, dict) and isinstance(content.get(WEIGHTS), dict) and CONFIG_KEY in content
