"""Find the model that a command means, and its single files, by the flags that were given."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console.commandline import Parser
from ..console.commands import typed
from ..console.words import tell
from ..errors import CheckpointNotFound, Unspecified
from .names import missing_model, model_folder, model_names


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
        raise CheckpointNotFound(f"{root}: no models here. Train one: {typed('python train.py')} --model_name dante")
    if len(names) == 1:
        tell(f"model: {names[0]} (the only one in {root})")
        return names[0]
    raise Unspecified(f"{root} holds {len(names)} models; choose one with --model_name: {', '.join(names)}")
