"""Open a checkpoint of any kind, recognized by the first bytes of a file or the contents of a folder."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path

from ..errors import CheckpointError, CheckpointNotFound
from .container import Container, listing, member, reading
from .part import rank_pattern
from .pickles.inert import as_name, names_text
from .recognised import answer_in_place, folder_kind
from .step_parents import model_within, steps_said
from .trainer_folder import is_of_run

_HEAD = 512  # bytes

_FOLDERS = (
    ("step_folder", "is_step_folder", "open_step_folder"),
    ("hf_folder", "is_hf_folder", "open_hf_folder"),
    ("trainer_folder", "is_trainer_folder", "open_trainer_folder"),
    ("megatron_folder", "is_megatron_folder", "open_megatron_folder"),
    ("dcp.folder", "is_dcp", "open_dcp"),
    ("rank_files", "rank_files", "open_rank_files"),
)
"""Modules that read folders, with their tests and openers; the first whose test succeeds opens the folder."""

SINGLE = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Suffixes of files that each hold a whole checkpoint."""

_FEW = 20  # folders in a folder that are looked into

_NUMBER = re.compile(r"\d+")
_PART = re.compile(r"(?<![a-z])(?:rank|shard|part|split|consolidated|world_size|mp|tp|pp|of)[-_.]?\d", re.IGNORECASE)
"""The beginning of a number that counts the parts of one checkpoint, and not its steps."""

_LOOKED_FOR = (
    "config.json + model.pt (bundle), latest.pt or final.pt (single file), model.safetensors or pytorch_model.bin or "
    "an index of their shards (Hugging Face), .metadata and *.distcp (DCP), model_sharded/ or model_rank*.pt (one file "
    "per rank), iter_* or mp_rank_* (Megatron), or one file *.safetensors, *.pt, *.pth, *.bin, *.ckpt"
)


def open_container(path: Path) -> Container:
    """Open a checkpoint file or folder of any known kind; only headers are read, nothing is executed.

    Raises: CheckpointNotFound when there is none, with what was looked for and what was found; CheckpointDamaged when
        it is cut off or contradicts itself; CheckpointError when it is of another kind.
    """
    try:
        return _open_folder(path) if path.is_dir() else _open_file(path)
    except OSError as error:  # the path leads through a folder without permission
        raise CheckpointNotFound(f"{path}: cannot be opened ({error.strerror}).") from error


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a folder as a whole is a checkpoint: of Hugging Face, DCP, Megatron, or one file for each rank."""
    return any(getattr(import_module(f".{name}", __package__), knows)(folder) for name, knows, _ in _FOLDERS)


def is_file_of_tensors(path: Path) -> bool:
    """Whether a file begins as a zip, a pickle or safetensors does; other files are not opened further."""
    from .safetensors import is_safetensors

    with reading(path) as file:
        head = file.read(_HEAD)
    is_pickle = head[:1] == b"\x80" and head[1:2] <= b"\x05"
    return is_pickle or head.startswith(b"PK") or is_safetensors(head) or path.suffix == ".safetensors"


# readers are imported on demand: those of torch's pickles would cost a reader of safetensors time and memory


def _open_file(path: Path) -> Container:
    """Open a file of the kind that its first bytes show."""
    with reading(path) as file:
        head = file.read(_HEAD)
    from .safetensors import is_safetensors, open_safetensors

    if not head.startswith(b"PK") and (is_safetensors(head) or path.suffix == ".safetensors"):
        return open_safetensors(path)
    if path.name == ".metadata" or path.suffix in (".distcp", ".metadata"):
        return _open_folder(path.parent)
    if head.lstrip()[:1] == b"{" or path.suffix == ".json":
        from .hf_folder import INDEX, open_hf_folder

        if path.name.endswith(INDEX):
            return open_hf_folder(path)
        if path.suffix in SINGLE:
            raise CheckpointError(answer_in_place(head, str(path)))
        raise CheckpointError(
            f"{path}: a JSON text, not a checkpoint. Name the folder that holds it, or an index (*{INDEX})."
        )
    from .torch_files.container import open_torch_single

    return open_torch_single(path)


def _open_folder(folder: Path) -> Container:
    """Open a folder by its contents."""
    names = listing(folder)
    for name, knows, opens in _FOLDERS:
        module = import_module(f".{name}", __package__)
        if getattr(module, knows)(folder):
            return getattr(module, opens)(folder)
    if (row := folder_kind(names)) is not None:
        raise CheckpointError(f"{folder}: {row.what}. {row.said(folder)}")
    if (inner := model_within(folder)) != folder:
        return _open_folder(inner)
    if said := steps_said(folder):
        raise CheckpointNotFound(said)
    files = [name for name, size in names.items() if size is not None and name.endswith(SINGLE)]
    single = [name for name in files if not is_of_run(name)]
    if len(single) == 1:
        return _open_file(member(folder, single[0], str(folder)))
    if single and (pattern := rank_pattern(single[0])) and all(re.fullmatch(pattern, name) for name in single):
        raise CheckpointError(
            f"{folder}: the files of {len(single)} ranks ({names_text(single, 5)}), which cannot be "
            "joined here. Join them with the program that wrote them; if each has the whole model, copy one to a "
            "folder of its own."
        )
    if len({_NUMBER.sub("0", name) for name in single}) == 1 < len(single) and _PART.search(single[0]):
        raise CheckpointNotFound(
            f"{folder}: {len(single)} files that are parts of one checkpoint by their names: "
            f"{names_text(single, 5)}. No index says how they fit together, and one alone is not the "
            "model. Put them together with the program that wrote them, and name the result."
        )
    if single:
        raise CheckpointNotFound(
            f"{folder}: not a single checkpoint, but {len(single)} files that may each be one: "
            f"{names_text(single, 5)}. Name one of them."
        )
    found = names_text(list(names), 5) if names else "nothing"
    inside = _inside(folder, names)
    raise CheckpointNotFound(f"{folder}: no checkpoint here. Looked for {_LOOKED_FOR}; found {found}.{inside}")


def _inside(folder: Path, names: dict[str, int | None]) -> str:
    """A sentence about the first folder in a folder that is of a format which is recognised and not read."""
    for name in [name for name, size in names.items() if size is None][:_FEW]:
        place = folder / name
        if place.is_symlink() or not os.access(place, os.R_OK | os.X_OK):
            continue
        if (row := folder_kind(listing(place))) is not None:
            return f" {as_name(name)} is {row.what}. {row.said(place)}"
    return ""
