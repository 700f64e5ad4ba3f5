"""Checkpoints of other programs in a model's folder: nothing resumes them as they are, a command takes them over."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from ..console.commands import typed
from ..containers.container import Container, listing
from ..containers.open import SINGLE, is_checkpoint_folder, is_file_of_tensors, open_container
from ..containers.tensors.reading import FLOATS
from ..errors import CheckpointDamaged, CheckpointError, Unspecified
from ..families.identify import UNKNOWN, identify, weights_key
from .choice import LEGACY_FILES, Say
from .folder import MORE, STANDARD

META = "meta.pkl"
OURS = {*STANDARD, *MORE, *LEGACY_FILES}


def refuse_foreign(folder: Path, origin: Path | None, allow_fresh: bool, say: Say) -> None:
    """Refuse to train from scratch beside a checkpoint of another program, unless it is the `origin` of the run.

    Raises: Unspecified naming it and the command that takes it over; with `allow_fresh` that is reported instead.
    """
    if (found := foreign_checkpoint(folder, origin)) is None:
        return
    if not allow_fresh:
        raise Unspecified(f"{found} To start from scratch beside it, add --allow_fresh.")
    say(f"WARNING: {found} Starting from scratch beside it (--allow_fresh).")


def foreign_checkpoint(folder: Path, besides: Path | None = None) -> str | None:
    """Report a checkpoint of another program in a folder without one of ours, and the command that takes it over.

    The file `besides` does not count. Only headers are read. None where there is none.
    """
    if not folder.is_dir():
        return None
    try:
        if is_checkpoint_folder(folder):
            return _said(folder, folder)
        names = [name for name, size in listing(folder).items() if size and name not in OURS]
        paths = [folder / name for name in names if is_file_of_tensors(folder / name)]
    except CheckpointError as error:
        return str(error)
    return next((said for path in paths if not _is_same(path, besides) and (said := _said(path, folder))), None)


def _is_same(path: Path, other: Path | None) -> bool:
    return other is not None and other.exists() and path.samefile(other)


def _said(path: Path, folder: Path) -> str | None:
    """What a checkpoint is, and the command that takes it over; None for tensors that are no model."""
    try:
        container = open_container(path)
    except CheckpointDamaged as error:
        is_meant = path == folder or path.suffix in SINGLE
        return f"{error} It is not of this program: copy it again, or move it away." if is_meant else None
    except CheckpointError as error:
        return str(error) if path == folder else None
    if not _is_model(container):
        return None
    key = weights_key(container.tensors)
    shapes = {name.removeprefix(key): s.shape for name, s in container.tensors.items() if name.startswith(key)}
    found = identify(shapes)
    if found.family == UNKNOWN:
        look = f"{typed('python inspect_model.py')} {shlex.quote(str(path))}"
        return f"{path}: a checkpoint of a program that is not known here. {look} shows what is in it."
    target = next(
        free for end in ("", *range(2, 1000)) if not (free := folder.with_name(f"{folder.name}_new{end}")).exists()
    )
    command = [str(path), str(target), "--to", "bundle"]
    if (folder / META).is_file():
        command += ["--meta", str(folder / META)]
    return (
        f"{path}: a checkpoint of {found.program}, which is not used as it is. Take it over with "
        f"{typed('python convert_checkpoints.py')} {shlex.join(command)}, and use --model_name {target.name}."
    )


def _is_model(container: Container) -> bool:
    """Whether the tensors are weights, and not a table of labels or a tensor alone."""
    is_named = isinstance(container.content, Mapping) or not container.content
    return is_named and any(len(s.shape) > 1 and s.dtype in FLOATS for s in container.tensors.values())
