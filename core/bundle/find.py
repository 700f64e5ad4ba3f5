"""Find the folders of models, by the names of the files in them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..console.anchored import anchored
from ..console.commandline import Parser
from ..console.words import listed_names, tell
from ..errors import CheckpointNotFound, InputError, Unspecified

MODEL_FILES = ("config.json", "model.pt", "latest.pt", "final.pt", ".committed")
"""A folder that has one of these is a model's folder."""

_STEP = "step_"
"""The prefix of the names of kept steps."""


def model_folder(root: str | Path, name: str) -> Path:
    """The folder of a model of this name below a checkpoint root, wherever the process goes later.

    Raises: InputError when the name is a path.
    """
    if not name or name in (".", "..") or Path(name).name != name or "\\" in name or not _is_possible(name):
        raise InputError(f"model name {name!r}: expected the name of one folder, without a path.")
    return anchored(root) / name


def _is_possible(name: str) -> bool:
    """Whether a file system can hold a name: no NUL, and no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def file_in(folder: Path, name: str) -> Path:
    """Name a file in the folder of a model.

    Raises: InputError when the name leads out of the folder.
    """
    plain = Path(os.path.normpath(name))  # a link in the folder may lead where its owner likes
    if plain == Path():
        raise InputError(f"{name!r}: expected the name of a file in {folder}.")
    if plain.is_absolute() or plain.parts[0] == "..":
        raise InputError(f"{name!r} leads out of {folder}; a file of the model stays in its folder.")
    return folder / name


def is_model(folder: Path) -> bool:
    """Whether a folder may be a model's folder; one that cannot be listed counts, and fails when it is opened."""
    try:
        return any(path.name in MODEL_FILES or path.name.startswith(_STEP) for path in folder.iterdir())
    except OSError:
        return True


def model_names(root: Path) -> list[str]:
    """List the models below a checkpoint root, by name."""
    try:
        folders = sorted(p for p in root.iterdir() if p.is_dir())
    except OSError:
        return []
    return [p.name for p in folders if is_model(p)]


def add_legacy_flag(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flag that names a single-file checkpoint."""
    text = "a single-file checkpoint: in the model's folder, or a path, or in the only model that has it"
    group.add_argument("--legacy_checkpoint", metavar="FILE.pt", help=text)


def legacy_path(parser: Parser, args: argparse.Namespace) -> Path | None:
    """Find the file that --legacy_checkpoint names; None without the flag.

    Raises: CheckpointNotFound when no file is there.
    """
    if args.legacy_checkpoint is None:
        return None
    root, name = Path(args.checkpoint_root), Path(args.legacy_checkpoint)
    if args.model_name:
        folder = root / args.model_name
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            parser.error(f"--legacy_checkpoint {name} leads out of {folder}; leave --model_name out to give a path")
        if not path.is_file():
            there = ", ".join(sorted(p.name for p in folder.glob("*.pt"))) or "none"
            raise CheckpointNotFound(f"{path}: no such file. Torch files in {folder}: {there}.")
        return path
    if name.is_file():
        return name
    found = [model for model in model_names(root) if (root / model / name).is_file()]
    if not found:
        raise CheckpointNotFound(f"{name}: no such file, and no model below {root} has one of this name.")
    if len(found) > 1:
        parser.error(f"{len(found)} models have a {name}: {', '.join(found)}; choose one with --model_name")
    tell(f"model: {found[0]} (the only one in {root} with {name})")
    return root / found[0] / name


def missing_model(folder: Path) -> CheckpointNotFound:
    """The error for the folder of a model that is not there: the models beside it, and the one that may be meant."""
    from difflib import get_close_matches  # only when a name is wrong

    names = model_names(folder.parent)
    near = get_close_matches(folder.name, names, n=1)
    meant = f"; did you mean {near[0]}?" if near else "."
    beside = f" Models in {folder.parent}: {listed_names(names, 20)}." if names else ""
    return CheckpointNotFound(f"{folder}: no such folder{meant}{beside}")


def choose_model(args: argparse.Namespace) -> str:
    """Name the model to use: the one given, else the only one there is.

    Raises: CheckpointNotFound when the root does not hold it, or none; Unspecified, with their names, for several.
    """
    root = Path(args.checkpoint_root)
    if args.model_name:
        if root.is_dir() and not model_folder(root, args.model_name).is_dir():
            raise missing_model(root / args.model_name)
        return args.model_name
    names = model_names(root)
    if not names:
        from .foreign import foreign_checkpoint  # opens files, which a script that finds a model need not

        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            if folder.is_dir() and (found := foreign_checkpoint(folder)):
                raise CheckpointNotFound(found)
        raise CheckpointNotFound(f"{root}: no models here. Train one: python train.py --model_name dante")
    if len(names) == 1:
        tell(f"model: {names[0]} (the only one in {root})")
        return names[0]
    raise Unspecified(f"{root} holds {len(names)} models; choose one with --model_name: {', '.join(names)}")
