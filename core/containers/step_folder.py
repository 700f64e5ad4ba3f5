"""Open the folder of one step that holds model, average (EMA) and optimizer separately, each sharded in its own way.

    0000002/metadata.json       train_steps, world_size, checkpoint_type, has_ema, ...
            model_sharded/      a DCP folder; also ema_sharded/; unsharded: model.safetensors, ema.safetensors
            optimizer_rank00000.pt ...

This is the layout of BAGEL and of programs derived from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from ..errors import CheckpointNotFound
from .container import Container, listing, member

_METADATA = "metadata.json"
_SHARDED = "_sharded"
_WHOLE = ".safetensors"


# readers are imported on demand: every folder is tested for being one of these


def is_step_folder(path: Path) -> bool:
    """Whether a folder holds the parts of one step under their usual names."""
    names = listing(path)
    if any(size is None and name in ("model_sharded", "ema_sharded") for name, size in names.items()):
        return True
    if names.get(_METADATA) is None:
        return names.keys() >= {"model.safetensors", "ema.safetensors"}
    from .rank_files import rank_files

    return bool(rank_files(path))


def step_parts(path: Path) -> list[str]:
    """Name the parts of a step that exist: model, ema, optimizer, ..."""
    from .rank_files import rank_files

    names = listing(path)
    stems = {name: name.removesuffix(_SHARDED if size is None else _WHOLE) for name, size in names.items()}
    return list(dict.fromkeys([*(stem for name, stem in stems.items() if stem != name), *rank_files(path)]))


def open_step_folder(
    path: Path, only: Collection[str] | None = None, open_part: Callable[[Path], Container] | None = None
) -> Container:
    """Read the parts of a step: tensors are called `model.…`, `ema.…`, `optimizer.…`; the content has `metadata`.

    A part that is both sharded and in files of ranks is read once. `only` names the parts to read (default: all);
    `open_part` replaces the function that opens a sharded folder or safetensors file.

    Raises: CheckpointNotFound when there are no parts, CheckpointDamaged, CheckpointError as the readers of the parts.
    """
    from .joined import join, put, read_json
    from .rank_files import open_ranks, rank_files

    if not is_step_folder(path):
        raise CheckpointNotFound(
            f"{path}: not a step folder, expected model_sharded/, ema.safetensors beside model.safetensors, or "
            f"{_METADATA} with model_rank00000.pt."
        )
    names = listing(path)
    whole = Container("", path, {}, {}, {})
    if names.get(_METADATA) is not None:
        put(whole, "metadata", read_json(path, _METADATA, whole.files))
    parts: dict[str, str] = {}  # how each is stored
    for name, size in names.items():
        stem = name.removesuffix(_SHARDED if size is None else _WHOLE)
        if stem != name and stem not in parts and (only is None or stem in only):
            join(whole, (open_part or _open_part)(member(path, name, str(path))), stem)
            parts[stem] = "DCP" if size is None else "safetensors"
    for stem, files in rank_files(path).items():
        if only is not None and stem not in only:
            continue
        if stem in parts:
            whole.files |= {file: names[file] or 0 for file in files.values()}
            whole.notes.append(f"{stem}_rank*.pt: {len(files)} files with the {stem} again, not looked into.")
        else:
            join(whole, open_ranks(path, stem, files), stem)
            parts[stem] = f"{len(files)} rank{'s' * (len(files) != 1)}"
    whole.kind = f"step folder, {', '.join(f'{stem} ({kind})' for stem, kind in parts.items())}"
    return whole


def _open_part(path: Path) -> Container:
    if path.is_dir():
        from .dcp.folder import open_dcp

        return open_dcp(path)
    from .safetensors import open_safetensors

    return open_safetensors(path)
